"""A folder of small pictures for the programs that want one."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, *, train: int = 12, test: int = 5) -> Path:
    """Write four classes of 32×32 noise, each of its own colour, into train/ and test/."""
    for part, count in (("train", train), ("test", test)):
        for name in range(4):
            (folder / part / f"class {name}").mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 60, (32, 32, 3)) + 60 * (name % 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"class {name}" / f"{number}.png")
    return folder
