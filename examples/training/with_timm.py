"""A converted network in the loop of timm's train.py, made of timm's own pieces: loader, optimizer, schedule, EMA.

What differs from a plain network: the loss, and that the optimizer gets parameter groups of sphereify, since the length
of an angular filter has no effect and must not decay.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy, random_seed
from torchvision.transforms.functional import to_pil_image

from sphereify import AngularLoss, param_groups, sphereify
from sphereify.datasets import load_data
from sphereify.nn import MarginAnnealing


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as a folder of images, the kind of data that train.py is usually given."""
    data = load_data("digits", channels=1)
    for part, images in (("train", data.train), ("validation", data.test)):
        for number, (image, target) in enumerate(images):
            path = folder / part / data.classes[target] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image((image * torch.tensor(data.std) + torch.tensor(data.mean)).clamp(0, 1)).save(path)


def make_loader(folder: Path, split: str, *, is_training: bool):
    images = create_dataset("", root=str(folder), split=split, is_training=is_training, batch_size=64)
    augmentation = {"no_aug": False, "scale": (0.8, 1.0), "hflip": 0.0} if is_training else {"crop_pct": 1.0}
    return create_loader(
        images,
        input_size=(3, 32, 32),
        batch_size=64,
        is_training=is_training,
        use_prefetcher=False,
        num_workers=0,
        **augmentation,
    )


def train_one_epoch(epoch, model, loader, criterion, optimizer, scheduler, scaler, ema) -> float:
    model.train()
    losses, update = AverageMeter(), epoch * len(loader)
    for images, targets in loader:
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        update += 1
        ema.update(model, step=update)
        scheduler.step_update(num_updates=update, metric=losses.avg)
        losses.update(loss.item(), len(images))
    return losses.avg


@torch.no_grad()
def validate(model, loader) -> dict[str, float]:
    model.eval()
    top1 = AverageMeter()
    for images, targets in loader:
        (share,) = accuracy(model(images), targets, topk=(1,))
        top1.update(share.item(), len(images))
    return {"top1": top1.avg}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        train = make_loader(Path(folder), "train", is_training=True)
        test = make_loader(Path(folder), "validation", is_training=False)

        model = sphereify(timm.create_model("test_resnet", num_classes=10), head="a-softmax", margin=3)
        ema = ModelEmaV3(model, decay=0.95, use_warmup=True)
        optimizer = create_optimizer_v2(param_groups(model, weight_decay=0.05), opt="adamw", lr=2e-3)
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=epochs,
            warmup_epochs=0,
            step_on_epochs=False,
            updates_per_epoch=len(train),
        )
        criterion = AngularLoss(model, annealing=MarginAnnealing(start=100, floor=1))
        scaler = NativeScaler(device="cpu")
        saver = CheckpointSaver(
            model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=folder, max_history=1
        )
        for epoch in range(epochs):
            loss = train_one_epoch(epoch, model, train, criterion, optimizer, scheduler, scaler, ema)
            top1, of_average = validate(model, test)["top1"], validate(ema.module, test)["top1"]
            best, _ = saver.save_checkpoint(epoch, of_average)
            print(f"epoch {epoch}: loss {loss:.3f}, top-1 {top1:.1f}%, of the averaged weights {of_average:.1f}%")
        print(f"test accuracy {best:.1f}%")


if __name__ == "__main__":
    main()
