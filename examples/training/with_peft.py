"""LoRA on a converted transformer with PEFT, merged exactly.

An adapter beside an angular layer (`target_modules`) adds to the layer's output. It trains, but it cannot become a part
of the weight: g of the angle to w + Δw is not g of the angle to w, plus Δw·x. An adapter of the weight itself
(`target_parameters`) is inside the angle from the start, so that merging it changes nothing.
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sphereify import Settings, finetune, sphereify
from sphereify.datasets import load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    data = load_data("digits", channels=1)
    vit = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32, patch_size=8)
    model = sphereify(vit)
    finetune(model, data, Settings(epochs=10, lr=3e-3))
    images, labels = data.train[:]
    tests, answers = data.test[:]
    upside_down = images.flip(2), labels, tests.flip(2), answers  # the new task: digits that stand on their heads
    print(f"converted, before adapters: test accuracy {accuracy(model, *upside_down[2:]):.1%}")

    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks" in name]
    for title, targets in (
        ("beside the layers", {"target_modules": layers}),
        ("in their weights", {"target_modules": [], "target_parameters": [f"{name}.weight" for name in layers]}),
    ):
        config = LoraConfig(r=4, lora_alpha=8, modules_to_save=["head"], **targets)
        adapted = get_peft_model(copy.deepcopy(model), config)
        train(adapted, *upside_down[:2], epochs)
        merged = copy.deepcopy(adapted).merge_and_unload()
        with torch.no_grad():
            difference = (merged(tests) - adapted(tests)).abs().max() / adapted(tests).abs().max()
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(
            f"adapters {title}: {trained:,} parameters, test accuracy {accuracy(adapted, *upside_down[2:]):.1%}, "
            f"merged {accuracy(merged, *upside_down[2:]):.1%}; merging changes the outputs by {difference:.1e}"
        )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, answers: Tensor) -> float:
    return (model(images).argmax(1) == answers).float().mean().item()


if __name__ == "__main__":
    main()
