"""Pictures of any depth as 8-bit RGB, their whole range of brightness kept."""

from typing import Any

import numpy as np
from PIL import Image

from sphereify.errors import DataError

_BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture with three channels of 8 bits. Deeper ones are scaled, where PIL would cut values off at 255.

    Raises:
        DataError: pixels of a range that is not known, with the range that they take.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        scaled = values * (255 / _white(picture, values))
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _white(picture: Image.Image, values: Any) -> float:
    """The value of a pixel that is white."""
    low, high = values.min(), values.max()
    if picture.mode == "F":
        return _checked(1.0, low, high, "floating-point pixels")
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (0,))[0]
    if picture.mode != "I":  # 16 bits and no sign, of which a TIFF file may use fewer
        return float(2**bits - 1 if 8 < bits < 16 else 65535)
    if bits == 16:  # with a sign
        return _checked(32767.0, low, high, "signed 16-bit pixels")
    # PIL opens some 16-bit files as 32 bits. Values of up to 255 may be dark ones of 16 bits, or ones of 8 bits.
    if picture.format not in ("PNG", "PPM") and 0 < high <= 255:
        raise _unknown_range(low, high, "32-bit pixels")
    return _checked(65535.0, low, high, "32-bit pixels")


def _checked(white: float, low: Any, high: Any, what: str) -> float:
    if not (low >= 0 and high <= white):  # NaN is neither
        raise _unknown_range(low, high, what, f", expected 0 to {white:g}")
    return white


def _unknown_range(low: Any, high: Any, what: str, expected: str = "") -> DataError:
    return DataError(
        f"has {what} from {low:g} to {high:g}{expected}, so it is not known which value is white; save it with 8 or 16 "
        f"bits per channel"
    )
