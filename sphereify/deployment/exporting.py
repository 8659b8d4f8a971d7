"""A model as one file for other runtimes: ONNX, or torch's own exported program (.pt2). No TorchScript.

The file is written aside, run on other inputs than it was traced with, compared with the model, and then moved into
place: what lies at the path afterwards has been checked, as far as its runtime is installed.
"""

import contextlib
import importlib.util
import inspect
import io
import math
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sphereify import choices
from sphereify.convert.copies import copy_of
from sphereify.convert.model_checks import check_model
from sphereify.convert.model_inputs import Inputs, arguments_of, noise, runnable_inputs, tensors_in
from sphereify.deployment.folding import fold, is_folded
from sphereify.errors import ExportError, SphereifyError, UsageError, choose, first_line

LOWEST_OPSET = 18
TOLERANCE = 1e-3
"""Of outputs, relative to the largest: what lies beyond is no rounding."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees."""

    path: Path
    format: str
    """One of `sphereify.choices.EXPORT_FORMATS`."""
    size: int
    """Bytes."""
    difference: float | None
    """The largest difference from the model's outputs, relative to the largest output; None if it was not checked."""
    note: str
    """On which inputs it was checked, or why it was not."""
    opset: int | None
    """Version of the ONNX operators."""
    operators: dict[str, int]
    """How often each operator is used, the most frequent first."""


Axes = dict[int, str]
"""The dimensions of one input that may differ from run to run, with their names."""


class Request(NamedTuple):
    """What a format's writer gets."""

    program: torch.export.ExportedProgram
    path: Path
    opset: int
    axes: tuple[Axes, ...]


class Format(NamedTuple):
    write: Callable[[Request], tuple[Counter[str], int | None]]
    """Writes the file; how often it uses which operator, and the opset."""
    run: Callable[[Path, tuple[Tensor, ...]], list[Tensor]]
    """The outputs of the file for these inputs."""
    needs: tuple[str, ...] = ()
    """Packages that write it."""
    runtime: str = "torch"
    """The package that runs it."""


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs = None,
    *,
    format: str = "onnx",
    folded: bool = True,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int = LOWEST_OPSET,
) -> Exported:
    """Write a model to one file, and check the file against the model.

    Args:
        model: converted or folded; in evaluation it takes and returns tensors. It is not changed.
        path: the file. One that exists is replaced when the new one is complete.
        example_inputs: a tensor or a tuple of tensors that the model takes, with the batch in dimension 0; default: two
            images of the size in the model's `pretrained_cfg`.
        format: "onnx" (needs the packages of `pip install 'sphereify[export]'`) or "torch-export", a .pt2 file for
            `torch.export.load`.
        folded: fold the model first; see `sphereify.fold`.
        dynamic_batch: let the file take any batch size ≥ 1.
        dynamic_size: let it take any image size, in dimensions 2 and up of each input of at least 3 dimensions. Not
            every model allows it: transformers with a table of positions do not.
        opset: of ONNX's operators, ≥ 18.

    Returns:
        What was written, with the largest difference found.

    Raises:
        UsageError: an unknown format, an opset that is too low, missing packages.
        ExportError: the model cannot be exported so, the file cannot be written, or it computes something else than the
            model. There is no file then that was not there before.
    """
    chosen = _format(format, opset)
    if not is_folded(model):
        check_model(model)
    target = _target(path)
    if torch.is_inference_mode_enabled():
        raise UsageError("export: inside torch.inference_mode, where nothing can be traced; call it outside")
    with _quietly(), torch.no_grad():
        reference = copy_of(model).eval()
        inputs = _inputs(reference, example_inputs)
        network = fold(model, inputs) if folded and not is_folded(model) else reference
        if dynamic_batch:  # torch.export takes a size of 1 for a constant
            inputs = tuple(torch.cat([one, one]) if len(one) == 1 else one for one in inputs)
        axes = tuple(_axes(one, dynamic_batch, dynamic_size) for one in inputs)
        program = _program(network, inputs, axes)
        aside = target.with_name(f".{uuid.uuid4().hex}{target.suffix[:16]}")
        try:
            operators, version = _written(chosen, Request(program, aside, opset, axes), target)
            others = tuple(map(_another, inputs, axes))
            difference, note = _checked(chosen, aside, reference, others)
            size = aside.stat().st_size
            os.replace(aside, target)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror or error})") from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
    return Exported(target, choices.canonical(format), size, difference, note, version, dict(operators.most_common()))


def _format(name: str, opset: int) -> Format:
    """The format of that name, once what writes it is installed."""
    chosen = FORMATS.get(choices.canonical(name))
    if chosen is None:
        raise choose("format", name, FORMATS)
    if opset < LOWEST_OPSET:
        raise UsageError(f"opset: got {opset}, expected {LOWEST_OPSET} or more")
    missing = [package for package in chosen.needs if not _is_installed(package)]
    if missing:
        raise UsageError(
            f"format {name}: {' and '.join(missing)} must be installed to write it: pip install 'sphereify[export]'"
        )
    return chosen


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _target(path: str | Path) -> Path:
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise UsageError(f"{path}: is no regular file; expected the name of one to write")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {target.parent}")
    return target


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' warnings about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _inputs(model: nn.Module, example_inputs: Inputs) -> tuple[Tensor, ...]:
    """Inputs to trace with, where the model is and in its dtype."""
    if example_inputs is not None:
        given = arguments_of(example_inputs)
        if not all(isinstance(one, Tensor) and one.dim() > 0 for one in given):
            raise UsageError("example_inputs: expected a tensor or a tuple of tensors, with the batch in dimension 0")
        device = next(model.parameters(), torch.empty(0)).device
        return tuple(one.to(device) for one in given)
    return runnable_inputs(model)


