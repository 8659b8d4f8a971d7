"""A model as one file for other runtimes: ONNX, or torch's own exported program (.pt2). No TorchScript.

The file is written aside, run on other inputs than it was traced with, compared with the model, and then moved into
place: the file at the path has been checked, as far as its runtime is installed.
"""

import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.assumed_inputs import runnable_inputs
from sphereify.convert.copies import copy_of
from sphereify.convert.finite import first_bad_layer
from sphereify.convert.input_channels import input_channels
from sphereify.convert.input_values import filled, noise
from sphereify.convert.model_checks import check_model
from sphereify.convert.model_inputs import tensors_in
from sphereify.deployment.differences import difference, has_numbers, not_finite
from sphereify.deployment.folding import fold, is_folded
from sphereify.deployment.formats import Axes, Format, Written, check_installed, is_installed
from sphereify.deployment.options import LOWEST_OPSET, ExportKeywords, ExportOptions
from sphereify.errors import ExportError, SphereifyError, UsageError, first_line, invalid, no_effect, option, wrong_type
from sphereify.files import as_path, replacing_with_companions
from sphereify.model_images import chosen_size, preparation_of
from sphereify.options import from_keywords, with_keywords_of
from sphereify.preparation import Preparation

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOLERANCE = 1e-3
"""Largest difference of outputs that counts as rounding, relative to the largest output."""


NO_ANSWER_TO_ZEROS = "not on zeros, where rounding decides the outputs of the model itself"


@dataclass(frozen=True)
class Exported:
    """An exported file, and how well it agrees with the model.

    Attributes:
        path: the file.
        format: one of `sphereify.choices.EXPORT_FORMATS`.
        size: of all its files, in bytes.
        difference: the largest difference from the model's outputs, relative to the largest output; None if it was not
            checked.
        note: the inputs on which it was checked, or the reason why it was not.
        opset: version of the ONNX operators; None for other formats.
        operators: the number of times each operator is used, the most frequent first.
        companions: further files, which must stay beside the file: the weights of an ONNX file of 2 GB or more.
        preparation: how an image becomes an input, with the names of the classes, as the file holds it; None: it does
            not, since the model does not say it.
    """

    path: Path
    format: str
    size: int
    difference: float | None
    note: str
    opset: int | None
    operators: dict[str, int]
    companions: tuple[Path, ...] = ()
    preparation: Preparation | None = None


@with_keywords_of(ExportOptions)
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs = None,
    **keywords: "Unpack[ExportKeywords]",
) -> Exported:
    """Write a model to a file, and check the file against the model.

    ONNX files may not reach 2 GiB. The weights of a larger model are written to a second file beside it, `path` with
    ".data" at its end, which belongs to it.

    The file holds how an image becomes an input, and the names of the classes, where the model says it: as JSON in the
    entries "preparation" and "classes", of an ONNX file's metadata or a .pt2 file's extra files.

    Args:
        model: converted or folded; in evaluation it takes and returns tensors. It is not changed.
        path: the file. One that exists is replaced, with what belongs to it, when the new one is complete.
        example_inputs: tensors that the model takes, with the batch in dimension 0, as for `plan_conversion`; a file
            for `torch.export.load` takes by keyword what is given by keyword. Default: random inputs of the usual
            kind and size.
        {options}

    Returns:
        The file, with the largest difference found.

    Raises:
        UsageError: an unknown format, an opset that is too low, missing packages, a path that is not a file's.
        ArgumentTypeError: a model that is no module, or example inputs that are no tensors.
        ExportError: the model cannot be exported so, the file cannot be written, or it computes something else than the
            model, or the model's outputs are not finite. There is no file then that was not there before.
    """
    options = from_keywords(ExportOptions, keywords, "export")
    chosen = check_installed(options.format)
    if not is_folded(model):
        check_model(model)
    target = _checked_path(path)
    options.check_suffix(target)
    if torch.is_inference_mode_enabled():
        raise UsageError("export: cannot trace a model inside torch.inference_mode; call it outside")
    with _without_warnings(), torch.no_grad():
        reference = copy_of(model).eval()
        inputs = _inputs(reference, example_inputs, options)
        _check_finite(reference, inputs)
        network = fold(model, inputs) if options.folded and not is_folded(model) else reference
        axes = tuple(_dynamic_axes(one, options) for one in inputs.values())
        preparation = _preparation(model, inputs)
        with chosen.tracing(options.opset or LOWEST_OPSET):
            program = _traced(network, inputs, axes)
        try:
            with replacing_with_companions(target, chosen.companions) as aside:
                written = _write(chosen, program, aside, axes, options, target, preparation)
                others = inputs.with_values(map(_other_input, inputs.values(), axes))
                agreement, note = _check(chosen, aside, reference, others)
                files = list(aside.parent.iterdir())
                size = sum(file.stat().st_size for file in files)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror or error})") from error
    operators = dict(written.operators.most_common())
    companions = tuple(target.with_name(file.name) for file in files if file.name != target.name)
    return Exported(target, options.format, size, agreement, note, written.opset, operators, companions, preparation)


