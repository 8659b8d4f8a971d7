"""Low-rank changes of converted convolutions, without another library: a parametrization of the weight.

The change is inside the angle, so that merging it into the weight changes nothing. Linear maps take it as well.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from sphereify import Settings, finetune, sphereify
from sphereify.datasets import load_data


class LowRank(nn.Module):
    """w + B·A, with each filter of w as a row. A is random and B zero at the start, so that nothing changes."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows = weight.flatten(1)
        self.a = nn.Parameter(torch.randn(rank, rows.shape[1]) / rank)
        self.b = nn.Parameter(torch.zeros(len(rows), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == targets).float().mean().item()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=3)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1))
finetune(model, data, Settings(epochs=4))
(images, labels), (tests, answers) = data.train[:], data.test[:]
images, tests = images.flip(2), tests.flip(2)  # the new task: digits that stand on their heads
print(f"before: test accuracy {accuracy(model, tests, answers):.1%}")

model.requires_grad_(False)
layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
for layer in layers:
    register_parametrization(layer, "weight", LowRank(layer.weight, rank=4))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0)
for _ in range(epochs):
    model.train()
    for batch in torch.randperm(len(images)).split(64):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
adapted = accuracy(model, tests, answers)
with torch.no_grad():
    before = model(tests)
    for layer in layers:
        remove_parametrizations(layer, "weight", leave_parametrized=True)
    change = (model(tests) - before).abs().max() / before.abs().max()
print(f"adapted: {sum(p.numel() for p in trained):,} parameters, test accuracy {adapted:.1%}")
print(f"merged: test accuracy {accuracy(model, tests, answers):.1%}; merging changes the outputs by {change:.1e}")
