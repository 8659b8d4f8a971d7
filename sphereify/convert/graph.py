"""Where a model's convolutions and linear maps are, and what part each plays.

Three witnesses are asked. The modules say what exists. A trace (torchvision's node-path tracer with timm's registries
of untraceable modules) says how it is wired; a module whose forward cannot be followed becomes a leaf and is traced by
itself. A run on the meta device says what is called, and which weights are passed to functions. Where neither trace
nor run reaches, roles come from names and shapes.
"""

import contextlib
import copy
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from sphereify.convert.observe import Call, Inputs, Run, run, unchanged
from sphereify.convert.wiring import Wiring
from sphereify.errors import UsageError, first_line
from sphereify.nn import AngularHead
from sphereify.nn.filters import own_classifier
from sphereify.nn.functional_calls import CALLS, COMPUTED, answers_calls, make_plain, parameter_name
from sphereify.nn.layers import AngularLayer

Role = Literal["input", "hidden", "shortcut", "classifier", "auxiliary"]

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.ConvTranspose1d: "conv-transpose1d",
    nn.ConvTranspose2d: "conv-transpose2d",
    nn.ConvTranspose3d: "conv-transpose3d",
    nn.Bilinear: "bilinear",
    nn.RNNBase: "recurrent",
    nn.RNNCellBase: "recurrent",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    AngularHead: "linear",
}
"""What counts as a site, subclasses included. Those that are no convolution or linear map are kept, and said so."""

SWAPPED: dict[type[nn.Module], str] = {t: KINDS[t] for t in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}
"""Exact types whose twin takes their place. A subclass may compute something else: its inner call is what counts."""

EQUIVALENTS = {
    # Only casts to the input's dtype, and only when scripted.
    "timm.layers.linear.Linear": "linear",
    # An nn.Linear under a name that torch's quantization skips.
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "linear",
}
"""Subclasses, by qualified name, that compute exactly what their base does."""

ATTENTION = nn.MultiheadAttention
"""Hands its weights to one function, and never calls the layer that holds the last of them."""


PRODUCTS = {
    "product": "its weight is multiplied by other means (einsum, bmm, W @ x)",
    "own-backward": "its weight is used inside an autograd.Function, whose backward is its own",
    "beneath": "its weight is used by torch.ops or in a scripted function",
}
"""Kinds of calls that have no angular answer, with what that means for the layer that holds the weight."""


@dataclass(frozen=True)
class Site:
    """One convolution or linear map of a model: a module, or a functional call."""

    name: str
    """Qualified name of the module, the first where it is shared; for a functional call that of the weight's module, or
    of the weight."""
    kind: str
    shape: tuple[int, ...]
    """Of the weight, filters first."""
    module: nn.Module | None = field(repr=False, default=None)
    aliases: tuple[str, ...] = ()
    """The other names of a shared module."""
    role: Role = "hidden"
    norm: str | None = None
    """The normalization with an affine part that directly follows, by name."""
    norm_seen: bool = False
    """Whether a trace shows that the norm alone reads this site's output, and leaves it as it is."""
    owns_norm: bool = False
    """Whether that normalization follows nothing else, and this site in one place only, channel by filter."""
    called: bool | None = None
    """Whether the forward calls it; None where neither trace nor run can tell."""
    call: Call | None = None
    """The functional call, where there is one to make angular."""
    attention: str | None = None
    """The nn.MultiheadAttention that this projection belongs to."""
    fixed: bool = False
    """A functional call whose weight is not learned."""
    unclear: str = ""
    """Why the functional call cannot be answered, if it cannot."""
    angular: bool = False
    direct: bool | None = None
    """Whether its product is an output as it is, with nothing in between; None where no run tells."""
    processed: bool = False
    """For a classifier: whether more is done to its scores than what leaves each its class."""
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
    not_run: str
    """Why no run succeeded; empty if one did."""
    output: tuple[int, ...] | None = None
    """Shape of the model's output in that run, if it is one tensor."""


