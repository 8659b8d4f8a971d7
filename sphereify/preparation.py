"""The preparation of a model's images: size, normalization, crop and interpolation, with the names of its classes.

It is the one description of how an image becomes an input of a network. Tests and predictions make their transform of
it, and it travels with the network: in an artifact, in the metadata of an ONNX file, in the extra files of a `.pt2`.
Imports no torch, so that `--help` answers at once.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sphereify.errors import DataError, UsageError, first_line, invalid, option
from sphereify.options import check_options, option_field, options_of, to_json

SMALL = 64
"""Largest size in pixels of images that are taken whole, without a crop, and that may stay in memory."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
CHANNELS = (1, 3)
"""Numbers of channels that an image from a file may have: grey, or RGB."""
CROP_PCT = 0.875
"""Share of an image's shorter edge that is taken where nothing says it, as in timm."""

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""


@dataclass(frozen=True)
class Preparation:
    """The steps from an image to an input of a network, and the names of the network's classes. Plain data.

    Raises:
        ValueError: a value that is not valid.
    """

    image_size: tuple[int, int, int]
    """Channels (1 or 3), height and width of an input."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, of pixels in [0, 1]."""
    interpolation: str = "bicubic"
    """Interpolation with which an image is resized: one of INTERPOLATIONS."""
    crop_pct: float = CROP_PCT
    """Size of the input as a share of that to which an image is resized before the crop, in (0, 1]."""
    crop_mode: str = "center"
    """`center`: the shorter edge is resized, and the middle is taken. `squash`: both edges are, so that the whole image
    may change its aspect. `border`: the longer edge is, and what is missing is filled with the mean."""
    classes: tuple[str, ...] = ()
    """Name of each class in the order of the network's scores; empty if they are not known."""

    def __post_init__(self) -> None:
        if isinstance(self.classes, str):
            raise ValueError(f"classes is {self.classes!r}, expected the names of all classes")
        for name in ("image_size", "mean", "std", "classes"):
            values = getattr(self, name)
            if not isinstance(values, Iterable):
                raise ValueError(f"{name} is {values!r}, expected several values")
            values = values.tolist() if hasattr(values, "tolist") else values  # of NumPy or torch
            object.__setattr__(self, name, tuple(values))
        size = self.image_size
        if len(size) != 3 or any(type(edge) is not int or edge < 1 for edge in size) or size[0] not in CHANNELS:
            raise ValueError(f"image_size is {size!r}, expected 1 or 3 channels, a height and a width")
        for name, least in (("mean", None), ("std", 0)):
            values = getattr(self, name)
            if len(values) != size[0] or not all(_is_number(value, above=least) for value in values):
                raise ValueError(
                    f"{name} is {values!r}, expected {size[0]} numbers" + (" above 0" if name == "std" else "")
                )
        for name, words in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(words)}")
        if not _is_number(self.crop_pct, above=0) or self.crop_pct > 1:
            raise ValueError(f"crop_pct is {self.crop_pct!r}, expected a number above 0 and at most 1")
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError("classes are not all text")

    @classmethod
    def of(cls, size: int, channels: int, config: Mapping[str, Any], classes: tuple[str, ...] = ()) -> "Preparation":
        """The preparation of square images by the configuration of a model.

        Images of up to SMALL pixels are taken whole, unless the configuration is that of a `Preparation` for this size.

        Args:
            size: height and width in pixels.
            channels: 1 or 3; for one channel, mean and standard deviation are the means over the configuration's.
            config: the keys of timm's `pretrained_cfg`; where one is missing, the usual value is taken.
            classes: names of the classes.
        """
        normalization = normalization_of(channels, config)
        if size <= SMALL and config.get(_SIZE) != (size, size):
            return cls((channels, size, size), *normalization, "bilinear", 1.0, "squash", classes)
        return cls(
            (channels, size, size),
            *normalization,
            config.get("interpolation") or "bicubic",
            config.get("crop_pct") or CROP_PCT,
            config.get("crop_mode") or "center",
            classes,
        )

    def config(self) -> dict[str, Any]:
        """The preparation in the keys of timm's `pretrained_cfg`, from which `of` makes the same one."""
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        own = {name: getattr(self, name) for name in names}
        return {"input_size": self.image_size, **own, _SIZE: self.image_size[1:]}

    def resized(self, size: int) -> "Preparation":
        """The preparation for images of another height and width in pixels."""
        if self.image_size[1:] == (size, size):
            return self
        return Preparation.of(size, self.image_size[0], self.config(), self.classes)

    def transform(self) -> Any:
        """The transform of an RGB image of PIL to a float32 tensor of shape `image_size`."""
        from timm.data import create_transform
        from torchvision import transforms

        channels, height, width = self.image_size
        gray = [transforms.Grayscale()] if channels == 1 else []
        photographs = create_transform(
            (channels, height, width),
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return transforms.Compose([*gray, photographs])

    def described(self) -> str:
        """The preparation in one line."""
        channels, height, width = self.image_size
        numbers = (f"{name} {', '.join(f'{v:.4g}' for v in getattr(self, name))}" for name in ("mean", "std"))
        names = f", {len(self.classes)} classes by name" if self.classes else ""
        crop = f"{self.crop_mode} crop {self.crop_pct:.4g}"
        return f"{channels}×{height}×{width}, {'; '.join(numbers)}; {self.interpolation}, {crop}{names}"

    # ------------------------------------------------------------------------------------------------------- plain data

    def to_json(self) -> dict[str, Any]:
        """The preparation as plain JSON values."""
        return to_json(self)

    @classmethod
    def from_json(cls, plain: Any) -> "Preparation":
        """The preparation that `to_json` was given; keys of a later version are passed over.

        Raises:
            ValueError: a value is missing or not valid.
        """
        if not isinstance(plain, dict):
            raise ValueError(f"is {type(plain).__name__}, expected an object")
        try:
            return cls(**{name: value for name, value in plain.items() if name in cls.__dataclass_fields__})
        except TypeError as error:
            raise ValueError(str(error)) from None

    def metadata(self) -> dict[str, str]:
        """The preparation for an exported file: the text of each entry by its name."""
        plain = self.to_json()
        classes = plain.pop("classes")
        return {PREPARATION: json.dumps(plain), CLASSES: json.dumps(classes, ensure_ascii=False)}


PREPARATION, CLASSES = "preparation", "classes"
"""Names of an exported file's entries: JSON of the preparation, and of the list of the classes' names."""

_SIZE = "prepared_size"
"""Key of a configuration whose crop and interpolation were chosen for images of this size."""


def preparation_in(metadata: Mapping[str, str]) -> Preparation | None:
    """The preparation in the metadata of an exported file; None if it has none.

    Raises:
        ValueError: it is damaged.
    """
    if not metadata.get(PREPARATION):
        return None
    plain = json.loads(metadata[PREPARATION])
    classes = json.loads(metadata.get(CLASSES) or "[]")
    return Preparation.from_json({**plain, "classes": classes} if isinstance(plain, dict) else plain)


def normalization_of(channels: int, config: Mapping[str, Any]) -> Normalization:
    """The normalization that the configuration of a model names, or 0.5; for one channel, the means over the three."""
    mean, deviation = (tuple(config.get(name, (0.5,) * 3)) for name in ("mean", "std"))
    if channels == 1:
        return (sum(mean) / len(mean),), (sum(deviation) / len(deviation),)
    repeats = channels if len(mean) == 1 else 1
    return mean * repeats, deviation * repeats


def _is_number(value: Any, above: float | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        return False
    return above is None or value > above


# ------------------------------------------------------------------------------------------------------------- options

PANEL = "Preparation of images"


@dataclass(frozen=True)
class PreparationOptions:
    """Facts about a model's images that the model does not state, or states wrongly.

    Raises:
        UsageError: a value that is not valid.
    """

    img_size: int | None = option_field(
        None, "Height and width of the images in pixels; default: the model's own size.", panel=PANEL, at_least=1
    )
    mean: tuple[float, ...] | None = option_field(
        None,
        "Mean of each channel of pixels in [0, 1], repeated for each channel; one value is for all. Default: the "
        "model's own.",
        panel=PANEL,
    )
    std: tuple[float, ...] | None = option_field(
        None,
        "Standard deviation of each channel of pixels in [0, 1], as for the mean.",
        panel=PANEL,
    )
    interpolation: str | None = option_field(
        None,
        f"How images are resized: {', '.join(INTERPOLATIONS)}; default: the model's own.",
        panel=PANEL,
        choices=INTERPOLATIONS,
    )
    crop_pct: float | None = option_field(
        None,
        "Size of the input as a share of that to which an image is resized before the crop; default: the model's own.",
        panel=PANEL,
        above=0,
        at_most=1,
    )
    crop_mode: str | None = option_field(
        None,
        "center: crop the middle; squash: resize both edges; border: fill what is missing; default: the model's own.",
        panel=PANEL,
        choices=CROP_MODES,
    )
    class_names: Path | None = option_field(
        None,
        "File with the names of the classes: one in each line, or a JSON list; default: the model's own.",
        panel=PANEL,
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None:
                continue
            values = (values,) if isinstance(values, (int, float)) else tuple(values)
            if len(values) not in (1, 3) or not all(_is_number(v, above=0 if name == "std" else None) for v in values):
                above = " above 0" if name == "std" else ""
                raise invalid(
                    name, list(values), f"1 or 3 numbers{above}", "Usual: 0.485, 0.456, 0.406" if name == "mean" else ""
                )
            object.__setattr__(self, name, values)

    @property
    def given(self) -> bool:
        """True if an option is set."""
        return any(getattr(self, name) is not None for name in options_of(PreparationOptions))

    def missing(self) -> str:
        """The options that are needed where nothing else says how images are prepared, and that are not given."""
        names = [name for name in ("img_size", "mean", "std") if getattr(self, name) is None]
        return ", ".join(map(option, names))

    def over(self, own: Preparation | None, channels: int | None = None, size: int | None = None) -> Preparation | None:
        """A model's own preparation with what these options say instead; None if that is still not enough.

        Args:
            own: that of the model; None if it has none.
            channels: of the model's images, where `own` is None; default: those of `mean`.
            size: of the model's images in pixels, where neither `own` nor `img_size` says it.

        Raises:
            UsageError: numbers for other channels than the model has.
            DataError: a file of class names that cannot be read.
        """
        if own is None:
            size = self.img_size or size
            if self.mean is None or self.std is None or size is None:
                return None
            if channels not in (None, *CHANNELS):
                raise UsageError(f"the network takes images of {channels} channels, and files of images have 1 or 3")
            own = Preparation.of(size, channels or len(self.mean), {})
        elif self.img_size is not None:
            own = own.resized(self.img_size)
        changes: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("interpolation", "crop_pct", "crop_mode")
            if getattr(self, name) is not None
        }
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None:
                changes[name] = _for_channels(name, values, own.image_size[0])
        if self.class_names is not None:
            changes["classes"] = read_class_names(self.class_names)
        return replace(own, **changes)


def _for_channels(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise invalid(
            name, list(values), f"{channels} numbers, one for each channel of the model's images, or one for all"
        )
    return values * channels if len(values) == 1 else values


def read_class_names(file: Path) -> tuple[str, ...]:
    """The names of the classes in a file: one in each line, or a JSON list.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        names = json.loads(text) if Path(file).suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{option('class_names')}: {file} cannot be read ({first_line(error)})") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"{option('class_names')}: {file} holds no list of names, expected one in each line, or a JSON list"
        )
    return tuple(name.strip() for name in names)
