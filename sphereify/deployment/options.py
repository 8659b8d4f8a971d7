"""Options of an export, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sphereify import choices
from sphereify.errors import UsageError, no_effect, option
from sphereify.options import check_options, option_field

LOWEST_OPSET = 18
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
assert tuple(SUFFIXES) == choices.EXPORT_FORMATS


@dataclass(frozen=True)
class ExportOptions:
    """The form of an exported file, and the inputs that it takes.

    Raises:
        UsageError: a value that is not valid, or that has no effect on the format.
    """

    format: str = option_field(
        "onnx",
        "One of: onnx, torch-export (.pt2).",
        choices=choices.EXPORT_FORMATS,
        python_help='"onnx" (needs the packages of `pip install \'sphereify[export]\'`) or "torch-export", a .pt2 file '
        "for `torch.export.load`.",
    )
    folded: bool = option_field(
        True,
        "Fold normalizations and filter norms into constants, which is faster, or leave them as they are.",
        command_line="--fold/--no-fold",
        python_help="Fold the model first, which is faster; see `sphereify.fold`.",
    )
    batch_size: int | None = option_field(
        None, "Fix the batch to this number of images; default: the file takes any number.", at_least=1
    )
    dynamic_size: bool = option_field(
        False,
        "Let the file take images of any size; not every model allows it.",
        command_line="--dynamic-size",
        python_help="Let the file take any image size, in dimensions 2 and up of each input of at least 3 dimensions. "
        "Not every model allows it: transformers with a table of positions do not.",
    )
    img_size: int | None = option_field(
        None,
        "Height and width of the images in pixels; default: those the model was trained on, else the model's.",
        at_least=1,
        python_help="Height and width of the images, in place of `example_inputs`; default: those on which a model "
        "from an artifact was trained, else those in the model's `pretrained_cfg`.",
    )
    opset: int | None = option_field(
        None, f"Version of ONNX's operators, {LOWEST_OPSET} or more; default {LOWEST_OPSET}.", at_least=LOWEST_OPSET
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.opset is not None and self.format != "onnx":
            raise no_effect("opset", f"on {option('format', self.format)}; it belongs to ONNX")

    @property
    def suffix(self) -> str:
        """The usual end of the file's name, with its dot."""
        return SUFFIXES[self.format]

    def check_suffix(self, file: Path) -> None:
        """Refuse a file whose name says that it has another format.

        Raises:
            UsageError: it is so.
        """
        named = next((name for name, suffix in SUFFIXES.items() if suffix == file.suffix), self.format)
        if named != self.format:
            raise UsageError(
                f"{file}: is the name of a file for {option('format', named)}, and the format is {self.format}"
            )


class ExportKeywords(TypedDict, total=False):
    """The fields of `ExportOptions` as keyword arguments, for type checkers."""

    format: str
    folded: bool
    batch_size: int | None
    dynamic_size: bool
    img_size: int | None
    opset: int | None