def trace(model: nn.Module, example_inputs: Inputs = None) -> ModelGraph:
    """The sites of `model` with their roles. The model is not changed; it may itself be on the meta device."""
    bones: nn.Module | None = None
    facts, seen = _Facts(untraced={"": "it cannot be copied"}), Run(error="it cannot be copied")
    with contextlib.suppress(Exception):  # whatever a user's __deepcopy__ raises: names alone then describe the model
        bones = skeleton(model)
    if bones is not None:
        facts, seen = _facts(bones), run(bones, example_inputs)
        if seen.error and example_inputs is not None:  # control flow on values, which only a real pass can follow
            real = run(bones, example_inputs, on_shapes=False)
            seen = replace(real, by_values=True) if not real.error else seen
        if seen.error and example_inputs is not None:
            raise UsageError(f"example_inputs: {type(model).__name__} does not run with them: {seen.error}")
    sites = [_module_site(name, aliases, module, model, facts, seen)
             for name, (module, aliases) in site_modules(model).items()]  # fmt: skip
    sites = _with_calls(sites, model, facts, seen, bones)
    if "" in facts.untraced:
        guess = seen.error or not (seen.outputs or seen.ends)
        sites = _guess_classifier(model, sites, seen.output) if guess else _with_ends(sites, seen)
    order = facts.order if seen.error else seen.order
    return ModelGraph(tuple(in_order(sites, order)), facts.untraced, seen.error, seen.output)


def in_order(sites: Iterable[Any], order: list[str]) -> list[Any]:
    """Sites, or decisions about them, in the order in which their modules or weights come in `order`."""
    places: dict[str, int] = {}
    for place, name in enumerate(order):
        places.setdefault(name, place)

    def first(site: Any) -> int:
        weight = (site.call.parameter or f"{site.call.owner}.computed",) if site.call else ()
        return min(places.get(name, len(order)) for name in (site.name, *site.aliases, *weight))

    return sorted(sites, key=first)


def is_site(module: nn.Module) -> bool:
    return isinstance(module, tuple(KINDS))


def kind_of(module: nn.Module) -> str:
    return next(kind for base, kind in KINDS.items() if isinstance(module, base))


def is_swapped(module: nn.Module) -> bool:
    """Whether a twin can take the place of this module: its exact class is known, and its forward is that class's."""
    known = type(module) in SWAPPED or class_name(module) in EQUIVALENTS
    return known and "forward" not in vars(module)


def is_affine_norm(module: nn.Module) -> bool:
    """A normalization, of torch, torchvision, timm or the user, with a scale of its own."""
    named = "norm" in type(module).__name__.lower() and not is_site(module)
    return named and getattr(module, "weight", None) is not None


def _only_reads(norm: str, model: nn.Module) -> bool:
    """Whether a normalization leaves its input as it is: a function, or a library's layer without the user's hooks."""
    layer = dict(model.named_modules()).get(norm)
    of_library = type(layer).__module__.startswith(("torch.nn.", "timm.", "torchvision."))
    return layer is None or (of_library and not layer._forward_pre_hooks)


def class_name(thing: Any) -> str:
    cls = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def site_modules(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """First name -> the module and its other names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_site(module):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return {all_names[0]: (modules[key], tuple(all_names[1:])) for key, all_names in names.items()}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters but nothing that a forward pass could change, and makes its calls plainly."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    shared.update(computed_tensors(model))
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        make_plain(module)
        _drop_hooks(module)
    return copied


def computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Tensors that modules keep from a computation, as old weight norms do, which deepcopy refuses: detached, by id."""
    kept = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach().clone() for t in kept if isinstance(t, torch.Tensor) and not t.is_leaf}


def _drop_hooks(module: nn.Module) -> None:
    """A user's hooks do not run while we look; those by which torch computes a weight do."""
    for name, hooks in vars(module).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                del hooks[key]


# ---------------------------------------------------------------------------------------------------- what traces say


