"""The path of each layer's output through the original, and of the tensors that are added to it.

A layer's output is fitted as the rest of the network sees it: after a normalization, a sum and a ReLU. Hooks on modules
and a torch function mode follow it there while the passes run.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.lockstep import Pass, active_pass
from sphereify.calibration.norms import scales_filters
from sphereify.calibration.rows import rows_at
from sphereify.convert.operations import ADD, RECTIFIERS, word
from sphereify.nn.functional_calls import Arguments


@dataclass(frozen=True)
class Place:
    """The input or the output of one call of a module."""

    module: str
    call: int
    side: str
    """"in" or "out"."""


@dataclass(frozen=True)
class LayerCall:
    """The event of a pass through the converted network that is about to run a layer."""

    layer: str
    number: int
    """1 for the first call of the layer in this pass."""
    arguments: tuple[Any, ...]


@dataclass
class LayerOutput:
    """The output of an original layer, followed to the operation that uses it.

    Attributes:
        layer, call: the layer's name, and the number of its call in this pass.
        input_shape: shape of the layer's input.
        tensor: the output, or what a normalization or a sum has made of it since.
        rows: takes the sampled positions from a tensor of the output's shape, as rows.
        positions: the sampled positions; None for all.
        in_norm: True while the normalization that follows is at work on it.
        normalized: rows after that normalization.
        total: rows of the sum, if the operation that first uses the output adds it to something.
        addend: where the other summand comes from.
        rectified: True if a ReLU is what uses it.
    """

    layer: str
    call: int
    input_shape: torch.Size
    tensor: Tensor
    rows: Callable[[Tensor], Tensor]
    positions: Tensor | None
    in_norm: bool = False
    normalized: Tensor | None = None
    total: Tensor | None = None
    addend: Place | None = None
    rectified: bool = False

    def __post_init__(self) -> None:
        self.shape = self.tensor.shape
        self.raw = self.rows(self.tensor)


class TrackedPass(Pass):
    """A pass that remembers which modules it called, and which tensors went in and out of them.

    Attributes:
        module_calls, layer_calls: number of calls of each module, and of each converted layer, so far.
        outputs: outputs of layers that nothing has used yet.
    """

    def __init__(self, body: Callable[[], Any], number: int):
        super().__init__(body, number)
        self.module_calls: Counter[str] = Counter()
        self.layer_calls: Counter[str] = Counter()
        self.outputs: list[LayerOutput] = []
        self._tensors: dict[Place, weakref.ref[Tensor]] = {}
        self._places: dict[int, tuple[weakref.ref[Tensor], Place]] = {}  # by id of the tensor: its newest place

    def report(self, output: LayerOutput) -> None:
        """Pause with an output whose use has become clear."""
        self.outputs.remove(output)
        self.pause(output)

    def record(self, place: Place, tensor: Tensor) -> None:
        """Remember that a tensor was at a place. The tensor is not kept alive."""
        reference = weakref.ref(tensor)
        self._tensors[place] = reference
        self._places[id(tensor)] = (reference, place)

    def place_of(self, tensor: Tensor) -> Place | None:
        """The newest place of a tensor, if it was at any."""
        reference, place = self._places.get(id(tensor), (None, None))
        return place if reference is not None and reference() is tensor else None

    def tensor_at(self, place: Place | None) -> Tensor | None:
        """The tensor at a place, if it is still in use."""
        reference = self._tensors.get(place) if place is not None else None
        return reference() if reference is not None else None


# ------------------------------------------------------------------------------------------------- hooks on the modules


def record_places(network: nn.Module) -> Iterator[Any]:
    """Hooks that record what goes in and out of each module; yields their handles."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            current = active_pass()
            if current is not None:
                current.module_calls[name] += 1
                if args and isinstance(args[0], Tensor):
                    current.record(Place(name, current.module_calls[name], "in"), args[0])

        def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            current = active_pass()
            if current is not None and isinstance(out, Tensor):
                current.record(Place(name, current.module_calls[name], "out"), out)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def pause_before(pair: LayerPair) -> Iterator[Any]:
    """A hook that pauses a pass through the converted network before the layer; yields its handle."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current = active_pass()
        if current is not None:
            current.layer_calls[pair.name] += 1
            current.pause(LayerCall(pair.name, current.layer_calls[pair.name], (*args, *kwargs.values())))

    yield pair.layer.register_forward_pre_hook(before, with_kwargs=True)


def follow_output(pair: LayerPair, sample: Callable[[LayerPair, int, int, Tensor], Tensor | None]) -> Iterator[Any]:
    """Hooks that follow what the original layer returns, through the normalization behind it; yields their handles.

    `sample(pair, call, batch, output)` gives the positions of an output that are looked at, or None for all.
    """

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        current = active_pass()
        if current is not None:
            current.layer_calls[pair.name] += 1
            call = current.layer_calls[pair.name]
            positions = sample(pair, call, current.number, out)
            rows = functools.partial(rows_at, pair, positions=positions)
            shape = input_of((*args, *kwargs.values())).shape
            current.outputs.append(LayerOutput(pair.name, call, shape, out, rows, positions))

    yield pair.original.register_forward_hook(after, with_kwargs=True)
    if pair.norm is not None:
        yield pair.norm.register_forward_pre_hook(lambda module, args: _enter_norm(pair, args))
        yield pair.norm.register_forward_hook(lambda module, args, out: _leave_norm(pair, module, out))


def _enter_norm(pair: LayerPair, args: Any) -> None:
    current = active_pass()
    for output in current.outputs if current is not None else []:
        if output.layer == pair.name and args and args[0] is output.tensor and pair.norm is not None:
            output.in_norm = scales_filters(pair.norm, output.tensor, max(0, len(pair.decision.shape) - 2))
            if not output.in_norm:
                pair.leave_norm()


def _leave_norm(pair: LayerPair, norm: nn.Module, out: Any) -> None:
    current = active_pass()
    for output in list(current.outputs) if current is not None else []:
        if current is not None and output.in_norm and output.layer == pair.name:
            output.in_norm = False
            output.normalized = rows_at(pair, out, output.positions)
            output.tensor = out
            activation = getattr(norm, "act", None)
            if activation is not None and not isinstance(activation, nn.Identity):
                output.rectified = isinstance(activation, nn.ReLU)
                current.report(output)


def input_of(arguments: tuple[Any, ...]) -> Tensor:
    """The tensor that a layer or an `AngularCall` multiplies with its filters."""
    first: Any = arguments[0]
    return first.x if isinstance(first, Arguments) else first  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- functions on the output

_READ_NO_VALUES = {"size", "dim", "numel", "is_floating_point", "get_device", "is_contiguous", "ndimension", "getattr"}


class OutputTracker(TorchFunctionMode):
    """A mode that reports an output in a pass through the original at its first use, unless that use is an addition.

    In an addition, the sum takes the place of the output and is followed further.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        current = active_pass()
        if current is None or not current.outputs or word(func) in _READ_NO_VALUES:
            return func(*args, **kwargs)
        operands = list(_flat((*args, *kwargs.values())))
        used = [o for o in current.outputs if not o.in_norm and any(o.tensor is value for value in operands)]
        summed = []
        for output in used:
            other = _other_summand(func, args, kwargs, output)
            if other is None:
                output.rectified = word(func) in RECTIFIERS
                current.report(output)
            else:
                summed.append((output, current.place_of(other)))
        result = func(*args, **kwargs)
        for output, place in summed:
            output.tensor, output.total, output.addend = result, output.rows(result), place
        return result


def _other_summand(func: Any, args: tuple, kwargs: dict[str, Any], output: LayerOutput) -> Tensor | None:
    """The tensor of the same shape that an output is added to for the first time; None if this is no such call."""
    if word(func) not in ADD or len(args) != 2 or kwargs or output.total is not None:
        return None
    other = args[1] if args[0] is output.tensor else args[0]
    return other if isinstance(other, Tensor) and other.shape == output.shape else None


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
