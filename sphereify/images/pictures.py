"""Pictures of any depth as 8-bit RGB, upright, their whole range of brightness kept."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from sphereify.errors import DataError, first_line

_BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The turn that sets a picture upright, by its EXIF orientation."""
_HOLDERS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Names under which PIL keeps what a file says about its orientation."""


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file, upright and in RGB.

    Raises:
        DataError: it cannot be read, or the range of its pixels is not known; with the name of the file.
    """
    try:
        with Image.open(path) as picture:
            return as_rgb(picture)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and its own
        raise DataError(f"{path}: cannot be read as an image ({first_line(error)}). Remove or replace it.") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture with three channels of 8 bits, upright where its EXIF data says how a camera held it.

    Deeper pixels are scaled, where PIL would cut values off at 255. Transparency is left out.

    Raises:
        DataError: pixels of a range that is not known, with the range that they take.
    """
    rgb = _in_rgb(picture)
    turn = _TURNS.get(_orientation(picture))
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    for name in _HOLDERS:  # of an orientation that is no longer true
        upright.info.pop(name, None)
    return upright


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        scaled = values * (255 / _white(picture, values))
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> Any:
    """The orientation in the EXIF data of a picture that has been read; 1, upright, where there is none."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data says nothing, and the pixels are sound
        return 1


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
