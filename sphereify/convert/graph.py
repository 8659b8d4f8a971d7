"""Where a model's convolutions and linear maps are, and what part each plays.

The modules say what exists, a trace says how they are wired. The trace is torchvision's node-path tracer with timm's
registries of untraceable modules. A module whose forward cannot be followed (control flow on values) becomes a leaf
and is traced by itself; where even that fails, its sites get their roles from names and shapes.
"""

import copy
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from sphereify.nn import AngularHead

Role = Literal["input", "hidden", "shortcut", "classifier", "auxiliary"]

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.ConvTranspose1d: "conv-transpose1d",
    nn.ConvTranspose2d: "conv-transpose2d",
    nn.ConvTranspose3d: "conv-transpose3d",
    AngularHead: "linear",
}
"""What counts as a site, subclasses included."""

# Modules that read the weights of their children without calling them.
READS_RAW = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Site:
    """One convolution or linear map of a model."""

    name: str
    """Qualified name; the first, where a module is shared."""
    kind: str
    module: nn.Module = field(repr=False)
    aliases: tuple[str, ...] = ()
    """The other names of a shared module."""
    role: Role = "hidden"
    norm: str | None = None
    """The normalization with an affine part that directly follows, by name."""
    called: bool | None = None
    """Whether the traced forward calls it; None where no trace reaches."""
    read_by: str | None = None
    """The module that uses this site's weight without calling the site."""
    heads: int = 0
    """For a classifier: how many separate outputs of the model end in a site."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class ModelGraph:
    """The sites of a model, in the order in which they run where that is known."""

    sites: tuple[Site, ...]
    untraced: dict[str, str]
    """Modules whose forward could not be followed, with the reason; "" is the model itself."""


Inputs = torch.Tensor | tuple[Any, ...] | None


def trace(model: nn.Module, example_inputs: Inputs = None) -> ModelGraph:
    """The sites of `model` with their roles. The model is not changed; it may be on the meta device.

    Where no trace reaches, the model is run on the meta device (shapes without values) with `example_inputs`, or with
    an image of the size that its `pretrained_cfg` names, to see which sites are called.
    """
    skeleton = _skeleton(model)
    facts = _Facts()
    if skeleton is not None:
        _collect(skeleton.eval(), "", facts, is_root=True)
        if set(_site_modules(model)) - set(facts.order) - _inside(facts.untraced, model):
            # Auxiliary classifiers run in training only.
            training = _Facts()
            _collect(skeleton.train(), "", training, is_root=True)
            facts.add_training(training)
    else:
        facts.untraced[""] = "it cannot be copied"
    named = _site_modules(model)
    sites = [_site(name, aliases, module, model, facts) for name, (module, aliases) in named.items()]
    if skeleton is not None and any(site.called is None for site in sites):
        seen = called_sites(skeleton, example_inputs)
        sites = [_seen(site, seen) for site in sites] if seen else sites
    if "" in facts.untraced:
        sites = _guess_classifier(model, sites)
    place = {name: i for i, name in enumerate(facts.order)}
    sites.sort(key=lambda site: min(place.get(name, len(place)) for name in site.names))
    return ModelGraph(tuple(sites), facts.untraced)


def called_sites(skeleton: nn.Module, example_inputs: Inputs = None) -> set[str] | None:
    """The sites that a forward pass calls, in training or evaluation; None where no pass on shapes alone succeeds."""
    inputs = _meta_inputs(skeleton, example_inputs)
    if inputs is None:
        return None
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
        for name, (module, _) in _site_modules(skeleton).items()
    ]
    tensors = dict(skeleton.named_parameters(remove_duplicate=False)) | dict(skeleton.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    succeeded = False
    for training in (False, True):
        try:
            with torch.no_grad():
                torch.func.functional_call(skeleton.train(training), shapes, inputs)
            succeeded = True
        except Exception:  # needs values, or other inputs
            continue
    for handle in handles:
        handle.remove()
    return called if succeeded else None


def _meta_inputs(model: nn.Module, example_inputs: Inputs) -> tuple[Any, ...] | None:
    if example_inputs is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if size is None:
            return None
        first = next((m for m in model.modules() if is_site(m)), None)
        channels = first.weight.shape[1] if first is not None and first.weight.dim() > 2 else size[0]  # type: ignore[union-attr, index, operator]
        example_inputs = torch.empty(2, channels, *size[1:], device="meta")  # type: ignore[arg-type]
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return tuple(value.to("meta") if isinstance(value, torch.Tensor) else value for value in inputs)


def _seen(site: Site, called: set[str]) -> Site:
    return replace(site, called=site.name in called) if site.called is None else site


def is_site(module: nn.Module) -> bool:
    return isinstance(module, tuple(KINDS))


def kind_of(module: nn.Module) -> str:
    return next(kind for base, kind in KINDS.items() if isinstance(module, base))


def is_affine_norm(module: nn.Module) -> bool:
    """A normalization, of torch, torchvision, timm or the user, with a scale of its own."""
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def _site_modules(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """First name -> the module and its other names. What lies inside a site (its operator) is no site."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_site(module):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return {all_names[0]: (modules[key], tuple(all_names[1:])) for key, all_names in names.items()}


