"""What a forward pass calls, seen by running it on the meta device: shapes without values, at hardly any cost.

A trace shows how modules are wired. A run shows what is called in modules that cannot be traced, and which weights are
passed to functions.
"""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sphereify.convert.operations import word
from sphereify.convert.provenance import End, Flow, tensors_in
from sphereify.errors import first_line
from sphereify.nn.functional_calls import FUNCTIONS

Inputs = Tensor | tuple[Any, ...] | None


@dataclass(frozen=True)
class Call:
    """A convolution or linear map that a forward calls as a function."""

    owner: str
    """The innermost module whose forward makes the call; "" is the model."""
    kind: str
    parameter: str | None
    """Qualified name of the weight; None where it is computed from parameters."""
    shape: tuple[int, ...]
    """Of the weight, filters first."""
    has_bias: bool
    nth: int = 0
    """Of the calls with a computed weight that one pass through the owner makes, which."""
    groups: int = 1
    """Of a convolution."""
    transposed: bool = False
    """Whether the filters are the columns of the parameter, as in `torch.addmm(bias, x, weight)`."""


@dataclass
class Run:
    """What was seen in a training and an evaluation pass."""

    order: list[str] = field(default_factory=list)
    """Modules, and weights of functional calls, in the order in which they were first called or passed."""
    calls: list[Call] = field(default_factory=list)
    fixed: list[Call] = field(default_factory=list)
    """Calls with a weight that is no parameter's: buffers, or computed from activations."""
    output: tuple[int, ...] | None = None
    """Shape of what the model returns in evaluation, if that is one tensor."""
    ends: list[End] = field(default_factory=list)
    """The different outputs in evaluation that end in sites."""
    outputs: int = 0
    """How many tensors the model returns in evaluation."""
    not_in_both: set[Call] = field(default_factory=set)
    """Calls that one of the two passes makes and the other does not, though it runs the owner."""
    direct: frozenset[str] = frozenset()
    """Weights whose products are outputs as they are, with nothing in between; in training, if that pass succeeded."""
    by_values: bool = False
    """Whether values decide what is called, so that another input may call what these did not."""
    error: str = ""
    """Why no pass succeeded; empty if one did."""


def run(model: nn.Module, example_inputs: Inputs = None, *, on_shapes: bool = True) -> Run:
    """Run a copy of a model, in training and in evaluation. Its mode changes, nothing else.

    Without `example_inputs`, two images of the size in `pretrained_cfg` are assumed, else of 224×224 pixels. With
    `on_shapes` it runs on the meta device, else for real, on the device of its parameters.
    """
    candidates = [_as_tuple(example_inputs)] if example_inputs is not None else assumed_inputs(model)
    errors = []
    for inputs in candidates:
        seen, passes = Run(error="no pass was tried"), []
        for training in (False, True):
            model.train(training)
            attempt = Run()
            try:
                with unchanged(model), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _run_once(model, inputs, attempt, on_shapes)
            except Exception as error:  # a forward may raise anything; it may need values, or other inputs
                errors.append(first_line(error))
                continue
            if training or seen.error:
                seen.direct = attempt.direct
            seen.error = ""
            if not training:
                seen.output, seen.ends, seen.outputs = attempt.output, attempt.ends, attempt.outputs
            for name in ("order", "calls", "fixed"):
                known = getattr(seen, name)
                known.extend(item for item in dict.fromkeys(getattr(attempt, name)) if item not in known)
            passes.append(attempt)
        if not seen.error:
            seen.not_in_both = _not_in_both(passes)
            return seen
    return Run(error=errors[0])


def _not_in_both(passes: list[Run]) -> set[Call]:
    """A weight may be computed in training only, as DropConnect does it; its call would be angular in one mode."""
    if len(passes) < 2:
        return set()
    first, second = passes
    return {
        call
        for one, other in ((first, second), (second, first))
        for call in one.calls
        if call not in other.calls and (call.owner in other.order or not call.owner)
    }


def assumed_inputs(model: nn.Module) -> list[tuple[Any, ...]]:
    """Two images, or sequences, or rows, such as a model that says no more may take; the likeliest first."""
    config = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    first: Any = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        return [(torch.empty(2, first.in_features, device="meta"),)]
    sizes = [tuple(config[1:])]
    if isinstance(first, nn.Conv1d):
        sizes = [(config[-1],)]
    elif isinstance(first, nn.Conv3d):
        sizes = [(16, 112, 112), (16, 224, 224)]
    elif isinstance(own := getattr(getattr(model, "patch_embed", None), "img_size", None), tuple):
        sizes.insert(0, own)
    channels = dict.fromkeys((first.in_channels if first is not None else config[0], config[0]))
    images = [torch.empty(2, c, *size, device="meta") for c in channels for size in dict.fromkeys(sizes)]
    return [(image,) * _required_arguments(model) for image in images]


