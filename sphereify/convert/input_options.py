"""The inputs that a command runs a model on, as options. Imports no torch, so that `--help` answers at once."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphereify.errors import DataError, UsageError, choose, exclusive, first_line, invalid, option, refused
from sphereify.options import check_options, option_field

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sphereify.convert.arguments import ModelArguments

FORM = re.compile(r"(?:(?P<name>[^=:]+)=)?(?P<dtype>\w+):(?P<shape>[1-9]\d*(?:[x×][1-9]\d*)*)")
EXPECTED = "NAME=DTYPE:SHAPE such as input_ids=int64:2x16, DTYPE:SHAPE by position, or a safetensors file"


@dataclass(frozen=True)
class InputOptions:
    """The inputs that a model is run on, by their shapes or from a file.

    Raises:
        UsageError: a value that is not valid, or two that exclude each other.
    """

    input: tuple[str, ...] | None = option_field(
        None,
        "Input to run the model on: NAME=float32:2x3x224x224, without NAME= by position, or a safetensors file of "
        "tensors by name; repeatable. Default: what the model seems to take.",
        panel="The model",
        metavar="INPUT",
    )
    img_size: int | None = option_field(
        None,
        "Height and width of the images to run the model on; default: the model's.",
        panel="The model",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.input and self.img_size is not None:
            raise exclusive("input", "img_size", "one that says the size")

    def for_model(self, model: "nn.Module") -> "ModelArguments | None":
        """The inputs, with tensors on the meta device where only a shape was given; None if nothing was.

        Raises:
            UsageError: an input of another form, no such file, or an image size for a model that takes no images.
            DataError: a file that holds no tensors.
        """
        if self.img_size is not None:
            return _images(model, self.img_size)
        return parse_inputs(self.input) if self.input else None


def parse_inputs(words: tuple[str, ...]) -> "ModelArguments":
    """The arguments that some words describe; see `InputOptions.input`.

    >>> parse_inputs(("float32:2x3x8x8", "mask=bool:2x16")).described()
    'float32 2×3×8×8, mask bool 2×16'
    """
    from sphereify.convert.arguments import ModelArguments

    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for word in words:
        for name, tensor in _tensors(word):
            if name in kwargs:
                raise UsageError(
                    f"{option('input')}: got {name!r} twice, expected one input of that name",
                    option="input",
                    value=name,
                )
            if name:
                kwargs[name] = tensor
            else:
                args.append(tensor)
    return ModelArguments(tuple(args), kwargs)


def _tensors(word: str) -> "list[tuple[str, Tensor]]":
    """The tensors that one word describes, with their names; the name of a positional one is empty."""
    import torch

    form = FORM.fullmatch(word)
    if form is None:
        return _tensors_of_file(word)
    dtypes = {name: one for name, one in vars(torch).items() if isinstance(one, torch.dtype)}
    if form["dtype"] not in dtypes:
        raise choose("input", form["dtype"], sorted(dtypes), place=f"{option('input')}: type of numbers in {word!r}")
    shape = [int(size) for size in re.split("[x×]", form["shape"])]
    return [(form["name"] or "", torch.empty(shape, dtype=dtypes[form["dtype"]], device="meta"))]


def _tensors_of_file(word: str) -> "list[tuple[str, Tensor]]":
    """The tensors of a safetensors file. Those whose names are numbers are positional, in that order."""
    from safetensors.torch import load_file

    path = Path(word)
    if not path.is_file():
        if path.suffix == ".safetensors":
            raise refused("input", f"there is no file {word}")
        raise invalid("input", word, EXPECTED)
    try:
        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # safetensors raises errors of its own, and those of the system
        raise DataError(f"{option('input')}: {word} is no safetensors file ({first_line(error)})") from error
    if not tensors:
        raise DataError(f"{option('input')}: {word} holds no tensors")
    places = sorted((name for name in tensors if name.isdecimal()), key=int)
    return [*(("", tensors[name]) for name in places), *((n, t) for n, t in tensors.items() if n not in places)]


def _images(model: "nn.Module", size: int) -> "ModelArguments":
    """The arguments that a model seems to take, with images of that size."""
    import torch

    from sphereify.convert.assumed_inputs import assumed_inputs
    from sphereify.convert.input_channels import input_channels

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() != 4:
            return tensor
        return torch.empty(len(tensor), channels, size, size, dtype=tensor.dtype, device="meta")

    channels = input_channels(model)
    for candidate in assumed_inputs(model):
        if any(tensor.dim() == 4 for tensor in candidate.tensors()):
            return dataclasses.replace(candidate.map(resized), given_by="img_size")
    raise refused("img_size", f"{type(model).__name__} does not seem to take images; give {option('input')} instead")
