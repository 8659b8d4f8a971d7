"""The wiring of one traced graph: which nodes are sites, what their calls pass, and the norm after each of them."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from sphereify.convert.operations import LEAVES_IN_PLACE, ONLY_SHAPES, PRODUCT_NAMES, SAME_VALUES
from sphereify.convert.sites import Call, is_affine_norm, is_site
from sphereify.nn.functional_calls import FUNCTIONS

SHAPE = {"size", "shape", "dim", "ndim", "device", "dtype"}
FUNCTIONAL_NORMS = {F.batch_norm: 3, F.layer_norm: 2, F.group_norm: 2}
"""Functional normalizations -> the position of the weight among their arguments."""
TURNED = {"t", "transpose", "permute", "to", "type_as", "float", "getattr"}
"""Operations after which a weight is still that weight, turned or in another dtype."""

MOVED = {"getitem", "view", "reshape", "contiguous", "bfloat16", "half", "double"}
"""Operations after which a weight is a part of it, or the same in another shape or dtype."""


class Wiring:
    """The graph of a model or of a part of it; sites are named relative to that part."""

    def __init__(self, graph: fx.Graph, root: nn.Module):
        self.graph = graph
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.parameters = dict(root.named_parameters(remove_duplicate=False))
        self.sites: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if (name := self._site_name(node)) is not None:
                self.sites[node] = name
        self.other_products = {node for node, _ in self.products()}

    def _site_name(self, node: fx.Node) -> str | None:
        if node.op == "call_module" and is_site(self.modules[str(node.target)]):
            return str(node.target)
        if not (node.op == "call_function" and node.target in FUNCTIONS) and not self._multiplies_columns(node):
            return None
        weight = self._weight(node)
        if weight is None:
            return None
        owner = str(weight.target).rpartition(".")[0]
        return owner if owner in self.modules and is_site(self.modules[owner]) else str(weight.target)

    def _multiplies_columns(self, node: fx.Node) -> bool:
        """True for `x @ weight`: the filters of such a call are the columns of its operand."""
        return node.op in ("call_function", "call_method") and self.name(node) in ("matmul", "mm", "addmm")

    def _weight(self, node: fx.Node) -> fx.Node | None:
        """The parameter that a functional convolution or linear map uses, if it is one."""
        place = 2 if self.name(node) == "addmm" else 1
        weight = node.args[place] if len(node.args) > place else node.kwargs.get("weight")
        weight = self._source(weight)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        parameter = self.parameters.get(str(weight.target))  # and no buffer
        usable = parameter is not None and (parameter.dim() == 2 or not self._multiplies_columns(node))
        return weight if usable else None

    def _source(self, node: Any) -> Any:
        """The node of a weight before it was turned or cast."""
        while isinstance(node, fx.Node) and self.name(node) in TURNED and node.op.startswith("call_"):
            node = node.args[0]
        return node

    def _is_transposed(self, node: Any) -> bool:
        """True if the operations between a matrix and its use swap rows and columns."""
        swapped = False
        while isinstance(node, fx.Node) and self.name(node) in TURNED and node.op.startswith("call_"):
            name = self.name(node)
            rest: list[Any] = [a for arg in node.args[1:] for a in (arg if isinstance(arg, tuple) else (arg,))]
            turns = (
                name == "t"
                or (name == "transpose" and {a % 2 for a in rest} == {0, 1})
                or (name == "permute" and [a % 2 for a in rest] == [1, 0])
                or (name == "getattr" and rest[0] in ("T", "mT"))
            )
            swapped = swapped != turns
            node = node.args[0]
        return swapped

    def call(self, node: fx.Node) -> Call:
        """The call that a functional site makes; the owner is left empty for the caller to fill in."""
        weight = self._weight(node)
        assert weight is not None  # only such nodes are sites
        parameter = self.parameters[str(weight.target)]
        is_addmm = self.name(node) == "addmm"
        place = 0 if is_addmm else 2
        bias = node.args[place] if len(node.args) > place else node.kwargs.get("bias")
        passed = node.args[2 if is_addmm else 1] if len(node.args) > 1 else node.kwargs.get("weight")
        transposed = parameter.dim() == 2 and self._multiplies_columns(node) != self._is_transposed(passed)
        shape = tuple(reversed(parameter.shape)) if transposed else tuple(parameter.shape)
        kind = FUNCTIONS[node.target].kind if node.target in FUNCTIONS else "linear"
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        groups = groups if isinstance(groups, int) and kind != "linear" else 1
        return Call("", kind, str(weight.target), shape, bias is not None, groups=groups, transposed=transposed)

    def products(self) -> Iterator[tuple[fx.Node, str]]:
        """Other products with a parameter, with its name; none of them can be made angular."""
        for node in self.graph.nodes:
            multiplies = node.op in ("call_function", "call_method") and self.name(node) in PRODUCT_NAMES
            for source in node.all_input_nodes if multiplies and node not in self.sites else ():
                origin = self._source(source)
                while isinstance(origin, fx.Node) and self.name(origin) in MOVED:
                    origin = self._source(origin.args[0])
                if isinstance(origin, fx.Node) and origin.op == "get_attr" and str(origin.target) in self.parameters:
                    yield node, str(origin.target)

    def name(self, node: fx.Node) -> str:
        """The operation of a node, in one lower-case word."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__.lower()
        if node.op == "call_function":
            return getattr(node.target, "__name__", str(node.target)).lower()
        return str(node.target)

    def moves(self, node: fx.Node) -> bool:
        return node.op.startswith("call_") and self.name(node) in SAME_VALUES

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a node takes."""
        return [source for source in node.all_input_nodes if not self.is_shape(source)]

    def reads_features(self, node: fx.Node) -> bool:
        """True for a site, a normalization, or a leaf with weights of its own: it makes new features of its input."""
        if node in self.sites or node in self.other_products:
            return True
        if node.op == "call_function":
            return self.name(node).endswith("_norm")
        return node.op == "call_module" and ("norm" in self.name(node) or self.is_opaque(node))

    def is_opaque(self, node: fx.Node) -> bool:
        """True for a leaf of the graph that is no site and holds weights, so that what happens inside is not seen."""
        if node.op != "call_module" or node in self.sites:
            return False
        module = self.modules[str(node.target)]
        return not is_affine_norm(module) and any(parameter.dim() > 1 for parameter in module.parameters())

    def filters(self, name: str) -> int | None:
        """The number of channels of a site's product, by the site's name."""
        weight: Any = getattr(self.modules.get(name), "weight", self.parameters.get(name))
        if weight is None:
            return None
        return int(weight.shape[1 if isinstance(self.modules.get(name), nn.Embedding) else 0])

    def is_shape(self, node: fx.Node) -> bool:
        """True if a node reads no values, as `x.shape` and `x.size(0)`."""
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in SHAPE
        of_method = SHAPE if node.op == "call_method" else set()
        return node.op.startswith("call_") and self.name(node) in ONLY_SHAPES | of_method

    def norm_after(self, site: fx.Node) -> str | None:
        """The affine normalization that is the only reader of this site's output."""
        node = site
        while True:
            readers = [user for user in node.users if not self.is_shape(user)]
            if len(readers) != 1:
                return None
            node = readers[0]
            if node.op == "call_module" and is_affine_norm(self.modules[str(node.target)]):
                return str(node.target)
            if node.op == "call_function" and node.target in FUNCTIONAL_NORMS:
                place = FUNCTIONAL_NORMS[node.target]
                weight = node.args[place] if len(node.args) > place else node.kwargs.get("weight")
                return str(node) if weight is not None else None
            if not self.moves(node):
                return None

    def reaches(self, site: fx.Node, norm: str) -> bool:
        """True if each channel of that normalization is a filter of this site: nothing in between moves them."""
        node = site
        while str(node.target) != norm and str(node) != norm:
            node = next(user for user in node.users if not self.is_shape(user))
            if str(node.target) != norm and str(node) != norm and self.name(node) not in LEAVES_IN_PLACE:
                return False
        return True

    def reads_input(self, site: fx.Node) -> bool:
        """True if nothing but moves lies between an input of the model and this site."""
        node = site.all_input_nodes[0] if site.all_input_nodes else site
        while self.moves(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node.op == "placeholder"

    def is_pointwise(self, node: fx.Node) -> bool:
        """True for a convolution with a window of one position, which a linear map is not."""
        if node.op == "call_module":
            kernel = getattr(self.modules[str(node.target)], "kernel_size", ())
        else:
            weight = self._weight(node)
            parameter = self.parameters.get(str(weight.target)) if weight is not None else None
            kernel = tuple(parameter.shape[2:]) if parameter is not None else ()
        return len(kernel) > 0 and all(k == 1 for k in kernel)
