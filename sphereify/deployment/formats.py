"""The formats of an exported file: for each, how to write it, and how to run it."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sphereify import choices
from sphereify.convert.arguments import ModelArguments
from sphereify.convert.model_inputs import tensors_in
from sphereify.deployment.onnx_layers import traced_for_onnx
from sphereify.errors import ExportError, invalid, refused
from sphereify.preparation import CLASSES, PREPARATION

Axes = dict[int, str]
"""The dimensions of one input that may differ from run to run, with their names."""


class Written(NamedTuple):
    """The content of a file: how often it uses each operator, and the version of ONNX's operators."""

    operators: Counter[str]
    opset: int | None = None


class Opened(NamedTuple):
    """An exported file, ready to run."""

    run: Callable[[ModelArguments], list[Tensor]]
    """The outputs of the file for these inputs."""
    metadata: dict[str, str]
    """The entries that were written with it."""
    batch: int | None
    """The only number of rows that it takes; None: any."""


class Format(Protocol):
    """A format of an exported file.

    Attributes:
        packages: the packages that write it, besides torch.
        runtime: the package that runs it.
        companions: the ends of the names of further files that may belong to the file: its name with such an end.
    """

    packages: tuple[str, ...]
    runtime: str
    companions: tuple[str, ...]

    def tracing(self, opset: int) -> AbstractContextManager[None]:
        """A context in which models are traced for this format."""

    def write(
        self,
        program: torch.export.ExportedProgram,
        path: Path,
        axes: tuple[Axes, ...],
        opset: int,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write the file with entries of text by name, and beside it what belongs to it.

        Raises:
            UsageError: an opset that does not exist.
            ExportError: the format cannot express the program.
        """

    def open(self, path: Path) -> Opened:
        """The file, on the CPU."""

    def run(self, path: Path, inputs: ModelArguments) -> list[Tensor]:
        """The outputs of the file for these inputs."""


LARGEST_ONNX = 2**31 - 2**24
"""Bytes of weights beyond which an ONNX file, which may not reach 2 GiB, has them in a second file."""


class Onnx:
    """ONNX with its standard operators, in one file; large weights lie beside it in NAME.data."""

    packages: tuple[str, ...] = ("onnx", "onnxscript")
    runtime = "onnxruntime"
    companions: tuple[str, ...] = (".data",)

    def tracing(self, opset: int) -> AbstractContextManager[None]:
        return traced_for_onnx(opset)

    def write(
        self,
        program: torch.export.ExportedProgram,
        path: Path,
        axes: tuple[Axes, ...],
        opset: int,
        metadata: Mapping[str, str],
    ) -> Written:
        import onnx

        highest = onnx.defs.onnx_opset_version()
        if opset > highest:
            raise invalid("opset", opset, f"at most {highest}, the highest that this onnx has")
        # Not optimized: onnxscript takes an ε of 1e-8 or less for 0 and leaves it out.
        converted: Any = torch.onnx.export(
            program, dynamo=True, opset_version=opset, dynamic_shapes=axes, optimize=False, verbose=False
        )
        _compute_constants(converted.model)
        nodes = converted.model.graph.all_nodes()
        operators = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in nodes)
        del operators["Constant"]
        foreign = sorted(name for name in operators if "::" in name)
        if foreign:
            raise ExportError(f"the model needs operators that are not ONNX's own: {', '.join(foreign)}")
        size = sum(value.const_value.nbytes for value in converted.model.graph.initializers.values())
        converted.model.metadata_props.update(metadata)
        converted.save(str(path), external_data=size > LARGEST_ONNX)
        return Written(operators, converted.model.opset_imports[""])

    def open(self, path: Path) -> Opened:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        slots = session.get_inputs()

        def run(inputs: ModelArguments) -> list[Tensor]:
            feed = {slot.name: one.cpu().numpy() for slot, one in zip(slots, inputs.values(), strict=True)}
            return [torch.from_numpy(output) for output in session.run(None, feed)]

        rows = slots[0].shape[0] if slots and slots[0].shape else None
        return Opened(run, dict(session.get_modelmeta().custom_metadata_map), rows if isinstance(rows, int) else None)

    def run(self, path: Path, inputs: ModelArguments) -> list[Tensor]:
        return self.open(path).run(inputs)


def _compute_constants(model: Any) -> None:
    """Compute whatever does not depend on the inputs: runtimes fuse operators whose parameters are constants."""
    from onnxscript import ir, optimizer

    common: Any = ir.passes.common
    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    _halve_gelu_last(model)


def _halve_gelu_last(model: Any) -> None:
    """Write x·(½·(1 + erf)) as ½·(x·(1 + erf)), the form of a GELU that ONNX Runtime fuses; older opsets have none."""
    for outer in model.graph:
        inner = outer.inputs[1].producer() if outer.op_type == "Mul" and outer.inputs[1] is not None else None
        if inner is None or inner.op_type != "Mul" or len(inner.outputs[0].uses()) != 1:
            continue
        above = inner.inputs[1].producer()
        erf = above.inputs[0].producer() if above is not None and above.op_type == "Add" else None
        half = inner.inputs[0].const_value
        if erf is not None and erf.op_type == "Erf" and half is not None and half.size == 1:
            x, half = outer.inputs[0], inner.inputs[0]
            inner.replace_input_with(0, x)
            outer.replace_input_with(0, half)


class TorchExport:
    """The exported program of `torch.export`, for `torch.export.load`."""

    packages: tuple[str, ...] = ()
    runtime = "torch"
    companions: tuple[str, ...] = ()

    def tracing(self, opset: int) -> AbstractContextManager[None]:
        return nullcontext()

    def write(
        self,
        program: torch.export.ExportedProgram,
        path: Path,
        axes: tuple[Axes, ...],
        opset: int,
        metadata: Mapping[str, str],
    ) -> Written:
        with path.open("wb") as file:  # a path would have to end in .pt2
            torch.export.save(program, file, extra_files=dict(metadata))
        nodes = (node for node in program.graph.nodes if node.op == "call_function")
        return Written(Counter(str(node.target) for node in nodes))

    def open(self, path: Path) -> Opened:
        metadata = dict.fromkeys(ENTRIES, "")
        with path.open("rb") as file:
            program = torch.export.load(file, extra_files=metadata)
        network = program.module()
        user_inputs = set(program.graph_signature.user_inputs)
        values = [
            node.meta.get("val")
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in user_inputs
        ]
        rows = values[0].shape[0] if values and isinstance(values[0], Tensor) and values[0].dim() else None
        texts = {name: text for name, text in metadata.items() if isinstance(text, str) and text}
        return Opened(
            lambda inputs: list(tensors_in(inputs.run(network))), texts, rows if isinstance(rows, int) else None
        )

    def run(self, path: Path, inputs: ModelArguments) -> list[Tensor]:
        return self.open(path).run(inputs)


ENTRIES = (PREPARATION, CLASSES)
"""Names of the entries that are written."""
FORMATS: dict[str, Format] = {"onnx": Onnx(), "torch-export": TorchExport()}
assert tuple(FORMATS) == choices.EXPORT_FORMATS


def check_installed(name: str) -> Format:
    """The format of that name, whose packages are installed.

    Raises:
        UsageError: a package that writes it is missing.
    """
    missing = [package for package in FORMATS[name].packages if not is_installed(package)]
    if missing:
        raise refused(
            "format",
            f"{' and '.join(missing)} must be installed to write it: pip install 'sphereify[export]'",
            value=name,
        )
    return FORMATS[name]


def is_installed(package: str) -> bool:
    """True if a package can be imported."""
    return importlib.util.find_spec(package) is not None
