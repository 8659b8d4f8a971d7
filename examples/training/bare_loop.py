"""A converted network in a plain PyTorch loop: a margin head needs `AngularLoss`, everything else is as usual."""

import argparse

import timm
import torch
from torch.utils.data import DataLoader

from sphereify import AngularLoss, param_groups, sphereify
from sphereify.datasets import load_data
from sphereify.nn import MarginAnnealing

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1), head="a-softmax", margin=3)
criterion = AngularLoss(model, annealing=MarginAnnealing(start=100, floor=1))
optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=2e-3)
for _ in range(epochs):
    model.train()
    for images, targets in DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True):
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    images, targets = data.test[:]
    accuracy = (model(images).argmax(1) == targets).float().mean()
print(f"test accuracy {accuracy:.1%}")