@dataclass
class _Facts:
    """What the traces of a model and its parts have shown, by qualified name."""

    order: list[str] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    """Site modules whose forward is called."""
    norms: dict[str, str] = field(default_factory=dict)
    """The norm after each site whose every call is followed by one."""
    unnormalized: set[str] = field(default_factory=set)
    """Sites of which some call is not."""
    fed: dict[str, list[str]] = field(default_factory=dict)
    """For each norm the calls that feed it, by the site's name."""
    calls: list[Call] = field(default_factory=list)
    """Functional calls on a parameter, by the module that makes them."""
    outputs: int = 0
    untraced: dict[str, str] = field(default_factory=dict)
    shared_norms: set[str] = field(default_factory=set)
    """Norms that are called more than once."""
    moved: set[str] = field(default_factory=set)
    """Sites whose output is turned or cut on its way to a norm, so that its channels may be other than the filters."""

    def calls_once(self, norm: str, names: tuple[str, ...]) -> bool:
        """Whether a norm runs once, on the only call of the site of these names, and channel by filter."""
        if not self.moved.isdisjoint(names):
            return False
        calls = [feeder for feeders in self.fed.values() for feeder in feeders if feeder in names]
        return len(calls) == 1 and len(self.fed.get(norm, [])) == 1 and norm not in self.shared_norms

    def add_training(self, training: "_Facts") -> None:
        """Sites that only the training graph calls; an output among them is an auxiliary classifier."""
        self.called |= training.called
        self.calls += [call for call in training.calls if call not in self.calls]
        known = set(self.order)
        for name in training.order:
            if name not in known:
                self.order.append(name)
                role = training.roles.get(name, "hidden")
                self.roles[name] = "auxiliary" if role == "classifier" else role
                if name in training.norms:
                    self.norms[name] = training.norms[name]


def _facts(bones: nn.Module) -> _Facts:
    facts = _Facts()
    _collect(bones.eval(), "", facts, is_root=True)
    unseen = [name for name in site_modules(bones) if name not in facts.order and not _inside(name, facts.untraced)]
    if unseen:  # auxiliary classifiers run in training only
        training = _Facts()
        _collect(bones.train(), "", training, is_root=True)
        facts.add_training(training)
    return facts


def _inside(name: str, untraced: dict[str, str]) -> bool:
    return any(_within(name, outer) for outer in untraced)


def _collect(module: nn.Module, prefix: str, facts: _Facts, is_root: bool = False) -> None:
    """Trace `module` and, one by one, the parts of it that a whole trace leaves out."""
    if isinstance(module, ATTENTION):
        return  # its projections are known without a trace
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    graph, reason, homes = (None, "", {}) if is_container else _trace(module)
    if graph is None:
        if not is_container:
            facts.untraced[prefix] = reason
        for name, child in module.named_children():
            if not is_site(child) and any(map(is_site, child.modules())):
                _collect(child, _join(prefix, name), facts)
        return
    _read(graph, module, prefix, facts, homes, is_root)
    for target in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        leaf = module.get_submodule(target)
        if not is_site(leaf) and any(is_site(inner) for inner in leaf.modules()):
            _collect(leaf, _join(prefix, target), facts)


def _trace(root: nn.Module) -> tuple[fx.Graph | None, str, dict[fx.Node, str]]:
    """A graph of `root`, or why there is none, and for each node the module that makes it.

    It has as few leaves as possible: a class whose forward fails becomes one, and again.
    """
    opaque: set[type] = set()
    while True:
        tracer = _make_tracer(opaque)
        try:
            with unchanged(root):
                return tracer.trace(root, concrete_args=_defaults(root)), "", tracer.node_to_qualname
        except Exception as error:  # a traced forward may raise anything
            culprit = next((m for m in reversed(tracer.entered) if type(m) not in opaque), None)
            if culprit is None or culprit is root or isinstance(culprit, type(root)):
                return None, first_line(error), {}
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

        def _get_node_qualname(self, module_qualname: str, node: fx.Node) -> str:
            # The inherited one numbers repeated names by searching all earlier ones: quadratic, and not needed here.
            return module_qualname

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


