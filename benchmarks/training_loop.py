"""Speed of `finetune` relative to a bare PyTorch loop with the same network, images and optimizer.

    python -m benchmarks.training_loop [--device cuda] [--model resnet18 --img-size 224]

Both run in turns in one process for several rounds; the result is the ratio of the medians.
"""

import argparse
import time
from statistics import median

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from sphereify import param_groups, sphereify
from sphereify.datasets import Data
from sphereify.training import Settings, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1920)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    images = torch.randn(args.images, 3, args.img_size, args.img_size)
    targets = torch.randint(0, 10, (args.images,))
    train = TensorDataset(images, targets)
    test = TensorDataset(images[:1], targets[:1])
    data = Data("noise", train, test, [str(i) for i in range(10)], tuple(images.shape[1:]))  # type: ignore[arg-type]
    model = sphereify(timm.create_model(args.model, num_classes=10)).to(args.device)

    def bare() -> float:
        optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)
        loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True)
        model.train()
        began = time.perf_counter()
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(args.device)), y.to(args.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return args.images / (time.perf_counter() - began)

    def through_finetune() -> float:
        settings = Settings(epochs=1, batch_size=args.batch_size, device=args.device)
        return finetune(model, data, settings).epochs[0].images_per_second

    speeds: dict[str, list[float]] = {"bare": [], "finetune": []}
    for turn in range(args.rounds + 1):
        for name, way in (("bare", bare), ("finetune", through_finetune)):
            speed = way()
            if turn:  # the first round warms up
                speeds[name].append(speed)
    bare_speed, our_speed = median(speeds["bare"]), median(speeds["finetune"])
    print(f"bare {bare_speed:.0f} images/s, finetune {our_speed:.0f} images/s, ratio {our_speed / bare_speed:.3f}")


if __name__ == "__main__":
    main()
