"""Pictures of any depth keep their brightness, or are refused: none becomes white or black."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphereify.datasets import load_images
from sphereify.errors import DataError
from sphereify.images.pictures import as_rgb, open_image

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
EXPECTED = np.round(RAMP * 255)


def opened(array: np.ndarray, path: Path) -> np.ndarray:
    Image.fromarray(array).save(path)
    with Image.open(path) as picture:
        rgb = as_rgb(picture)
    assert rgb.mode == "RGB"
    pixels = np.asarray(rgb).astype(float)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("name", "scale", "kind"),
    [
        ("a.png", 255, np.uint8),
        ("a.png", 65535, np.uint16),
        ("a.tif", 65535, np.uint16),
        ("a.pgm", 65535, np.uint16),
        ("a.tif", 65535, np.int32),
        ("a.tif", 1, np.float32),
    ],
    ids=str,
)
def test_a_ramp_stays_a_ramp_at_any_depth(tmp_path, name, scale, kind):
    values = RAMP * scale if kind == np.float32 else np.round(RAMP * scale)
    assert np.abs(opened(values.astype(kind), tmp_path / name) - EXPECTED).max() <= 1


def test_a_tiff_of_twelve_bits_is_as_bright_as_it_says(tmp_path):
    # Two pixels of 12 bits take three bytes.
    values = np.round(RAMP * 4095).astype(int).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, len(data))]
    entries = b"".join(np.array([tag, 4, 1, 0, value, 0], "<u2")[:2].tobytes()
                       + np.array([1, value], "<u4").tobytes() for tag, value in tags)  # fmt: skip
    file = tmp_path / "a.tif"
    end = b"II*\0" + np.array([8 + len(data)], "<u4").tobytes() + data
    file.write_bytes(end + np.array([len(tags)], "<u2").tobytes() + entries + bytes(4))
    with Image.open(file) as picture:
        pixels = np.asarray(as_rgb(picture))[..., 0].astype(float)
    assert np.abs(pixels - EXPECTED).max() <= 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (RAMP.astype(np.float32) * 255, "floating-point pixels from 0 to 255, expected 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "floating-point pixels from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "floating-point pixels from nan to nan"),
        (np.round(RAMP * 200).astype(np.int32), "32-bit pixels from 0 to 200, so it is not known"),
        (np.round(RAMP * 2**20).astype(np.int32), "32-bit pixels from 0 to 1.04858e[+]06, expected 0 to 65535"),
        (np.round(RAMP * 1000).astype(np.int32) - 500, "32-bit pixels from -500 to 500"),
    ],
    ids=str,
)
def test_pixels_whose_range_is_not_known_are_refused_with_the_file(tmp_path, values, text):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: has {text}.* save it with 8 or 16 bits per channel"):
        load_images(str(tmp_path), 1, img_size=8)


def test_a_black_picture_is_black_at_any_depth(tmp_path):
    for kind in (np.uint16, np.int32, np.float32):
        assert (opened(np.zeros((4, 4), kind), tmp_path / "a.tif") == 0).all()


def corners(picture):
    """The colours of the four corners, from the top left on, clockwise."""
    right, bottom = picture.width - 1, picture.height - 1
    return [picture.getpixel(place) for place in ((0, 0), (right, 0), (right, bottom), (0, bottom))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_set_upright_once(tmp_path, orientation):
    from PIL import ImageOps

    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 200)]
    photo = Image.new("RGB", (4, 2))
    for place, colour in zip(((0, 0), (3, 0), (3, 1), (0, 1)), colours, strict=True):
        photo.putpixel(place, colour)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = open_image(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as stored:
        expected = ImageOps.exif_transpose(stored)
    assert upright.size == expected.size == ((2, 4) if orientation > 4 else (4, 2))
    assert corners(upright) == corners(expected)
    assert corners(as_rgb(upright)) == corners(upright)


def test_damaged_exif_data_does_not_hide_the_picture(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "photo.jpg", exif=b"Exif\x00\x00no such thing")
    assert open_image(tmp_path / "photo.jpg").size == (4, 2)


def test_gray_and_transparent_pictures_have_three_channels(tmp_path):
    for mode, colour in (("L", 7), ("LA", (7, 0)), ("RGBA", (7, 7, 7, 0)), ("P", 0), ("1", 1), ("CMYK", (0, 0, 0, 9))):
        Image.new(mode, (2, 2), colour).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
        assert open_image(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}").mode == "RGB"
