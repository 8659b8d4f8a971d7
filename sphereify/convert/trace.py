"""Traces: how the sites of a model are wired, as its graph and the graphs of its parts show.

The graphs come from torchvision's node-path tracer with timm's registries of untraceable modules. A module whose
forward cannot be followed becomes a leaf and is traced by itself.
"""

import functools
import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sphereify.convert.hooks import with_hooks
from sphereify.convert.model_inputs import unchanged
from sphereify.convert.names import is_within, join
from sphereify.convert.shortcuts import shortcuts
from sphereify.convert.sites import ATTENTION, Call, Role, is_affine_norm, is_site, site_modules
from sphereify.convert.traced_outputs import traced_outputs
from sphereify.convert.wiring import Wiring
from sphereify.errors import first_line
from sphereify.nn.attention import projections


@dataclass
class TraceFacts:
    """Facts about the sites of a model that traces of it and its parts show, by qualified name."""

    order: list[str] = field(default_factory=list)
    """Sites in the order in which the graphs call them."""
    roles: dict[str, Role] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    """Modules that are sites and whose forward is called."""
    norms: dict[str, str] = field(default_factory=dict)
    """Site -> the normalization that follows it."""
    unnormalized: set[str] = field(default_factory=set)
    """Sites with a call that no normalization follows."""
    fed: dict[str, list[str]] = field(default_factory=dict)
    """Normalization -> the site of each call that feeds it."""
    shared_norms: set[str] = field(default_factory=set)
    """Normalizations that are called more than once."""
    moved: set[str] = field(default_factory=set)
    """Sites whose output is turned or cut on its way to a norm, so that its channels may be other than the filters."""
    calls: list[Call] = field(default_factory=list)
    """Functional calls on a parameter."""
    attention: list[Call] = field(default_factory=list)
    """Projections by whole parameters that `F.multi_head_attention_forward` makes."""
    outputs: int = 0
    """Number of the model's outputs that end in other sites than those before."""
    corrections: set[str] = field(default_factory=set)
    """Sites whose product is added to the model's own input, which makes an output."""
    open_ended: bool = False
    """True if an output comes from a part that the graph of the whole does not show."""
    untraced: dict[str, str] = field(default_factory=dict)
    """Modules that cannot be traced -> the reason."""
    called_with_more: set[str] = field(default_factory=set)
    """Modules that are sites and whose forward is called when the arguments that default to None are given, too."""
    left_out: tuple[str, ...] = ()
    """Arguments of the model that default to None, where no trace shows what is called when they are given."""
    required: int = 0
    """Number of arguments of the model in front of those."""

    def is_untraced(self, name: str) -> bool:
        """True if a site lies inside a module that cannot be traced."""
        return any(is_within(name, outer) for outer in self.untraced)

    def calls_once(self, norm: str, names: tuple[str, ...]) -> bool:
        """True if a norm runs once, on the only call of the site of these names, and channel by filter."""
        if not self.moved.isdisjoint(names):
            return False
        calls = [feeder for feeders in self.fed.values() for feeder in feeders if feeder in names]
        return len(calls) == 1 and len(self.fed.get(norm, [])) == 1 and norm not in self.shared_norms

    def add_training(self, training: "TraceFacts") -> None:
        """Add the sites that only the training graph calls; an output among them is an auxiliary classifier."""
        self.called |= training.called
        self.calls += [call for call in training.calls if call not in self.calls]
        self.attention += [call for call in training.attention if call not in self.attention]
        in_evaluation = set(self.order)
        for name in training.order:
            if name not in in_evaluation:
                self.order.append(name)
                role = training.roles.get(name, "hidden")
                self.roles[name] = "auxiliary" if role == "classifier" else role
                if name in training.norms:
                    self.norms[name] = training.norms[name]


def trace_model(bones: nn.Module) -> TraceFacts:
    """Trace a model, and one by one the parts of it that a trace of the whole leaves out.

    Args:
        bones: a skeleton of the model; its mode changes.
    """
    facts = TraceFacts()
    _collect(bones.eval(), "", facts, is_root=True)
    unseen = [name for name in site_modules(bones) if name not in facts.order and not facts.is_untraced(name)]
    if unseen:  # auxiliary classifiers run in training only
        training = TraceFacts()
        _collect(bones.train(), "", training, is_root=True)
        facts.add_training(training)
    if unseen or "" in facts.untraced:
        _trace_with_all_arguments(bones.eval(), facts)
    return facts


def _trace_with_all_arguments(bones: nn.Module, facts: TraceFacts) -> None:
    """Add what is called when each argument is given: a text, where the usual inputs are images alone."""
    parameters = list(inspect.signature(bones.forward).parameters.values())
    optional = tuple(p.name for p in parameters if p.default is None)
    facts.required = next((i for i, p in enumerate(parameters) if p.default is None), 0)
    if optional and _graph_of(bones, all_arguments=True)[0] is None:
        facts.left_out = optional
    elif optional:
        with_all = TraceFacts()
        _collect(bones, "", with_all, is_root=True, all_arguments=True)
        facts.called_with_more = with_all.called
        more = {name: role for name, role in with_all.roles.items() if name not in facts.order}
        facts.roles = {**more, **facts.roles}
        if "classifier" in more.values():
            facts.outputs = with_all.outputs