def _axes(one: Tensor, batch: bool, size: bool) -> Axes:
    names = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}.get(one.dim(), ())
    return {**({0: "batch"} if batch else {}), **(dict(enumerate(names, start=2)) if size else {})}


def _program(network: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[Axes, ...]) -> torch.export.ExportedProgram:
    dynamic = tuple(dict.fromkeys(one, torch.export.Dim.DYNAMIC) for one in axes)
    try:
        return torch.export.export(network, inputs, dynamic_shapes=_by_parameter(network, dynamic), strict=False)
    except Exception as error:  # the tracer, or the forward, may raise anything
        sizes = any(axis > 0 for one in axes for axis in one)
        hint = "; its image size may have to be fixed: leave out dynamic_size (--dynamic-size)" if sizes else ""
        raise ExportError(
            f"{type(network).__name__} cannot be traced by torch.export ({first_line(error)}){hint}"
        ) from error


def _by_parameter(network: nn.Module, dynamic: tuple[dict[int, Any], ...]) -> Any:
    """As torch.export wants it: one entry for each argument, those of *args in a tuple of their own."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = dynamic[len(named) :]
    return dynamic if not rest else (*dynamic[: len(named)], rest)


def _written(chosen: Format, request: Request, target: Path) -> tuple[Counter[str], int | None]:
    try:
        return chosen.write(request)
    except (OSError, SphereifyError):
        raise
    except Exception as error:  # a converter may raise anything
        raise ExportError(f"{target}: the traced model cannot be written ({first_line(error)})") from error


def _another(one: Tensor, axes: Axes) -> Tensor:
    """An input with other values, and with another size along each axis that may differ."""
    shape = [size + (0 if axis not in axes else 1 if axis == 0 else 32) for axis, size in enumerate(one.shape)]
    if one.is_floating_point():
        return noise(shape).to(one)
    for axis, size in enumerate(shape):  # numbers of words, say: no others than were given
        one = one.index_select(axis, torch.arange(size, device=one.device) % one.shape[axis])
    return one


def _checked(chosen: Format, path: Path, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float | None, str]:
    """The largest difference of the file's outputs from the model's, relative to the largest, and what was run."""
    if not _is_installed(chosen.runtime):
        return None, f"not checked: {chosen.runtime} is not installed"
    shapes = ", ".join("×".join(map(str, one.shape)) for one in inputs)
    largest = 0.0
    for what, probe in (("a random input", inputs), ("zeros", tuple(map(torch.zeros_like, inputs)))):
        expected = list(tensors_in(model(*probe)))
        if what == "zeros" and not all(one.isfinite().all() for one in expected if one.is_floating_point()):
            continue  # zeros mean nothing to this model
        try:
            found = chosen.run(path, probe)
        except Exception as error:  # a runtime may raise anything
            raise ExportError(f"{chosen.runtime} cannot run what was written ({first_line(error)})") from error
        difference = max((_difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
        if not difference <= _tolerance(expected):
            raise ExportError(
                f"what was written computes something else than the model: on {what} of {shapes} its outputs differ by "
                f"{difference:.1e} of the largest"
            )
        largest = max(largest, difference)
    return largest, f"checked with {chosen.runtime} on a random input of {shapes}"


def _tolerance(outputs: list[Tensor]) -> float:
    """Of the difference: rounding in half precision is more."""
    steps = [torch.finfo(one.dtype).eps for one in outputs if one.is_floating_point()]
    return max([TOLERANCE, *(8 * step for step in steps)])


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _write_onnx(request: Request) -> tuple[Counter[str], int]:
    import onnx

    highest = onnx.defs.onnx_opset_version()
    if request.opset > highest:
        raise UsageError(f"opset: got {request.opset}, expected at most {highest}, the highest that this onnx knows")
    # Not optimized: onnxscript takes an ε of 1e-8 or less for 0 and leaves it out. Runtimes optimize by themselves.
    program: Any = torch.onnx.export(
        request.program,
        dynamo=True,
        opset_version=request.opset,
        dynamic_shapes=request.axes,
        optimize=False,
        verbose=False,
    )
    operators = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in program.model.graph.all_nodes())
    del operators["Constant"]
    foreign = sorted(name for name in operators if "::" in name)
    if foreign:
        raise ExportError(f"the model needs operators that are not ONNX's own: {', '.join(foreign)}")
    program.save(str(request.path), external_data=False)
    return operators, program.model.opset_imports[""]


def _run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {known.name: one.cpu().numpy() for known, one in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feed)]


def _write_program(request: Request) -> tuple[Counter[str], None]:
    buffer = io.BytesIO()  # a path would have to end in .pt2
    torch.export.save(request.program, buffer)
    request.path.write_bytes(buffer.getbuffer())
    nodes = (node for node in request.program.graph.nodes if node.op == "call_function")
    return Counter(str(node.target) for node in nodes), None


def _run_program(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    program = torch.export.load(io.BytesIO(path.read_bytes()))
    return list(tensors_in(program.module()(*inputs)))


FORMATS: dict[str, Format] = {
    "onnx": Format(_write_onnx, _run_onnx, ("onnx", "onnxscript"), "onnxruntime"),
    "torch-export": Format(_write_program, _run_program),
}
assert tuple(FORMATS) == choices.EXPORT_FORMATS