def _skeleton(model: nn.Module) -> nn.Module | None:
    """A copy that shares the parameters but nothing that a traced forward could change."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # whatever a user's __deepcopy__ raises: the model is then described by its names alone
        return None


# ---------------------------------------------------------------------------------------------------- what traces say


@dataclass
class _Facts:
    """What the traces of a model and its parts have shown, by qualified name."""

    order: list[str] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    outputs: int = 0
    untraced: dict[str, str] = field(default_factory=dict)

    def add_training(self, training: "_Facts") -> None:
        """Sites that only the training graph calls; an output among them is an auxiliary classifier."""
        known = set(self.order)
        for name in training.order:
            if name in known:
                continue
            self.order.append(name)
            role = training.roles.get(name, "hidden")
            self.roles[name] = "auxiliary" if role == "classifier" else role
            if name in training.norms:
                self.norms[name] = training.norms[name]
        self.reads = {**training.reads, **self.reads}


def _collect(module: nn.Module, prefix: str, facts: _Facts, is_root: bool = False) -> None:
    """Trace `module` and, one by one, the parts of it that a whole trace leaves out."""
    if isinstance(module, READS_RAW):
        facts.untraced[prefix] = f"{type(module).__name__} runs fused kernels on its weights"
        return
    graph, reason = _trace(module)
    if graph is None:
        facts.untraced[prefix] = reason
        for name, child in module.named_children():
            if any(map(is_site, child.modules())):
                _collect(child, _join(prefix, name), facts) if not is_site(child) else None
        return
    _read(graph, module, prefix, facts, is_root)
    called = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_module")
    for target in called:
        leaf = module.get_submodule(str(target))
        if not is_site(leaf) and any(is_site(inner) for inner in leaf.modules()):
            _collect(leaf, _join(prefix, str(target)), facts)


def _trace(root: nn.Module) -> tuple[fx.Graph | None, str]:
    """A graph of `root`, with as few leaves as possible: a class whose forward fails becomes one, and again."""
    opaque: set[type] = set()
    while True:
        tracer = _make_tracer(opaque)
        try:
            return tracer.trace(root, concrete_args=_defaults(root)), ""
        except Exception as error:  # a traced forward may raise anything
            culprit = next((m for m in reversed(tracer.entered) if type(m) not in opaque), None)
            if culprit is None or culprit is root or isinstance(culprit, type(root)):
                return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            opaque.add(type(culprit))


def _defaults(root: nn.Module) -> dict[str, Any]:
    """Arguments that are usually left out (masks, flags) are traced with their default values."""
    parameters = inspect.signature(root.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or type(p.default) in (bool, int, float, str)}


def _make_tracer(opaque: set[type]) -> Any:
    from torchvision.models.feature_extraction import NodePathTracer

    class SiteTracer(NodePathTracer):
        """Stops at sites, normalizations and what is known to be untraceable; remembers where it is."""

        entered: list[nn.Module]

        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            if is_site(module) or is_affine_norm(module) or type(module) in opaque:
                return True
            return super().is_leaf_module(module, qualified_name)

        def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            # On success the module leaves the list again; on failure the innermost one stays last.
            self.entered.append(module)
            result = super().call_module(module, forward, args, kwargs)
            self.entered.pop()
            return result

    modules, functions = _timm_registries()
    tracer = SiteTracer(leaf_modules=modules, autowrap_functions=tuple(functions))
    tracer.entered = []
    return tracer


def _timm_registries() -> tuple[list[type], list[Any]]:
    """timm's untraceable modules and functions. A model of timm's has imported timm; no other needs it."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return [], []
    return list(layers.get_notrace_modules()), list(layers.get_notrace_functions())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _read(graph: fx.Graph, root: nn.Module, prefix: str, facts: _Facts, is_root: bool) -> None:
    """Add what one graph says to the facts."""
    modules = dict(root.named_modules(remove_duplicate=False))
    wiring = _Wiring(graph, modules)
    for node in wiring.sites:
        name = _join(prefix, str(node.target))
        if name not in facts.order:
            facts.order.append(name)
        norm = wiring.norm_after(node)
        if norm is not None:
            facts.norms[name] = _join(prefix, norm)
        if is_root and wiring.reads_input(node):
            facts.roles[name] = "input"
    for node in wiring.shortcuts():
        facts.roles[_join(prefix, str(node.target))] = "shortcut"
    if is_root:
        ends = wiring.outputs()
        facts.outputs = len(ends)
        for node in (node for end in ends for node in end):
            facts.roles[_join(prefix, str(node.target))] = "classifier"
    for node in graph.nodes:
        if node.op == "get_attr" and "." in node.target:
            owner, _, parameter = node.target.rpartition(".")
            if owner in modules and is_site(modules[owner]) and parameter == "weight":
                parent = owner.rpartition(".")[0]
                facts.reads[_join(prefix, owner)] = _join(prefix, parent) or type(root).__name__