def _read(
    graph: fx.Graph, root: nn.Module, prefix: str, facts: _Facts, homes: dict[fx.Node, str], is_root: bool
) -> None:
    """Add what one graph says to the facts."""
    wiring = Wiring(graph, root, is_site, is_affine_norm)
    for node, relative in wiring.sites.items():
        name = _join(prefix, relative)
        if name not in facts.order:
            facts.order.append(name)
        norm = wiring.norm_after(node)
        if norm is None:
            facts.unnormalized.add(name)
        else:
            facts.norms.setdefault(name, _join(prefix, norm))
            facts.fed.setdefault(_join(prefix, norm), []).append(name)
            if not wiring.reaches(node, norm):
                facts.moved.add(name)
        if node.op != "call_module":
            call = wiring.call(node)
            facts.calls.append(replace(call, owner=_join(prefix, homes[node]).rstrip("."),
                                       parameter=_join(prefix, call.parameter or "")))  # fmt: skip
        else:
            facts.called.add(name)
        if is_root and wiring.reads_input(node):
            facts.roles[name] = "input"
    for node, relative in wiring.products():
        shape = tuple(wiring.parameters[relative].shape)
        facts.calls.append(
            Call(_join(prefix, homes[node]).rstrip("."), "product", _join(prefix, relative), shape, False)
        )
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    facts.shared_norms |= {_join(prefix, name) for name, times in calls.items() if times > 1}
    for node in wiring.shortcuts():
        facts.roles[_join(prefix, wiring.sites[node])] = "shortcut"
    if is_root:
        ends = wiring.outputs()
        facts.outputs = len(ends)
        for node in (node for end in ends for node in end):
            facts.roles[_join(prefix, wiring.sites[node])] = "classifier"


# --------------------------------------------------------------------------------------------- sites from all of these


def _module_site(name: str, aliases: tuple[str, ...], module: nn.Module, model: nn.Module, facts: _Facts,
                 seen: Run) -> Site:  # fmt: skip
    names = (name, *aliases)

    def first(known: dict[str, Any]) -> Any:
        return next((known[n] for n in names if n in known), None)

    norm = None if any(n in facts.unnormalized for n in names) else first(facts.norms)
    weight: Any = weight_of(module)
    traced = any(n in facts.called for n in names)
    called: bool | None = traced or (None if _inside(name, facts.untraced) else False)
    if not seen.error:
        called = any(n in seen.order for n in names) or (None if seen.by_values else False)
    site = Site(
        name,
        kind_of(module),
        tuple(weight.shape) if hasattr(weight, "shape") else (),
        module,
        aliases,
        role=first(facts.roles) or "hidden",
        norm=norm,
        norm_seen=norm is not None and _only_reads(norm, model),
        owns_norm=norm is not None and facts.calls_once(norm, names),
        called=called,
        angular=isinstance(module, (AngularLayer, AngularHead)),
        direct=None if seen.error else any(f"{n}.weight" in seen.direct for n in names),
        heads=facts.outputs,
    )
    if not traced and site.norm is None:
        site = replace(site, norm=_next_sibling_norm(name, module, model))
        if site.role == "hidden":
            site = replace(site, role=_role_by_name(site))
    return site