def _checked_path(path: str | Path) -> Path:
    target = as_path("path", path)
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise UsageError(f"{path}: is no regular file; expected the name of one to write")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {target.parent}")
    return target


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out the warnings that the exporters give about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -------------------------------------------------------------------------------------------------------------- inputs


def _inputs(model: nn.Module, example_inputs: Inputs, options: ExportOptions) -> ModelArguments:
    """Inputs to trace with, on the model's device: at least two rows, if the file is to take any number of them."""
    inputs = _default_inputs(model, options) if example_inputs is None else _given(model, example_inputs, options)
    if options.batch_size is None:  # torch.export takes a size of 1 for a constant
        inputs = inputs.map(lambda one: torch.cat([one, one]) if len(one) == 1 else one)
    return inputs


def _given(model: nn.Module, example_inputs: Any, options: ExportOptions) -> ModelArguments:
    arguments = _in_order(ModelArguments.of(example_inputs), model)
    for one in arguments.values():
        if not isinstance(one, Tensor):
            expected = "a tensor, or a tuple or a dict of tensors, with the batch in dimension 0"
            raise wrong_type(option("example_inputs"), one, expected)
        if one.dim() == 0:
            raise UsageError(
                f"{option('example_inputs')}: got a tensor without dimensions, expected the batch in dimension 0",
                option="example_inputs",
            )
    if options.img_size is not None:
        raise no_effect("img_size", f"with {option('example_inputs')}, which have a size of their own")
    if options.batch_size is not None and any(len(one) != options.batch_size for one in arguments.values()):
        sizes = ", ".join(sorted({str(len(one)) for one in arguments.values()}))
        raise invalid("batch_size", options.batch_size, f"that of {option('example_inputs')}, {sizes}")
    return filled(arguments, model)


def _in_order(arguments: ModelArguments, model: nn.Module) -> ModelArguments:
    """The arguments with those by keyword in the order of the signature, in which a file takes them."""
    places = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}
    names = sorted(arguments.kwargs, key=lambda name: places.get(name, len(places)))
    return ModelArguments(arguments.args, {name: arguments.kwargs[name] for name in names})


def _default_inputs(model: nn.Module, options: ExportOptions) -> ModelArguments:
    """Random inputs of the size that is asked for, or trained on, or usual for such a model."""
    batch = options.batch_size or 2
    size = chosen_size(model) if options.img_size is None else (options.img_size,) * 2
    if size is not None:
        like = next(model.parameters(), torch.empty(0))
        return ModelArguments((noise([batch, input_channels(model), *size]).to(like),))
    try:
        return runnable_inputs(model, batch)
    except UsageError as error:
        raise UsageError(f"{error}; give {option('img_size')} or {option('example_inputs')}") from error


def _preparation(model: nn.Module, inputs: ModelArguments) -> Preparation | None:
    """The preparation of images of the size that the file takes; None where the model does not say it."""
    preparation, images = preparation_of(model), inputs.values()
    if preparation is None or len(images) != 1 or images[0].dim() != 4:
        return None
    channels, height, width = images[0].shape[1:]
    if channels != preparation.image_size[0]:
        return None
    if height == width:
        return preparation.resized(height)
    return dataclasses.replace(preparation, image_size=(channels, height, width))


def _dynamic_axes(one: Tensor, options: ExportOptions) -> Axes:
    """The dimensions of an input that may differ from run to run."""
    names = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}.get(one.dim(), ())
    return {
        **({0: "batch"} if options.batch_size is None else {}),
        **(dict(enumerate(names, start=2)) if options.dynamic_size else {}),
    }


def _other_input(one: Tensor, axes: Axes) -> Tensor:
    """An input with other values, and with another size along each axis that may differ."""
    shape = [size + (0 if axis not in axes else 1 if axis == 0 else 32) for axis, size in enumerate(one.shape)]
    if one.is_floating_point():
        return noise(shape).to(one)
    for axis, size in enumerate(shape):  # token ids, for example: only values that the given input holds
        one = one.index_select(axis, torch.arange(size, device=one.device) % one.shape[axis])
    return one


# ------------------------------------------------------------------------------------------------------- trace and file


def _traced(network: nn.Module, inputs: ModelArguments, axes: tuple[Axes, ...]) -> torch.export.ExportedProgram:
    dynamic = inputs.with_values(dict.fromkeys(one, torch.export.Dim.DYNAMIC) for one in axes)
    try:
        return torch.export.export(
            network,
            inputs.args,
            dict(inputs.kwargs),
            dynamic_shapes=_by_parameter(network, dynamic),
            strict=False,
        )
    except Exception as error:  # the tracer, or the forward, may raise anything
        sizes = any(axis > 0 for one in axes for axis in one)
        hint = f"; its image size may have to be fixed: leave out {option('dynamic_size')}" if sizes else ""
        raise ExportError(
            f"{type(network).__name__} cannot be traced by torch.export ({first_line(error)}){hint}"
        ) from error