_SAME_VALUES = {
    "contiguous", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "to",
    "float", "type", "type_as", "getitem", "clone", "chunk", "unbind", "movedim", "getattr", "dropout", "identity",
    "permute_", "t", "_assert", "sym_size", "drop_path",
}  # fmt: skip
"""Operations that move values without mixing channels, by name: function, method, or module class."""
_SAME_VALUES |= {"dropout1d", "dropout2d", "dropout3d", "droppath", "permute", "rearrange", "alphadropout"}
_KEEPS_CLASSES = {
    "softmax", "log_softmax", "logsoftmax", "sigmoid", "relu", "mean", "sum", "interpolate", "upsample", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptiveavgpool2d", "avgpool2d", "adaptiveavgpool1d", "adaptive_avg_pool1d", "stack",
    "selectadaptivepool2d",
}  # fmt: skip
"""Operations between the classifier and the output of a model that leave each channel its class."""
_ADD = {"add", "iadd", "add_"}
_SCALE = {"mul", "truediv", "div", "imul", "itruediv", "mul_", "div_"}
_UPSAMPLE = {"interpolate", "upsample", "pixel_shuffle", "pixelshuffle"}
_SHAPE = {"size", "shape", "dim", "ndim", "device", "dtype"}


class _Wiring:
    """Questions about one graph."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]):
        self.graph = graph
        self.modules = modules
        self.sites = [n for n in graph.nodes if n.op == "call_module" and is_site(modules[n.target])]

    def name(self, node: fx.Node) -> str:
        """What a node does, in one lower-case word."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__.lower()
        if node.op == "call_function":
            return getattr(node.target, "__name__", str(node.target)).lower()
        return str(node.target)

    def moves(self, node: fx.Node) -> bool:
        return node.op.startswith("call_") and self.name(node) in _SAME_VALUES

    def is_shape(self, node: fx.Node) -> bool:
        """`x.shape`, `x.size(0)`: reads no values"""
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in _SHAPE
        return node.op == "call_method" and self.name(node) in _SHAPE

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
            if node.op == "call_function" and node.target in (F.batch_norm, F.layer_norm, F.group_norm):
                return str(node)
            if not self.moves(node):
                return None

    def reads_input(self, site: fx.Node) -> bool:
        """Whether nothing but moves lies between an input of the model and this site."""
        node = site.all_input_nodes[0] if site.all_input_nodes else site
        while self.moves(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node.op == "placeholder"

    def outputs(self) -> list[list[fx.Node]]:
        """For each output of the model that ends in sites: those sites."""
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        leaves = output.all_input_nodes
        if len(leaves) == 1 and isinstance(leaves[0].target, type):  # a named tuple, made by its class
            leaves = leaves[0].all_input_nodes
        ends = [list(self._last_sites(leaf, set())) for leaf in leaves]
        return [end for end in ends if end]

    def _last_sites(self, node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
        if node in seen:
            return
        seen.add(node)
        if node.op == "call_module" and is_site(self.modules[str(node.target)]):
            yield node
            return
        name = self.name(node)
        inputs = [n for n in node.all_input_nodes if not self.is_shape(n)]
        averaged = name in _ADD or (name in _SCALE and len(inputs) == 1)
        if node.op.startswith("call_") and (self.moves(node) or name in _KEEPS_CLASSES or averaged):
            for source in inputs:
                yield from self._last_sites(source, seen)

    def shortcuts(self) -> list[fx.Node]:
        """1×1 convolutions that lie alone on the branch of a residual addition which skips the main path.

        For an addition a + b, a branch is what feeds one operand and not the other. The branch whose only site is a
        1×1 convolution is the shortcut if the other one does more: several sites, or a larger window. Lateral
        connections of a feature pyramid have the same shape but add an upsampled map; they are not residual.
        """
        index = {node: i for i, node in enumerate(self.graph.nodes)}
        nodes = list(self.graph.nodes)
        ancestors: list[int] = []
        for node in nodes:
            reached = 1 << index[node]
            for source in node.all_input_nodes:
                reached |= ancestors[index[source]]
            ancestors.append(reached)
        marked = {
            "site": sum(1 << index[node] for node in self.sites),
            "upsample": sum(1 << index[node] for node in nodes if self.name(node) in _UPSAMPLE),
        }
        found: list[fx.Node] = []
        for node in nodes:
            operands = node.all_input_nodes
            if not (node.op.startswith("call_") and self.name(node) in _ADD and len(operands) == 2):
                continue
            first, second = (ancestors[index[operand]] for operand in operands)
            for branch, other in ((first & ~second, second & ~first), (second & ~first, first & ~second)):
                if (branch | other) & marked["upsample"]:
                    continue
                short, long = (_members(side & marked["site"], nodes) for side in (branch, other))
                if len(short) == 1 and self._is_pointwise(short[0]) and self._does_more(long):
                    found.append(short[0])
        return found

    def _is_pointwise(self, node: fx.Node) -> bool:
        module = self.modules[str(node.target)]
        return "conv" in kind_of(module) and all(k == 1 for k in module.kernel_size)  # type: ignore[union-attr]

    def _does_more(self, branch: list[fx.Node]) -> bool:
        return len(branch) > 1 or (len(branch) == 1 and not self._is_pointwise(branch[0]))


def _members(bits: int, nodes: list[fx.Node]) -> list[fx.Node]:
    members = []
    while bits:
        lowest = bits & -bits
        members.append(nodes[lowest.bit_length() - 1])
        bits ^= lowest
    return members


# ------------------------------------------------------------------------------------------ sites from facts and names


def _inside(untraced: Iterable[str], model: nn.Module) -> set[str]:
    """Names of the sites that lie in an untraced module."""
    return {name for name in _site_modules(model) for outer in untraced if not outer or name.startswith(outer + ".")}


def _site(name: str, aliases: tuple[str, ...], module: nn.Module, model: nn.Module, facts: _Facts) -> Site:
    names = (name, *aliases)

    def first(known: dict[str, Any]) -> Any:
        return next((known[n] for n in names if n in known), None)

    traced = any(n in facts.order for n in names)
    hidden_in = [outer for outer in facts.untraced if not outer or name.startswith(outer + ".")]
    site = Site(
        name,
        kind_of(module),
        module,
        aliases,
        role=first(facts.roles) or "hidden",
        norm=first(facts.norms),
        called=True if traced else (None if hidden_in else False),
        read_by=None if traced else first(facts.reads) or _raw_reader(name, model),
        heads=facts.outputs,
    )
    if site.called is None:
        site = replace(site, role=_role_by_name(site), norm=_next_sibling_norm(name, module, model))
    return site


def _raw_reader(name: str, model: nn.Module) -> str | None:
    """The nearest module around a site that is known to use its weight without calling it."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        if isinstance(model.get_submodule(outer), READS_RAW):
            return outer or type(model).__name__
    return None


def _role_by_name(site: Site) -> Role:
    kernel = getattr(site.module, "kernel_size", ())
    pointwise = "conv" in site.kind and all(k == 1 for k in kernel)
    if pointwise and re.search(r"downsample|shortcut|skip|identity", site.name, re.IGNORECASE):
        return "shortcut"
    return "hidden"


def _next_sibling_norm(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """The module registered right after this one, if it is a normalization of as many channels."""
    parent, _, own = name.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    place = next((i for i, (sibling, _) in enumerate(siblings) if sibling == own), len(siblings))
    if place + 1 < len(siblings):
        sibling, candidate = siblings[place + 1]
        if is_affine_norm(candidate) and len(candidate.weight) == len(module.weight):  # type: ignore[arg-type]
            return _join(parent, sibling)
    return None


def _guess_classifier(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Without a trace of the whole model: what the model itself calls its classifier, or the last linear map."""
    named = _own_classifier(model)
    if not named:
        linear = [site for site in sites if site.kind == "linear"]
        usual = re.compile(r"(^|\.)(fc|classifier|head|heads|logits|last_linear|output|out|linear)(\.|\d|$)")
        named = {id(linear[-1].module)} if linear and usual.search(linear[-1].name) else set()
    return [replace(s, role="classifier", heads=1) if id(s.module) in named else s for s in sites]


def _own_classifier(model: nn.Module) -> set[int]:
    """timm's convention: `get_classifier()`."""
    try:
        classifier = model.get_classifier()  # type: ignore[operator]
    except Exception:  # absent, abstract, or in need of arguments
        return set()
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return {id(m) for part in parts if isinstance(part, nn.Module) for m in part.modules() if is_site(m)}
