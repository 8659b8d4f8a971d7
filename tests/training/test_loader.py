"""Loaders: the order of images, and images that cannot be read."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from sphereify.datasets import Data
from sphereify.errors import DataError
from sphereify.training import Settings, evaluate, finetune
from sphereify.training.loader import Batches
from tests.training.small import CPU, Augmented, dropout_net, images, net, same, state, usual


def test_training_images_come_in_another_order_each_epoch_and_test_images_do_not():
    data = images(24)
    seen: dict[str, list[list[int]]] = {"train": [], "test": []}

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            part = data.train if self.training else data.test
            known = part.tensors[0].flatten(1)
            if len(x) > 1:
                seen["train" if self.training else "test"] += [
                    [int((known - row).abs().sum(1).argmin()) for row in x.flatten(1)]
                ]
            return self.fc(x.flatten(1))

    finetune(Watched(), data, Settings(epochs=2, batch_size=24, **CPU))
    first, second = seen["train"]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))
    assert seen["test"] == [list(range(12))] * 2


@pytest.mark.parametrize("epoch_batches", [1, 3, 4, 11])
def test_epochs_of_some_batches_see_the_same_images_as_whole_passes(epoch_batches):
    def seen(epoch_batches: int | None, epochs: int) -> list[list[tuple[int, int]]]:
        batches = Batches(13, 3, seed=5, epoch_batches=epoch_batches)
        found = []
        for batches.epoch in range(epochs):
            assert len(list(batches)) == len(batches)
            found += list(batches)
        return found

    in_passes = seen(None, 11)  # 4 batches each, the thirteenth image left out
    assert all(len({index for batch in in_passes[at : at + 4] for _, index in batch}) == 12 for at in range(0, 44, 4))
    assert seen(epoch_batches, 4) == in_passes[: 4 * epoch_batches]


def test_the_seed_covers_augmentation():
    def trained() -> dict[str, Tensor]:
        model, data = net(), images()
        data = Data(data.name, Augmented(data.train), data.test, data.classes, data.image_size)
        finetune(model, data, Settings(epochs=2, batch_size=8, **CPU))
        return state(model)

    first = trained()
    torch.manual_seed(123)
    assert same(first, trained())


class Unreadable(Dataset):
    """Some of its images are no images."""

    def __init__(self, part: TensorDataset, bad: set[int]):
        self.part, self.bad = part, bad

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int):
        if index in self.bad:
            raise OSError("broken data stream")
        return self.part[index]


def with_bad(train: set[int] = frozenset(), test: set[int] = frozenset()) -> Data:
    data = images(24)
    return Data(data.name, Unreadable(data.train, train), Unreadable(data.test, test), data.classes, data.image_size)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_counted_or_end_the_run_in_one_line(workers):
    result = finetune(dropout_net(), with_bad({1, 5}, {2}), usual(epochs=1, workers=workers))
    assert result.epochs[0].skipped == 3
    with pytest.raises(DataError) as caught:
        finetune(dropout_net(), with_bad({1, 5}), usual(epochs=1, workers=workers, strict=True))
    assert str(caught.value) in ("image 1: OSError: broken data stream", "image 5: OSError: broken data stream")


@pytest.mark.parametrize(
    ("part", "text"), [("train", "not one training image"), ("test", "not one of its test images")]
)
def test_a_part_without_a_readable_image_is_an_error(part, text):
    with pytest.raises(DataError, match=text):
        finetune(dropout_net(), with_bad(**{part: set(range(24))}), usual(epochs=1))
    if part == "test":
        with pytest.raises(DataError, match=text):
            evaluate(dropout_net(), with_bad(test=set(range(12))), Settings(device="cpu"))
