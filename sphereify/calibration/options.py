"""Options of a calibration, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path

from sphereify.errors import no_effect, option
from sphereify.options import check_options, option_field, options_of

PANEL = "Calibration"


@dataclass(frozen=True)
class CalibrationOptions:
    """The images that a calibration runs on, the radius that it chooses, and the optimizer steps after it.

    Raises:
        UsageError: a value that is not valid, or that has no effect without `data`.
    """

    data: str | None = option_field(
        None,
        "Fit the layers to what a trained model computes on these images: digits, a folder of images, or a name of "
        "timm's. No labels are used.",
        panel=PANEL,
        command_line="--calibrate",
    )
    images: int = option_field(
        1024,
        "Number of images, drawn from the training part; usual: 500 to 2,000.",
        panel=PANEL,
        at_least=1,
        usual="500 to 2,000",
        command_line="--calibration-images",
    )
    steps: int = option_field(
        0,
        "Optimizer steps towards the original's outputs afterwards; usual: 0, or 200 to 500.",
        panel=PANEL,
        at_least=0,
        usual="0, or 200 to 500",
        command_line="--calibrate-steps",
    )
    contrast_jitter: bool = option_field(
        False,
        "In these steps, lower the contrast of the images for the converted network only, which learns to ignore it.",
        panel=PANEL,
        command_line="--calibrate-contrast-jitter",
    )
    agreement: float | None = option_field(
        None,
        "Choose the smallest radius whose network gives this share of held-out images the original's class; usual: "
        "0.95 to 0.99.",
        panel=PANEL,
        above=0,
        below=1,
        usual="0.95 to 0.99",
    )
    data_root: Path | None = option_field(None, "Folder in which a data set of timm's lies.", panel=PANEL)
    img_size: int | None = option_field(
        None,
        "Height and width of the images in pixels; default 32 for digits, else the model's.",
        panel=PANEL,
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.contrast_jitter and not self.steps:
            raise no_effect("contrast_jitter", f"without {option('steps')}")
        if self.data is not None:
            return
        for name in options_of(CalibrationOptions):
            if getattr(self, name) != getattr(CalibrationOptions, name):
                raise no_effect(name, f"without {option('data')}, which names the images")


@dataclass(frozen=True)
class SuggestionOptions:
    """Loss that a suggested conversion may have; see `sphereify.suggest`.

    Raises:
        UsageError: a value that is not valid.
    """

    loss: float = option_field(
        0.02,
        "Largest share of images that may get another class than from the original, in (0, 1).",
        above=0,
        below=1,
        noun="a share",
        usual="0.01 to 0.05",
        command_line="--accuracy-loss",
    )

    def __post_init__(self) -> None:
        check_options(self)