def _by_parameter(network: nn.Module, dynamic: ModelArguments) -> dict[str, Any]:
    """Dynamic shapes for torch.export, by parameter: those of *args as a tuple, those of **kwargs as a dict."""
    return dict(inspect.signature(network.forward).bind(*dynamic.args, **dynamic.kwargs).arguments)


def _write(
    chosen: Format,
    program: torch.export.ExportedProgram,
    aside: Path,
    axes: tuple[Axes, ...],
    options: ExportOptions,
    target: Path,
    preparation: Preparation | None,
) -> Written:
    metadata = {} if preparation is None else preparation.metadata()
    try:
        return chosen.write(program, aside, axes, options.opset or LOWEST_OPSET, metadata)
    except (OSError, SphereifyError):
        raise
    except Exception as error:  # a converter may raise anything
        raise ExportError(f"{target}: the traced model cannot be written ({first_line(error)})") from error


# --------------------------------------------------------------------------------------------------------------- check


def _check_finite(model: nn.Module, inputs: ModelArguments) -> None:
    """Refuse a model without a finite output, with which no file could be compared."""
    try:
        outputs = list(tensors_in(inputs.run(model)))
    except Exception:  # the tracer tells best why a model does not take its inputs
        return
    if not has_numbers(outputs):
        raise ExportError(
            f"the outputs of {type(model).__name__} for {inputs.described()} are not finite, so there is nothing to "
            f"compare a file with; the first layer with a value that is not finite is {first_bad_layer(model, inputs)}"
        )


def _check(chosen: Format, path: Path, model: nn.Module, inputs: ModelArguments) -> tuple[float | None, str]:
    """Compare the file with the model, on these inputs and on zeros.

    Returns:
        The largest difference of the outputs relative to the largest output, and a note on the inputs.

    Raises:
        ExportError: the file cannot be run, or its outputs differ by more than rounding.
    """
    if not is_installed(chosen.runtime):
        return None, f"not checked: {chosen.runtime} is not installed"
    shapes = ", ".join("×".join(map(str, one.shape)) for one in inputs.values())
    largest, odd = 0.0, ""
    for what, probe in (("a random input", inputs), ("zeros", inputs.map(torch.zeros_like))):
        expected = list(tensors_in(probe.run(model)))
        if what == "zeros" and any(one.isnan().any() for one in expected if one.is_floating_point()):
            continue  # this model has no answer to zeros
        odd = odd or not_finite(expected)
        try:
            outputs = chosen.run(path, probe)
        except Exception as error:  # a runtime may raise anything
            raise ExportError(f"{chosen.runtime} cannot run the exported file ({first_line(error)})") from error
        apart = _largest_difference(outputs, expected)
        if not apart <= _tolerance(expected):
            if what == "zeros" and math.isfinite(apart) and _turns_on_rounding(model, probe, expected):
                return largest, f"checked with {chosen.runtime} on a random input of {shapes}; {NO_ANSWER_TO_ZEROS}"
            if not _largest_difference(tensors_in(probe.run(model)), expected) <= _tolerance(expected):
                raise ExportError(
                    f"the outputs of {type(model).__name__} for the same inputs differ from pass to pass, since it is "
                    f"random in evaluation, too: a file cannot be compared with it"
                )
            raise ExportError(
                f"the exported file computes something else than the model: on {what} of {shapes} its outputs differ "
                f"by {apart:.1e} of the largest"
            )
        largest = max(largest, apart)
    same = f"; {odd}, in the file as in the model" if odd else ""
    return largest, f"checked with {chosen.runtime} on a random input of {shapes}{same}"


def _turns_on_rounding(model: nn.Module, zeros: ModelArguments, expected: list[Tensor]) -> bool:
    """True if inputs that differ from zeros by rounding change the model's outputs by more than rounding.

    Zeros are the same everywhere, and a normalization by their own spread makes of rounding errors what they are not.
    """
    nearly = zeros.map(_off_by_rounding)
    outputs = list(tensors_in(nearly.run(model)))
    return _largest_difference(outputs, expected) > _tolerance(expected)


def _off_by_rounding(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value + 8 * torch.finfo(value.dtype).eps * noise(value.shape).to(value)


def _largest_difference(outputs: Iterable[Tensor], expected: list[Tensor]) -> float:
    return max((difference(a, b) for a, b in zip(outputs, expected, strict=True)), default=0.0)


def _tolerance(expected: list[Tensor]) -> float:
    """The largest difference that rounding explains, which is more in half precision."""
    steps = [torch.finfo(one.dtype).eps for one in expected if one.is_floating_point()]
    return max([TOLERANCE, *(8 * step for step in steps)])
