"""Train a plain network on handwritten digits, in plain PyTorch, and save its weights: the network to convert.

python examples/plain_digits.py plain.pt
"""

import sys

import torch
import torch.nn.functional as F
from cnn import small

from sphereify.datasets import load_data

EPOCHS, BATCH, RATE = 8, 32, 3e-3


def main(path: str) -> None:
    torch.manual_seed(0)
    model = small(num_classes=10, in_chans=1)
    data = load_data("digits", channels=1)
    images, classes = data.train[:]
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * (len(images) // BATCH + 1))
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    images, classes = data.test[:]
    with torch.no_grad():
        right = (model(images).argmax(1) == classes).sum().item()
    torch.save(model.state_dict(), path)
    print(f"{right} of {len(images)} test images right ({right / len(images):.1%}); weights in {path}")


if __name__ == "__main__":
    main(sys.argv[1])
