"""The images of the programs in this folder."""

from functools import cache

import torch

from sphereify.datasets import Data, load_data


@cache
def whole(data: str) -> Data:
    """All images of a data set, in memory."""
    digits = data == "digits"
    return load_data(data, channels=1 if digits else 3, img_size=32, in_memory=not digits)


def shuffled(count: int, seed: int = 0) -> list[int]:
    """The numbers below `count` in random order, the same one each time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
