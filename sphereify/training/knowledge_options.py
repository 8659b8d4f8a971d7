"""The options of what a conversion keeps of a trained network. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass

from sphereify.calibration.options import PANEL, CalibrationOptions
from sphereify.errors import option
from sphereify.options import check_options, option_field, same_option


@dataclass(frozen=True)
class KnowledgeOptions:
    """Options of the conversion that a training begins with: it keeps what the plain network has learned.

    Raises:
        UsageError: a value that is not valid.
    """

    no_calibrate: bool = option_field(
        False,
        f"Copy what {option('pretrained')} or {option('weights')} bring, instead of keeping what it knows by a "
        "calibration on training images, without their labels.",
        panel=PANEL,
    )
    calibration_images: int = same_option(
        CalibrationOptions, "images", help="Number of these images; 0: no calibration.", at_least=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def images(self) -> int:
        """Number of images to calibrate on; 0: the weights are copied."""
        return 0 if self.no_calibrate else self.calibration_images
