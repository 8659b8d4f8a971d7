"""Options of a calibration on images by name. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path

from sphereify.errors import UsageError, option
from sphereify.options import check_options, option_field

CALIBRATION = "Calibration"


@dataclass(frozen=True)
class CalibrationOptions:
    """Which images to calibrate on, and for how long."""

    calibrate: str | None = option_field(
        None,
        "Fit the layers to what a trained model computes on these images: digits, a folder of images, or a name of "
        "timm's. No labels are used.",
        panel=CALIBRATION,
    )
    calibration_images: int | None = option_field(
        None, "Number of images, of the training part; default 1024.", panel=CALIBRATION, usual="500 to 2,000"
    )
    calibrate_steps: int = option_field(
        0, "Optimizer steps towards the original's outputs afterwards.", panel=CALIBRATION, usual="0, or 200 to 500",
        at_least=0,
    )
    data_root: Path | None = option_field(None, "Folder that holds a data set of timm.", panel=CALIBRATION)
    img_size: int | None = option_field(None, "Pixels of the images.", panel=CALIBRATION, at_least=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.calibrate is None:
            for name in ("calibration_images", "calibrate_steps", "data_root", "img_size"):
                if getattr(self, name):
                    raise UsageError(f"{option(name)}: has no effect without {option('calibrate')}, which names the images")