def _collect(
    module: nn.Module, prefix: str, facts: TraceFacts, is_root: bool = False, all_arguments: bool = False
) -> None:
    """Trace one module, or its children if that fails, and the leaves of its graph that hold sites."""
    if isinstance(module, ATTENTION):
        return  # its projections are known without a trace
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    graph, reason, owners = (None, "", {}) if is_container else _graph_of(module, all_arguments)
    if graph is None:
        if not is_container:
            facts.untraced[prefix] = reason
        for name, child in module.named_children():
            if not is_site(child) and any(map(is_site, child.modules())):
                _collect(child, join(prefix, name), facts, all_arguments=all_arguments)
        return
    _read(graph, module, prefix, facts, owners, is_root)
    for target in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        leaf = module.get_submodule(target)
        if not is_site(leaf) and any(is_site(inner) for inner in leaf.modules()):
            _collect(leaf, join(prefix, target), facts, all_arguments=all_arguments)


def _graph_of(root: nn.Module, all_arguments: bool) -> tuple[fx.Graph | None, str, dict[fx.Node, str]]:
    """A graph of `root` or the reason why there is none, and for each node the module whose forward makes it.

    The graph has as few leaves as possible: a class whose forward fails becomes a leaf, and the trace starts again.

    Args:
        root: a module.
        all_arguments: trace what is done when arguments are given that default to None.
    """
    opaque: set[type] = set()
    while True:
        tracer = _make_tracer(opaque)
        try:
            with unchanged(root):
                return tracer.trace(root, concrete_args=_defaults(root, all_arguments)), "", tracer.node_to_qualname
        except Exception as error:  # a traced forward may raise anything
            culprit = next((m for m in reversed(tracer.entered) if type(m) not in opaque), None)
            if culprit is None or culprit is root or isinstance(culprit, type(root)):
                return None, first_line(error), {}
            opaque.add(type(culprit))


def _defaults(root: nn.Module, all_arguments: bool) -> dict[str, Any]:
    """Default values of the arguments that are usually left out, such as masks and flags."""
    parameters = inspect.signature(root.forward).parameters.values()
    left_out = [p for p in parameters if not (all_arguments and p.default is None)]
    return {p.name: p.default for p in left_out if p.default is None or type(p.default) in (bool, int, float, str)}


def _make_tracer(opaque: set[type]) -> Any:
    from torchvision.models.feature_extraction import NodePathTracer

    class SiteTracer(NodePathTracer):
        """A tracer that stops at sites, normalizations and untraceable modules; remembers which modules it is in."""

        entered: list[nn.Module]

        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            if is_site(module) or is_affine_norm(module) or isinstance(module, torch.jit.ScriptModule):
                return True
            if type(module) in opaque:
                return True
            return super().is_leaf_module(module, qualified_name)

        def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            # On success the module leaves the list again; on failure the innermost one stays last.
            self.entered.append(module)
            plain = functools.partial(super().call_module, module, forward)
            has_hooks = module._forward_hooks or module._forward_pre_hooks
            if has_hooks and self.is_leaf_module(module, self.path_of_module(module)):
                result = with_hooks(module, plain, args, kwargs)
            else:
                result = plain(args, kwargs)
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
    """Modules and functions that timm declares untraceable. Only timm's models need them, and those import timm."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return [], []
    return list(layers.get_notrace_modules()), list(layers.get_notrace_functions())


def _read(
    graph: fx.Graph, root: nn.Module, prefix: str, facts: TraceFacts, owners: dict[fx.Node, str], is_root: bool
) -> None:
    """Add to the facts what one graph shows."""
    wiring = Wiring(graph, root)
    for node, relative in wiring.sites.items():
        name = join(prefix, relative)
        if name not in facts.order:
            facts.order.append(name)
        norm = wiring.norm_after(node)
        if norm is None:
            facts.unnormalized.add(name)
        else:
            facts.norms.setdefault(name, join(prefix, norm))
            facts.fed.setdefault(join(prefix, norm), []).append(name)
            if not wiring.reaches(node, norm):
                facts.moved.add(name)
        if node.op != "call_module":
            call = wiring.call(node)
            owner = join(prefix, owners[node]).rstrip(".")
            facts.calls.append(replace(call, owner=owner, parameter=join(prefix, call.parameter or "")))
        else:
            facts.called.add(name)
        if is_root and wiring.reads_input(node):
            facts.roles[name] = "input"
    for node, relative in wiring.products():
        shape = tuple(wiring.parameters[relative].shape)
        owner = join(prefix, owners[node]).rstrip(".")
        facts.calls.append(Call(owner, "product", join(prefix, relative), shape, False))
    for node in (node for node in graph.nodes if node.target is F.multi_head_attention_forward):
        owner = join(prefix, owners[node]).rstrip(".")
        for weight, has_bias in projections(node.args, node.kwargs):
            parameter = wiring.parameters.get(str(getattr(weight, "target", "")))
            if parameter is not None:
                name = join(prefix, str(weight.target))
                facts.attention.append(Call(owner, "linear", name, tuple(parameter.shape), has_bias))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    facts.shared_norms |= {join(prefix, name) for name, times in calls.items() if times > 1}
    for node in shortcuts(wiring):
        facts.roles[join(prefix, wiring.sites[node])] = "shortcut"
    if is_root:
        outputs = traced_outputs(wiring)
        facts.outputs, facts.open_ended = len({*map(frozenset, outputs.ends)}), outputs.open_ended
        facts.corrections = {join(prefix, name) for name in outputs.corrections}
        facts.roles.update({join(prefix, name): "classifier" for end in outputs.ends for name in end})
