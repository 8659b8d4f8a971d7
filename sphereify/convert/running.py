"""What a forward pass calls, seen by running it on the meta device: shapes without values, at hardly any cost.

A trace shows how modules are wired. A run shows what is called in modules that cannot be traced, and which weights are
passed to functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sphereify.errors import first_line
from sphereify.nn.calls import FUNCTIONS

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
        seen = Run(error="no pass was tried")
        for training in (False, True):
            model.train(training)
            attempt = Run()
            try:
                _run_once(model, inputs, attempt, on_shapes)
            except Exception as error:  # a forward may raise anything; it may need values, or other inputs
                errors.append(first_line(error))
                continue
            seen.error = ""
            seen.output = attempt.output if not training else seen.output
            for name in ("order", "calls", "fixed"):
                known = getattr(seen, name)
                known.extend(item for item in dict.fromkeys(getattr(attempt, name)) if item not in known)
        if not seen.error:
            return seen
    return Run(error=errors[0])


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
        sizes = [(16, 112, 112)]
    elif isinstance(own := getattr(getattr(model, "patch_embed", None), "img_size", None), tuple):
        sizes.insert(0, own)
    channels = dict.fromkeys((first.in_channels if first is not None else config[0], config[0]))
    return [(torch.empty(2, c, *size, device="meta"),) for c in channels for size in dict.fromkeys(sizes)]


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
    with torch.random.fork_rng(devices=[]), _stacked(model, stack, seen), _Watch(parameters, buffers, stack, seen):
        output = torch.func.functional_call(model, {**parameters, **buffers}, inputs)
    seen.output = tuple(output.shape) if isinstance(output, Tensor) else None


@contextmanager
def _stacked(model: nn.Module, stack: list[list[Any]], seen: Run) -> Iterator[None]:
    """Keeps `stack` at the modules whose forward is running: name, and computed weights seen so far in this pass."""
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append([name, 0])
            seen.order.append(name)

        def leave(*_: Any) -> None:
            stack.pop()

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

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            self._note(func, args, kwargs)
        result = func(*args, **kwargs)
        self._follow((args, kwargs), result)
        return result

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        function = FUNCTIONS[func]
        call = function.arguments(*args, **kwargs)
        base = call.source if id(call.source) in self.names else call.source._base
        whole = base is not None and base.numel() == call.source.numel()  # and no slice, of which there may be others
        name = self.names.get(id(base)) if whole else None
        transposed = name is not None and base is not None and call.weight.stride() != base.stride()
        owner, nth = self.stack[-1]
        self.stack[-1][1] += name is None
        self.seen.order.append(name or f"{owner}.computed")
        noted = Call(owner, function.kind, name, tuple(call.weight.shape), call.bias is not None,
                     0 if name else nth, transposed)  # fmt: skip
        learned = name is not None or id(call.source) in self.computed
        (self.seen.calls if learned else self.seen.fixed).append(noted)

    def _follow(self, arguments: Any, result: Any) -> None:
        """A result is computed from parameters if all its tensors are parameters, constants, or so computed."""
        if not isinstance(result, Tensor):
            return
        leaves = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        learned = [id(t) in self.names or id(t) in self.computed for t in leaves]
        if (
            leaves
            and any(learned)
            and all(yes or id(t) in self.constant for yes, t in zip(learned, leaves, strict=True))
        ):
            if id(result) not in self.names:
                self.computed.add(id(result))
                self.alive.append(result)
        elif all(id(t) in self.constant for t in leaves):
            self.constant.add(id(result))
            self.alive.append(result)
