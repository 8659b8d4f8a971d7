"""Watching a forward pass: each product with a parameter is noted, with the module whose forward makes it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sphereify.convert.causality import CausalityWitness
from sphereify.convert.channels import ChannelWitness
from sphereify.convert.model_inputs import tensors_in
from sphereify.convert.multiplied import multiplied
from sphereify.convert.names import is_within
from sphereify.convert.operations import CASTS, GROUPED_PRODUCTS, PRODUCT_NAMES, SAME_VALUES, SELECTS, word
from sphereify.convert.provenance import NO_PRODUCT, Product, Provenance
from sphereify.convert.sites import Call, is_affine_norm
from sphereify.nn.attention import projections
from sphereify.nn.functional_calls import FUNCTIONS

PRODUCT_FUNCTIONS = {
    torch.linalg.multi_dot, torch.chain_matmul, torch.sparse.mm, torch.addmv, Tensor.addmv, Tensor.addmm_,
    torch.addbmm, Tensor.addbmm, torch.convolution, torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.einsum, torch.tensordot, torch.inner, Tensor.inner, torch.mv,
    Tensor.mv,
}  # fmt: skip
"""Functions that multiply and whose calls are no linear map of rows, or cannot be seen to be one."""

NO_READING = {"getattr", "size", "dim", "numel", "is_complex", "is_floating_point", "get_device", "data_ptr"}
"""Functions, by name, that are called with a tensor and read nothing of its values, such as its shape or dtype."""

OF_VALUES: dict[str, Callable[..., Tensor]] = {
    "nms": lambda boxes, *_, **__: torch.arange(len(boxes), device=boxes.device),
    "unique": lambda x, *_, **__: x.flatten()[:1],
}
"""Functions, by name, whose result has a size that depends on values, each with some result of the right kind."""


@dataclass
class Sightings:
    """The modules and products that were seen in one forward pass, in order and with repetitions."""

    order: list[str] = field(default_factory=list)
    """Modules whose forward was entered, and weights that were multiplied."""
    calls: list[Call] = field(default_factory=list)
    """Functional calls with a learned weight."""
    fixed: list[Call] = field(default_factory=list)
    """Functional calls with a weight that is no parameter's: a buffer, or computed from activations."""
    attention: list[Call] = field(default_factory=list)
    """Projections by whole parameters that `F.multi_head_attention_forward` makes."""
    readers: dict[str, str] = field(default_factory=dict)
    """Parameter -> the first function that was called with it."""
    finished: set[str] = field(default_factory=set)
    """Modules whose forward came to its end."""
    elements: Counter[str] = field(default_factory=Counter)
    """Weight -> elements of the inputs and outputs of its convolutions and linear maps."""
    multiplications: Counter[str] = field(default_factory=Counter)
    """Weight, or innermost module where none is known -> multiplications."""