def _required_arguments(model: nn.Module) -> int:
    """How many inputs a forward asks for: optical flow takes a pair of images."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What modules keep of a pass (masks, caches, proxies of a trace) is forgotten after it."""
    states = [(module, {key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
                        for key, value in vars(module).items()}) for module in model.modules()]  # fmt: skip
    try:
        yield
    finally:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@torch.no_grad()
def _run_once(model: nn.Module, inputs: tuple[Any, ...], seen: Run, on_shapes: bool) -> None:
    first = next(model.parameters(), None)
    device = torch.device("meta") if on_shapes or first is None else first.device

    def place(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" and device.type != "meta":
            return torch.randn(tensor.shape, dtype=tensor.dtype, device=device)
        return tensor.to(device)

    with torch.random.fork_rng(devices=[]):
        inputs = torch.utils._pytree.tree_map_only(Tensor, place, inputs)
    parameters = {name: p.detach().to(device) for name, p in model.named_parameters()}
    buffers = {name: b.clone() if b.device == device else b.to(device) for name, b in model.named_buffers()}
    stack: list[list[Any]] = [["", 0]]
    watch = _Watch(parameters, buffers, stack, seen)
    # On shapes alone, a size that depends on values is taken as large as it can be.
    largest = shapes.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    output = None
    left: set[str] = set()
    try:
        with (
            torch.random.fork_rng(devices=[]), largest, _stacked(model, stack, seen, left), _Beneath(watch), watch,
        ):  # fmt: skip
            output = torch.func.functional_call(model, {**parameters, **buffers}, inputs)
    except Exception:
        if not (on_shapes and _all_left(model, left)):
            raise
        # Every layer has run: what failed is the reading of the results, boxes drawn from scores for one.
        watch.flow.cut = watch.flow.made
    seen.output = tuple(output.shape) if isinstance(output, Tensor) else None
    seen.ends, seen.direct = watch.flow.ends(output), watch.flow.direct(output)
    seen.outputs = sum(1 for _ in tensors_in(output))


def _all_left(model: nn.Module, left: set[str]) -> bool:
    """Whether every module with parameters has been run to its end."""
    layers = (n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    return all(name in left for name in layers)


def _is_turned(view: Tensor, base: Tensor) -> bool:
    """Whether a view of a matrix, or the matrix itself, has its rows and columns swapped."""
    if view is base or view.dim() != 2:
        return False
    return view.shape != base.shape or (view.shape[0] > 1 and view.shape[1] > 1 and view.stride() != base.stride())


PRODUCTS = {
    torch.linalg.multi_dot, torch.chain_matmul, torch.sparse.mm, torch.addmv, Tensor.addmv, Tensor.addmm_,
    torch.addbmm, Tensor.addbmm, torch.convolution, torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.einsum, torch.tensordot, torch.inner, Tensor.inner, torch.mv,
    Tensor.mv,
}  # fmt: skip
"""Products that are no linear map of rows, or not seen to be one."""

VALUES_WANTED: dict[str, Callable[..., Tensor]] = {
    "nms": lambda boxes, *_, **__: torch.arange(len(boxes), device=boxes.device),
    "unique": lambda x, *_, **__: x.flatten()[:1],
}
"""Functions, by name, whose result has a size that depends on values, with some result of the right kind."""


def _own_functions() -> set[CodeType]:
    """The code of `forward` of each autograd.Function of the user's, which has a backward of its own."""
    found, waiting = set(), [torch.autograd.Function]
    while waiting:
        function = waiting.pop()
        waiting += function.__subclasses__()
        forward = getattr(function.forward, "__code__", None)
        if forward is not None and not function.__module__.startswith(("torch.", "sphereify.")):
            found.add(forward)
    return found


class _Beneath(TorchDispatchMode):
    """Sees products that no Python function makes: those of `torch.ops` and of scripted functions."""

    OPERATIONS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "convolution")

    def __init__(self, watch: "_Watch"):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self.watch.depth and func.overloadpacket.__name__ in self.OPERATIONS:
            self.watch.note_beneath(args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _stacked(model: nn.Module, stack: list[list[Any]], seen: Run, left: set[str]) -> Iterator[None]:
    """Keeps `stack` at the modules whose forward is running: name, and computed weights seen so far in this pass.

    Those that have come to their end are in `left`.
    """
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append([name, 0])
            seen.order.append(name)

        def leave(*_: Any) -> None:
            left.add(stack.pop()[0])

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Notes each functional convolution and linear map, and follows what is computed from parameters alone."""

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], stack: list[list[Any]], seen: Run):
        super().__init__()
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.constant = {id(tensor) for tensor in buffers.values()}
        self.computed: set[int] = set()
        self.alive: list[Any] = []  # an id is only good while its tensor lives
        self.stack = stack
        self.seen = seen
        self.flow = Flow()
        self.depth = 0
        """How many Python functions of torch are being run."""
        self.own_functions = _own_functions()
        self.by_storage = {p.untyped_storage()._cdata: name for name, p in parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = self._note(func, args, kwargs)
        answer = VALUES_WANTED.get(getattr(func, "__name__", ""))
        if answer is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            return answer(*args, **kwargs)
        is_function = not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        self.depth += is_function
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= is_function
        leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._follow(func, leaves, result)
        self.flow.note(func, leaves, result, name)
        return result

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> str:
        """Note a call of a convolution, a linear map, or another product with a parameter, and return its name."""
        function = FUNCTIONS.get(func)
        call = function.read(args, kwargs) if function is not None else None
        multiplies = function is not None and function.any_product
        if function is None or call is None or (multiplies and not self._is_matrix(call.source)):
            return self._note_product(args, kwargs) if func in PRODUCTS else ""
        if id(call.x) in self.names or id(call.x) in self.computed or id(call.x) in self.constant:
            return ""  # of parameters alone: a weight is computed here
        base = call.source if id(call.source) in self.names else call.source._base
        whole = base is not None and base.numel() == call.source.numel()  # and no slice, of which there may be others
        name = self.names.get(id(base)) if whole else None
        if self._in_own_function():
            return self._note_product(args, kwargs, "own-backward")
        columns = name is not None and base is not None and function.columns != _is_turned(call.source, base)
        owner, nth = self.stack[-1]
        self.stack[-1][1] += name is None
        self.seen.order.append(name or f"{owner}.computed")
        groups = call.geometry[3] if call.geometry else 1
        noted = Call(owner, function.kind, name, tuple(call.weight.shape), call.bias is not None,
                     0 if name else nth, groups, columns)  # fmt: skip
        learned = name is not None or id(call.source) in self.computed
        (self.seen.calls if learned else self.seen.fixed).append(noted)
        return self.seen.order[-1]

    def _parameter(self, tensor: Any) -> str | None:
        """The name of the parameter that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor):
            return None
        return self.names.get(id(tensor)) or (self.names.get(id(tensor._base)) if tensor._base is not None else None)

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether this is a learned matrix, as a whole."""
        base = tensor if id(tensor) in self.names else tensor._base
        whole = base is not None and id(base) in self.names and base.numel() == tensor.numel() and base.dim() == 2
        return tensor.dim() == 2 and whole

    def _in_own_function(self) -> bool:
        """Whether an autograd.Function of the user's makes this call, within the innermost module."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
            if frame.f_code in self.own_functions:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def note_beneath(self, args: tuple) -> None:
        """A product was made where no Python function stands between."""
        for tensor in args:
            name = self.by_storage.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if name is not None and tensor.dim() >= 2:
                self.seen.order.append(name)
                self.seen.calls.append(Call(self.stack[-1][0], "beneath", name, tuple(tensor.shape), False))

    def _note_product(self, args: tuple, kwargs: dict[str, Any], kind: str = "product") -> str:
        """Other products with a parameter are no sites that can be made angular; they are told."""
        operands = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if all(id(t) in self.names or id(t) in self.computed or id(t) in self.constant for t in operands):
            return ""
        for tensor in operands:
            name = self._parameter(tensor)
            if tensor.dim() >= 2 and (name is not None or id(tensor) in self.computed):
                self.seen.order.append(name or f"{self.stack[-1][0]}.computed")
                self.seen.calls.append(Call(self.stack[-1][0], kind, name, tuple(tensor.shape), False))
                return ""
        return ""

    def _follow(self, func: Any, leaves: list[Tensor], result: Any) -> None:
        """A result is computed from parameters if all its tensors are parameters, constants, or so computed."""
        results = leaves[:1] if word(func) == "setitem" else [*tensors_in(result)]
        is_learned = [id(t) in self.names or id(t) in self.computed for t in leaves]
        known = all(yes or id(t) in self.constant for yes, t in zip(is_learned, leaves, strict=True))
        for made in results:
            if not known:
                for written in (made, made._base):  # features may be written into what was a constant
                    self.constant.discard(id(written))
                    self.computed.discard(id(written))
            elif id(made) not in self.names:
                (self.computed if any(is_learned) else self.constant).add(id(made))
                self.alive.append(made)