def _with_calls(sites: list[Site], model: nn.Module, facts: _Facts, seen: Run, bones: nn.Module | None) -> list[Site]:
    """Give each functional call to the site whose weight it uses, or make a site of it."""
    by_name = {name: site for site in sites for name in site.names}
    extra: dict[str, Site] = {}
    calls = facts.calls if seen.error else seen.calls
    computed = [call for call in [*calls, *seen.fixed] if call.parameter is None]
    for call in calls:
        owner = model.get_submodule(call.owner)
        if call.owner in by_name and is_swapped(owner) and call.kind not in PRODUCTS:
            continue  # the layer's own call, perhaps with a weight that another one is tied to
        switched = call in seen.not_in_both
        call, unclear = _localized(call, model, computed)
        if switched:
            unclear = unclear or "the call is made in one of training and evaluation only"
        home = (call.parameter or "").rpartition(".")[0] if call.parameter else call.owner
        site = by_name.get(home)
        if site is not None and site.module is not None:
            if call.kind in PRODUCTS and call.parameter is None:
                continue
            if site.call is not None and site.call != call:
                unclear = "its forward makes more than one convolution or linear map"
            elif not (call.owner in site.names or _within(site.name, call.owner)) and any(
                name in seen.order for name in site.names
            ):
                unclear = f"it is called, and its weight is used by {call.owner or 'the model'} as well"
            if call.kind in PRODUCTS:
                unclear = PRODUCTS[call.kind]
            _replace(sites, by_name, replace(site, call=call, called=True, unclear=site.unclear or unclear))
            continue
        name = call.parameter or _join(call.owner, "computed")
        while name in extra and call.parameter is None:
            name += "'"
        if name in extra and extra[name].call != call:
            unclear = "several calls use this weight, each in its own way"
        extra[name] = Site(name, call.kind, call.shape, role=facts.roles.get(name, "hidden"),
                           norm=facts.norms.get(name), called=True, call=call, unclear=unclear,
                           heads=facts.outputs)  # fmt: skip
    for call in seen.fixed:
        if call.owner not in by_name:
            name = _join(call.owner, "fixed")
            extra.setdefault(name, Site(name, call.kind, call.shape, called=True, call=call, fixed=True))
    extra.update({site.name: site for site in _attention_sites(model, by_name, sites)})
    for name, parameter, kind in _answered(model):
        home = name.rpartition(".")[0]
        if home in by_name:
            _replace(sites, by_name, replace(by_name[home], called=True, angular=True))
        else:
            extra[name] = Site(
                name, kind, () if parameter is None else tuple(parameter.shape), called=True, angular=True
            )
    if seen.error and bones is not None:
        for site in [s for s in sites if s.module is not None and not is_swapped(s.module)]:
            _replace(sites, by_name, _with_own_call(site, bones))
    return [*sites, *extra.values()]


def weight_of(module: nn.Module) -> Any:
    """The weight whose shape describes a site; recurrent layers have several, of which this is the first."""
    if isinstance(module, nn.RNNBase):
        return module.weight_ih_l0
    return getattr(module, "weight_ih", None) if isinstance(module, nn.RNNCellBase) else module.weight


def _attention_sites(model: nn.Module, by_name: dict[str, Site], sites: list[Site]) -> Iterator[Site]:
    """The projections of each nn.MultiheadAttention: in_proj (q, k and v) and out_proj, each one functional call."""
    for owner, module in model.named_modules():
        if not isinstance(module, ATTENTION):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if own.endswith("proj_weight"):
                call = Call(owner, "linear", _join(owner, own), tuple(weight.shape), module.in_proj_bias is not None)
                yield Site(call.parameter or "", "linear", call.shape, called=True, call=call, attention=owner)
        out = by_name.get(_join(owner, "out_proj"))
        if out is not None:
            call = Call(owner, "linear", _join(out.name, "weight"), out.shape, module.out_proj.bias is not None)
            _replace(sites, by_name, replace(out, called=True, call=call, attention=owner))


def _replace(sites: list[Site], by_name: dict[str, Site], site: Site) -> None:
    sites[next(i for i, s in enumerate(sites) if s.name == site.name)] = site
    for name in site.names:
        by_name[name] = site