class Watch(TorchFunctionMode):
    """A mode that notes functional convolutions and linear maps, and follows what is computed from parameters alone."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        aliases: dict[str, list[str]],
        frozen: frozenset[str] = frozenset(),
    ):
        """Watch a pass with these tensors.

        Args:
            parameters: tensors in place of the parameters, by the first name of each.
            buffers: tensors in place of the buffers.
            aliases: all names of each parameter, by the first one.
            frozen: parameters, by all their names, that require no gradient.
        """
        super().__init__()
        self.sightings = Sightings()
        self.provenance = Provenance(frozen)
        self.aliases = aliases
        self.causality = CausalityWitness()
        self.channels = ChannelWitness()
        self.depth = 0
        """Number of Python functions of torch that are running."""
        self.weight = ""
        """Name of the weight whose product is running; empty where it is not known."""
        self.stack: list[list[Any]] = [["", 0]]
        """Modules whose forward is running: name, and number of computed weights seen so far in this forward."""
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.dimensions = {name: p.dim() for name, p in parameters.items()}
        self.by_storage = {p.untyped_storage()._cdata: name for name, p in parameters.items()}
        self.constant = {id(tensor) for tensor in buffers.values()}
        self.slices: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        """Offset and shape of each slice of a parameter that was a weight, by the name of the parameter."""
        self.computed: set[int] = set()
        """Tensors, by id, that are computed from parameters and constants alone."""
        self.sources = WeakIdKeyDictionary()
        """Tensor that holds values of one parameter alone, moved, cast or selected -> the name of the parameter."""
        self.alive: list[Any] = []  # an id is only good while its tensor lives
        self.own_functions = _own_functions()

    @contextmanager
    def entering(self, model: nn.Module) -> Iterator[None]:
        """Note which modules of `model` are entered and left."""
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self.stack.append([name, 0])
                self.sightings.order.append(name)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self.sightings.finished.add(self.stack.pop()[0])
                if is_affine_norm(module):
                    self.provenance.note_norm(args, output)

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        weight, product = self._note(func, args, kwargs)
        answer = OF_VALUES.get(getattr(func, "__name__", ""))
        if answer is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            return answer(*args, **kwargs)
        is_function = not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        self.depth += is_function
        self.weight = weight
        try:
            result = _on_one_device(func, args, kwargs)
        finally:
            self.depth -= is_function
            self.weight = ""
        operands = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._note_readers(func, operands)
        self._note_source(func, operands, result)
        self._follow(func, operands, result)
        learned = (t for t in operands if t.numel() > 1 and (id(t) in self.names or id(t) in self.computed))
        scale = next(learned, None)
        self.provenance.note(func, operands, result, product, scales=scale is not None)
        self.channels.note(func, args, kwargs, operands, result, scale=scale)
        self.causality.note_result(func, args, kwargs, result)
        function = FUNCTIONS.get(func) if weight else None
        call = function.read(args, kwargs) if function is not None else None
        if function is not None and call is not None:
            self.sightings.elements[weight] += call.x.numel() + sum(t.numel() for t in tensors_in(result))
            self.channels.note_product(weight, len(call.weight), result, call.weight.dim() - 2)
            if function.kind.startswith("conv"):
                self.causality.note_convolution(weight, call, result)
        return result

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[str, Product]:
        """Note a convolution, a linear map or another product with a parameter.

        Returns:
            The name of its weight, learned or not, and the product as it concerns the provenance of outputs.
        """
        if func is F.multi_head_attention_forward:
            self._note_attention(args, kwargs)
            return "", Product(reads=True)
        function = FUNCTIONS.get(func)
        call = function.read(args, kwargs) if function is not None else None
        multiplies = function is not None and function.any_product
        if function is None or call is None or (multiplies and not self._is_matrix(call.source)):
            if word(func) in GROUPED_PRODUCTS:
                return "", self._note_product(args, kwargs, "experts")
            return "", self._note_product(args, kwargs) if func in PRODUCT_FUNCTIONS else NO_PRODUCT
        if id(call.x) in self.names or id(call.x) in self.computed or id(call.x) in self.constant:
            return "", NO_PRODUCT  # of parameters alone: a weight is computed here
        base = call.source if id(call.source) in self.names else call.source._base
        whole = base is not None and base.numel() == call.source.numel()  # and no slice, of which there may be others
        owner, nth = self.stack[-1]
        name = self._name_for(owner, self.names.get(id(base))) if whole else None
        if self._in_own_function():
            return "", self._note_product(args, kwargs, "own-backward")
        part = "" if name is not None or base is None else self._part(base, call.source)
        columns = name is not None and base is not None and function.columns != _is_turned(call.source, base)
        self.stack[-1][1] += name is None
        noted = Call(
            owner,
            function.kind,
            name,
            tuple(call.weight.shape),
            has_bias=call.bias is not None,
            nth=0 if name else nth,
            groups=call.geometry[3] if call.geometry else 1,
            transposed=columns,
            part=part,
        )
        learned = name is not None or id(call.source) in self.computed
        if not learned and call.source in self.sources:
            return "", self._note_product(args, kwargs, "experts")
        (self.sightings.calls if learned else self.sightings.fixed).append(noted)
        weight = name or part or f"{owner}.computed"
        self.sightings.order.append(weight)
        return weight, Product(weight, noted.shape[0], reads=True) if learned else NO_PRODUCT

    def _part(self, base: Tensor, view: Tensor) -> str:
        """The name of a slice of a parameter, by number in the order in which they are met; empty for other views.

        A layer that takes a slice of its own weight is known by its own name.
        """
        name = self.names.get(id(base), "")
        owner = self.stack[-1][0]
        if not name or view.numel() == base.numel() or name == f"{owner}.weight":
            return ""
        slices = self.slices.setdefault(name, [])
        place = (int(view.storage_offset()), tuple(view.shape))
        if place not in slices:
            slices.append(place)
        return f"{name}.slice{slices.index(place)}"

    def _note_attention(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the projections of queries, keys, values and outputs."""
        for weight, has_bias in projections(args, kwargs):
            parameter = self.names.get(id(weight))
            if parameter is not None:
                call = Call(self.stack[-1][0], "linear", parameter, tuple(weight.shape), has_bias)
                self.sightings.attention.append(call)
                self.sightings.order.append(parameter)

    def _note_readers(self, func: Any, operands: list[Tensor]) -> None:
        """Note which parameters a function is called with, in whatever role."""
        name = word(func)
        if name not in NO_READING:
            for tensor in operands:
                parameter = self._parameter(tensor)
                if parameter is not None:
                    self.sightings.readers.setdefault(parameter, name)

    def _name_for(self, owner: str, parameter: str | None) -> str | None:
        """The name of a parameter as the module that uses it has it: an output layer may be tied to an embedding."""
        names = self.aliases.get(parameter or "", [])
        own = (name for name in names if name.rpartition(".")[0] == owner)
        inside = (name for name in names if is_within(name, owner))
        return next(own, next(inside, parameter))

    def _note_product(self, args: tuple, kwargs: dict[str, Any], kind: str = "product") -> Product:
        """Note another product with a parameter: no site that can be made angular, but the plan accounts for it."""
        operands = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if all(id(t) in self.names or id(t) in self.computed or id(t) in self.constant for t in operands):
            return NO_PRODUCT
        for tensor in operands:
            name = self._parameter(tensor) or self.sources.get(tensor)
            if tensor.dim() >= 2 and (name is not None or id(tensor) in self.computed):
                selected = name is not None and id(tensor) not in self.computed and id(tensor) not in self.names
                is_own = selected and self._parameter(tensor) is None
                self._add_product("experts" if is_own else kind, name, tensor)
                return Product(reads=True)
        return NO_PRODUCT

    def note_beneath(self, args: tuple) -> None:
        """Note a product with a parameter that was made where no Python function stands between."""
        for tensor in args:
            name = self.by_storage.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if name is not None and tensor.dim() >= 2:
                self._add_product("beneath", name, tensor)

    def note_multiplications(self, operands: tuple, count: int) -> None:
        """Note what an operation multiplies: for the weight of the call that is running, or for one among the operands,
        or for the innermost module."""
        matrices = (t for t in operands if isinstance(t, Tensor) and t.dim() >= 2)
        stored = (self.by_storage.get(matrix.untyped_storage()._cdata) for matrix in matrices)
        weight = self.weight or next(filter(None, stored), self.stack[-1][0])
        self.sightings.multiplications[weight] += count

    def _add_product(self, kind: str, name: str | None, tensor: Tensor) -> None:
        owner = self.stack[-1][0]
        self.sightings.order.append(name or f"{owner}.computed")
        self.sightings.calls.append(Call(owner, kind, name, tuple(tensor.shape), has_bias=False))

    def _note_source(self, func: Any, operands: list[Tensor], result: Any) -> None:
        """Note results that hold values of one parameter alone; of a table they are features, of a stack weights."""
        name = word(func)
        source = (self._parameter(operands[0]) or self.sources.get(operands[0])) if operands else None
        if source is None or name not in SAME_VALUES | SELECTS | CASTS:
            return
        of_stack = len(operands) == 1 or self.dimensions[source] > 2
        for tensor in tensors_in(result) if of_stack else ():
            self.sources[tensor] = source

    def _parameter(self, tensor: Tensor) -> str | None:
        """The name of the parameter that a tensor is, or is a view of."""
        return self.names.get(id(tensor)) or (self.names.get(id(tensor._base)) if tensor._base is not None else None)

    def _is_matrix(self, tensor: Tensor) -> bool:
        """True if this is a learned matrix, as a whole."""
        base = tensor if id(tensor) in self.names else tensor._base
        whole = base is not None and id(base) in self.names and base.numel() == tensor.numel() and base.dim() == 2
        return tensor.dim() == 2 and whole

    def _in_own_function(self) -> bool:
        """True if an autograd.Function of the user's makes this call, within the innermost module."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
            if frame.f_code in self.own_functions:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def _follow(self, func: Any, operands: list[Tensor], result: Any) -> None:
        """Note a result as computed from parameters if all its operands are parameters, constants, or so computed."""
        results = operands[:1] if word(func) == "setitem" else [*tensors_in(result)]
        is_learned = [id(t) in self.names or id(t) in self.computed for t in operands]
        has_no_features = all(yes or id(t) in self.constant for yes, t in zip(is_learned, operands, strict=True))
        for tensor in results:
            if not has_no_features:
                for written in (tensor, tensor._base):  # features may be written into what was a constant
                    self.constant.discard(id(written))
                    self.computed.discard(id(written))
            elif id(tensor) not in self.names:
                (self.computed if any(is_learned) else self.constant).add(id(tensor))
                self.alive.append(tensor)


class WatchBeneath(TorchDispatchMode):
    """A mode that counts multiplications, and notes products that no Python function makes: those of `torch.ops` and
    in scripted functions.

    What an operation of a library computes is not known: one that takes a matrix of parameters is taken for a product.
    """

    OPERATIONS = PRODUCT_NAMES | {"addmm", "addmv", "linear", "convolution"}
    OF_TORCH = ("aten", "prim", "prims", "c10d", "profiler")

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        is_product = func.overloadpacket.__name__ in self.OPERATIONS or func.namespace not in self.OF_TORCH
        if not self.watch.depth and is_product:
            self.watch.note_beneath(args)
        result = func(*args, **(kwargs or {}))
        if count := multiplied(func, args, kwargs or {}, result):
            self.watch.note_multiplications(args, count)
        return result


def _on_one_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function; if it fails on tensors with and without values together, once more without any values.

    A module may hold tensors that are neither parameters nor buffers: constants, or what an earlier pass has left.
    """
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({leaf.is_meta for leaf in leaves}) < 2:
            raise
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _is_turned(view: Tensor, base: Tensor) -> bool:
    """True if a view of a matrix, or the matrix itself, has its rows and columns swapped."""
    if view is base or view.dim() != 2:
        return False
    return view.shape != base.shape or (view.shape[0] > 1 and view.shape[1] > 1 and view.stride() != base.stride())


def _own_functions() -> set[CodeType]:
    """The code of `forward` of each autograd.Function of the user's, which has a backward of its own."""
    codes, waiting = set(), [torch.autograd.Function]
    while waiting:
        function = waiting.pop()
        waiting += function.__subclasses__()
        forward = getattr(function.forward, "__code__", None)
        if forward is not None and not function.__module__.startswith(("torch.", "sphereify.")):
            codes.add(forward)
    return codes