def _localized(call: Call, model: nn.Module, computed: list[Call]) -> tuple[Call, str]:
    """The call with its weight by the name that its owner has for it, or what makes it unclear which call is meant."""
    owner = model.get_submodule(call.owner)
    if "forward" in vars(owner):
        return call, f"the forward of {call.owner or 'the model'} was replaced on the instance"
    if call.parameter is None:
        inside = [c for c in computed if c.owner == call.owner or _within(c.owner, call.owner)]
        several = len(inside) > 1
        return call, "its weight is computed, and so is that of another call made there" * several
    weight = model.get_parameter(call.parameter)
    own = next((n for n, p in owner.named_parameters(remove_duplicate=False) if p is weight), None)
    if own is None:
        return call, f"{call.owner} is given its weight, {call.parameter}, by another module"
    return replace(call, parameter=_join(call.owner, own)), ""


def _within(name: str, outer: str) -> bool:
    return not outer or name.startswith(outer + ".")


def _answered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None, str]]:
    """The functional calls that are angular already: name and weight as `_with_calls` has them, and the kind."""
    for owner, module in model.named_modules():
        for key, call in getattr(module, CALLS).items() if answers_calls(module) else ():
            name = _join(owner, parameter_name(key))
            yield name, None if key == COMPUTED else model.get_parameter(name), call.kind


def relative_parameter(owner: str, parameter: str | None) -> str | None:
    """A parameter's name as its owner sees it."""
    return parameter.removeprefix(owner + ".") if parameter is not None and owner else parameter


def _with_own_call(site: Site, bones: nn.Module) -> Site:
    """Without a run of the whole model, a subclass is run by itself, with an input of the size that it declares."""
    alone = run(bones.get_submodule(site.name))
    inner = [call for call in alone.calls if not call.owner]
    if len(inner) != 1:
        return site
    parameter = _join(site.name, inner[0].parameter) if inner[0].parameter else None
    return replace(site, call=replace(inner[0], owner=site.name, parameter=parameter))


def _role_by_name(site: Site) -> Role:
    pointwise = "conv" in site.kind and all(k == 1 for k in site.shape[2:])
    if pointwise and re.search(r"downsample|shortcut|skip|identity", site.name, re.IGNORECASE):
        return "shortcut"
    return "hidden"


def _next_sibling_norm(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """The module registered right after a convolution, if it is a normalization of as many channels."""
    if "conv" not in kind_of(module):
        return None
    parent, _, own = name.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    place = next((i for i, (sibling, _) in enumerate(siblings) if sibling == own), len(siblings))
    if place + 1 < len(siblings):
        sibling, candidate = siblings[place + 1]
        if is_affine_norm(candidate) and len(candidate.weight) == len(module.weight):  # type: ignore[arg-type]
            return _join(parent, sibling)
    return None


def _with_ends(sites: list[Site], seen: Run) -> list[Site]:
    """Without a trace of the whole model: what a run shows its outputs to be made of."""
    outputs = 1 if seen.output is not None else len(seen.ends)
    kept = frozenset().union(*(end.weights for end in seen.ends if end.kept))
    ends = frozenset().union(*(end.weights for end in seen.ends))

    def weights_of(site: Site) -> set[str]:
        own = {f"{name}.{weight}" for name in site.names for weight in ("weight", "computed")}
        return {*site.names, *own, *([site.call.parameter] if site.call is not None and site.call.parameter else [])}

    return [
        replace(s, role="classifier", heads=outputs, processed=not weights_of(s) & kept) if weights_of(s) & ends else s
        for s in sites
    ]


def _guess_classifier(model: nn.Module, sites: list[Site], output: tuple[int, ...] | None) -> list[Site]:
    """Without a trace of the whole model: what the model itself calls its classifier, or the last linear map."""
    named = {id(module) for module in own_classifier(model) if is_site(module)}
    if not named:
        linear = [site for site in sites if site.kind == "linear" and site.module is not None]
        usual = re.compile(r"(^|\.)(fc\d*|classifier|heads?|logits|last_linear|output|out)(\.|$)")
        fits = linear and (output is None or (len(output) == 2 and output[1] == linear[-1].shape[0]))
        named = {id(linear[-1].module)} if fits and usual.search(linear[-1].name) else set()
    return [replace(s, role="classifier", heads=1) if id(s.module) in named else s for s in sites]
