"""The graph of a model: its sites, and the part that each of them plays.

Three witnesses are heard. The modules say what exists. A trace says how it is wired. An observation of forward passes
says what is called, and which weights are passed to functions. Where neither reaches, roles come from names and shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from sphereify.convert.arguments import Inputs, described, does_not_run
from sphereify.convert.copies import skeletons
from sphereify.convert.multiplied import Costs, costs_of
from sphereify.convert.names import is_within, join, submodule
from sphereify.convert.observe import Observation, observe_first, observe_model
from sphereify.convert.output_layers import with_output_layers
from sphereify.convert.sites import (
    ATTENTION,
    UNANSWERABLE,
    Call,
    Site,
    compiled_sites,
    in_order,
    is_affine_norm,
    is_site,
    is_swapped,
    kind_of,
    number_of_channels,
    site_modules,
    weight_of,
)
from sphereify.convert.trace import TraceFacts, trace_model
from sphereify.errors import option
from sphereify.nn import AngularHead
from sphereify.nn.functional_calls import CALLS, COMPUTED, answers_calls, parameter_name
from sphereify.nn.layers import AngularLayer

COMPLEX = "its weight is complex: the angle is that of real vectors"


@dataclass(frozen=True)
class ModelGraph:
    """The sites of a model, in the order in which they run as far as that is known."""

    sites: tuple[Site, ...]
    untraced: dict[str, str]
    """Modules whose forward cannot be traced -> the reason; "" is the model itself."""
    not_run: str
    """Reason why no forward pass succeeded; empty if one did."""
    inputs: str = ""
    """The inputs of that pass in words."""
    left_out: tuple[str, ...] = ()
    """Arguments of the forward that default to None, where it is not clear what is called when they are given."""
    elements: Mapping[str, int] = field(default_factory=dict)
    """Weight -> elements of the inputs and outputs of its products in that pass."""
    costs: Costs = field(default_factory=Costs)
    """The multiplications of that pass."""


def read_graph(model: nn.Module, example_inputs: Inputs = None) -> ModelGraph:
    """Find the sites of a model with their roles. The model is not changed; it may itself be on the meta device.

    Raises:
        UsageError: the model does not run with `example_inputs`.
    """
    bones, facts, seen = _witnesses(model, example_inputs)
    table = _SiteTable(
        [
            _module_site(name, aliases, module, model, facts, seen)
            for name, (module, aliases) in site_modules(model).items()
        ]
    )
    _add_compiled(table, model)
    _add_calls(table, model, facts, seen)
    _add_attention(table, model)
    _add_own_attention(table, model, facts, seen)
    _add_angular_calls(table, model)
    if seen.error and bones is not None:
        _add_own_calls(table, bones)
    sites = _with_pointwise_among_causal([*table.sites, *table.extra.values()])
    sites = in_order(with_output_layers(model, sites, facts, seen), facts.order if seen.error else seen.order)
    costs = costs_of(sites, {} if seen.error else seen.multiplications)
    inputs = "" if seen.error else described(seen.arguments, example_inputs)
    left_out = _left_out(facts, seen)
    return ModelGraph(tuple(sites), facts.untraced, seen.error, inputs, left_out, seen.elements, costs)


def _witnesses(model: nn.Module, example_inputs: Inputs) -> tuple[nn.Module | None, TraceFacts, Observation]:
    """A skeleton of the model, a trace of it, and an observation of it; of the first skeleton that runs, else the last.

    There is none of a model that cannot be copied: names alone then describe it.
    """
    reason = "it cannot be copied"
    bones, facts, seen = None, TraceFacts(untraced={"": reason}), Observation(error=reason)
    failed = []
    copies = skeletons(model)
    while True:
        try:
            bones = next(copies)
        except Exception:  # no further one, or whatever a user's __deepcopy__ raises
            break
        facts, seen = trace_model(bones), _observed(bones, example_inputs)
        if not seen.error:
            return bones, facts, seen
        failed.append(seen)
    if bones is not None and example_inputs is not None and not _has_no_values(bones):
        arguments = failed[0].arguments
        raise does_not_run(option(arguments.given_by), model, arguments, failed[0].error)
    return bones, facts, seen


def _observed(bones: nn.Module, example_inputs: Inputs) -> Observation:
    """An observation on shapes alone, or with values where the control flow depends on them."""
    seen = observe_model(bones, example_inputs)
    candidates = [seen.arguments] if example_inputs is not None else seen.in_want_of_values
    if seen.error and candidates and not _has_no_values(bones):
        with_values = observe_first(bones, candidates, on_shapes=False)
        return seen if with_values.error else replace(with_values, by_values=True)
    return seen


def _has_no_values(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _left_out(facts: TraceFacts, seen: Observation) -> tuple[str, ...]:
    """The arguments that were not given when the model ran, where it is not clear what is called when they are."""
    positional = max(0, len(seen.arguments.args) - facts.required)
    return tuple(name for name in facts.left_out[positional:] if name not in seen.arguments.kwargs)


# -------------------------------------------------------------------------------------------------------------- modules


def _module_site(
    name: str, aliases: tuple[str, ...], module: nn.Module, model: nn.Module, facts: TraceFacts, seen: Observation
) -> Site:
    """The site that a module is, with what the witnesses say of it."""
    names = (name, *aliases)

    def first(entries: dict[str, Any]) -> Any:
        return next((entries[n] for n in names if n in entries), None)

    norm = None if any(n in facts.unnormalized for n in names) else first(facts.norms)
    weight: Any = weight_of(module)
    traced = any(n in facts.called for n in names)
    called: bool | None = traced or (None if facts.is_untraced(name) or facts.left_out else False)
    if not seen.error:
        called = any(n in seen.order for n in names) or (None if seen.by_values else False)
    called = called or any(n in facts.called_with_more for n in names) or called
    complex_weight = isinstance(weight, Tensor) and weight.is_complex()
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
        unclear=COMPLEX if complex_weight else "",
        reader=next((seen.readers[f"{n}.weight"] for n in names if f"{n}.weight" in seen.readers), ""),
        angular=isinstance(module, (AngularLayer, AngularHead)),
        direct=None if seen.error else any(f"{n}.weight" in seen.direct for n in names),
        causal=_causal_sign(names, module, model, seen),
        heads=facts.outputs,
    )
    if not traced and site.norm is None:
        site = replace(site, norm=_next_sibling_norm(name, module, model))
    if site.role == "hidden" and facts.is_untraced(name) and _is_shortcut_by_name(site, model, facts):
        site = replace(site, role="shortcut")
    return _without_foreign_norm(site, model, seen)


def _without_foreign_norm(site: Site, model: nn.Module, seen: Observation) -> Site:
    """The site without a normalization whose channels are other than its filters, as far as shapes show that.

    A forward pass shows it. Without one, only a number of channels that does not fit the number of filters does.
    """
    if site.norm is None:
        return site
    weights = {f"{name}.{weight}" for name in site.names for weight in ("weight", "computed")} | {site.name}
    channels = number_of_channels(submodule(model, site.norm)) or site.shape[0]
    fits = channels % site.shape[0] == 0 or (site.shape[0] % channels == 0 and channels > 1)
    if fits and weights.isdisjoint(seen.foreign):
        return replace(site, owns_norm=site.owns_norm and channels == site.shape[0])
    return replace(site, norm=None, foreign_norm=site.norm, norm_seen=False, owns_norm=False)


def _causal_sign(names: tuple[str, ...], module: nn.Module, model: nn.Module, seen: Observation) -> str:
    """The sign that a convolution is causal, from a forward pass, or from class names where none succeeded."""
    for name in names:
        for weight in (f"{name}.weight", f"{name}.computed"):
            if weight in seen.causal:
                return seen.causal[weight]
    if not seen.error or "conv" not in kind_of(module):
        return ""
    parents = names[0].split(".")
    around = [model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents) + 1)]
    causal = next((type(one).__name__ for one in around if "causal" in type(one).__name__.lower()), "")
    return f"it lies in a {causal}" if causal else ""


def _with_pointwise_among_causal(sites: list[Site]) -> list[Site]:
    """The sites, with the convolutions marked that see one position at a time in a network of causal ones.

    Such a convolution is causal by itself, and a pool over all its positions would make the network look ahead.
    """
    kinds = {site.kind for site in sites if site.causal}
    return [
        replace(site, causal="it sees one position, among causal convolutions")
        if site.kind in kinds and not site.causal and 1 in site.shape[2:]
        else site
        for site in sites
    ]


def _only_reads(norm: str, model: nn.Module) -> bool:
    """True if a normalization does not change its input: a function, or a library's layer without the user's hooks."""
    layer = dict(model.named_modules()).get(norm)
    of_library = type(layer).__module__.startswith(("torch.nn.", "timm.", "torchvision."))
    return layer is None or (of_library and not layer._forward_pre_hooks)


def _next_sibling_norm(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """The module registered right after a convolution, if it is a normalization of as many channels."""
    if "conv" not in kind_of(module):
        return None
    parent, _, own = name.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    position = next((i for i, (sibling, _) in enumerate(siblings) if sibling == own), len(siblings))
    if position + 1 < len(siblings):
        sibling, candidate = siblings[position + 1]
        if is_affine_norm(candidate) and len(candidate.weight) == len(weight_of(module)):  # type: ignore[arg-type]
            return join(parent, sibling)
    return None


def _is_shortcut_by_name(site: Site, model: nn.Module, facts: TraceFacts) -> bool:
    """True for a 1×1 convolution with the usual name in a block that no trace shows, beside a main path of its shape.

    A skip output has such a name too, but other channels than the convolutions beside it.
    """
    named = re.search(r"(^|\.)[^.]*(downsample|shortcut|skip|identity)[^.]*", site.name, re.IGNORECASE)
    if named is None or "conv" not in site.kind or any(k != 1 for k in site.shape[2:]):
        return False
    block, own = site.name[: named.start()], site.name[: named.end()]
    if block not in facts.untraced and site.name in facts.called:
        return False
    around = model.get_submodule(block) if block else model
    main: list[Any] = [
        module
        for name, module in around.named_modules(prefix=block)
        if is_site(module) and kind_of(module) == site.kind and not (name == own or is_within(name, own))
    ]
    reads = any(module.in_channels == site.module.in_channels for module in main)  # type: ignore[union-attr]
    return reads and any(module.out_channels == site.shape[0] for module in main)


# ----------------------------------------------------------------------------------------------------- functional calls


class _SiteTable:
    """The sites of a model while its functional calls are sorted in."""

    def __init__(self, sites: list[Site]):
        self.sites = sites
        """Sites that are modules."""
        self.by_name = {name: site for site in sites for name in site.names}
        self.extra: dict[str, Site] = {}
        """Sites that are functional calls, by name."""

    def update(self, name: str, **changes: Any) -> None:
        """Change the site that is the module of this name."""
        old = self.by_name[name]
        new = replace(old, **changes)
        self.sites[self.sites.index(old)] = new
        self.by_name.update(dict.fromkeys(new.names, new))


def _add_compiled(table: _SiteTable, model: nn.Module) -> None:
    """Add the layers of parts that torch.jit has compiled, to be kept."""
    for name, (kind, shape, part) in compiled_sites(model).items():
        reason = f"compiled by torch.jit, as a part of {part}: convert the Python module that it was made from"
        site = Site(name, kind, shape, unclear=reason)
        table.sites.append(site)
        table.by_name[name] = site


def _add_calls(table: _SiteTable, model: nn.Module, facts: TraceFacts, seen: Observation) -> None:
    """Give each functional call to the module whose weight it uses, or make a site of it."""
    calls = facts.calls if seen.error else seen.calls
    computed = [call for call in [*calls, *seen.fixed] if call.parameter is None]
    for call in calls:
        owner = model.get_submodule(call.owner)
        if call.owner in table.by_name and is_swapped(owner) and call.kind not in UNANSWERABLE:
            continue  # the layer's own call, perhaps with a weight that another one is tied to
        switched = call in seen.not_in_both
        call, unclear = _localized(call, model, computed)
        if switched:
            unclear = unclear or "the call is made in one of training and evaluation only"
        holder = (call.parameter or "").rpartition(".")[0] if call.parameter else call.owner
        if holder in table.by_name:
            _add_call_to_module(table, holder, call, unclear, seen)
        else:
            _add_call_site(table, call, unclear, model, facts, seen)
    for call in seen.fixed:
        if call.owner not in table.by_name:
            name = join(call.owner, "fixed")
            table.extra.setdefault(name, Site(name, call.kind, call.shape, called=True, call=call, fixed=True))


def _localized(call: Call, model: nn.Module, computed: list[Call]) -> tuple[Call, str]:
    """The call with its weight by the name that its owner has for it, or what makes it unclear which call is meant."""
    owner = model.get_submodule(call.owner)
    if "forward" in vars(owner):
        return call, f"the forward of {call.owner or 'the model'} was replaced on the instance"
    if call.parameter is None:
        inside = [c for c in computed if c.owner == call.owner or is_within(c.owner, call.owner)]
        several = len(inside) > 1
        return call, "its weight is computed, and so is that of another call made there" if several else ""
    weight = model.get_parameter(call.parameter)
    if weight.is_complex() and call.kind not in UNANSWERABLE:
        return call, COMPLEX
    own = next((n for n, p in owner.named_parameters(remove_duplicate=False) if p is weight), None)
    if own is None:
        return call, f"{call.owner} is given its weight, {call.parameter}, by another module"
    return replace(call, parameter=join(call.owner, own)), ""


def _add_call_to_module(table: _SiteTable, holder: str, call: Call, unclear: str, seen: Observation) -> None:
    """Add a functional call to the site of the module that holds its weight."""
    site = table.by_name[holder]
    if call.kind in UNANSWERABLE and call.parameter is None:
        return
    if site.call is not None and site.call != call:
        unclear = "its forward makes more than one convolution or linear map"
    elif call.owner not in site.names and any(name in seen.order for name in site.names) and not _repeats(call, site):
        unclear = f"it is called, and its weight is used by {call.owner or 'the model'} as well"
    if call.kind in UNANSWERABLE:
        unclear = UNANSWERABLE[call.kind]
    table.update(holder, call=call, called=True, unclear=site.unclear or unclear)


def _repeats(call: Call, site: Site) -> bool:
    """True if a module around a layer makes the call that the layer makes itself."""
    alike = (call.kind, call.shape, call.transposed) == (site.kind, site.shape, False)
    return alike and is_within(site.name, call.owner)


def _add_call_site(
    table: _SiteTable, call: Call, unclear: str, model: nn.Module, facts: TraceFacts, seen: Observation
) -> None:
    """Make a site of a functional call whose weight no module that is a site holds."""
    name = call.parameter or call.part or join(call.owner, "computed")
    while name in table.extra and call.parameter is None:
        name += "'"
    if name in table.extra and table.extra[name].call != call:
        unclear = "several calls use this weight, each in its own way"
    site = Site(
        name,
        call.kind,
        call.shape,
        role=facts.roles.get(name, "hidden"),
        norm=facts.norms.get(name),
        called=True,
        call=call,
        unclear=unclear,
        causal=seen.causal.get(name, ""),
        heads=facts.outputs,
    )
    table.extra[name] = _without_foreign_norm(site, model, seen)


def _add_attention(table: _SiteTable, model: nn.Module) -> None:
    """Add the projections of each nn.MultiheadAttention, in_proj (q, k and v) and out_proj, as functional calls."""
    for owner, module in model.named_modules():
        if not isinstance(module, ATTENTION):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if own.endswith("proj_weight"):
                name, shape = join(owner, own), tuple(weight.shape)
                call = Call(owner, "linear", name, shape, has_bias=module.in_proj_bias is not None)
                table.extra[name] = Site(name, "linear", shape, called=True, call=call, attention=owner)
        out = table.by_name.get(join(owner, "out_proj"))
        if out is not None:
            has_bias = module.out_proj.bias is not None
            call = Call(owner, "linear", join(out.name, "weight"), out.shape, has_bias)
            table.update(out.name, called=True, call=call, attention=owner)


def _add_own_attention(table: _SiteTable, model: nn.Module, facts: TraceFacts, seen: Observation) -> None:
    """Add the projections that other modules hand to `F.multi_head_attention_forward`."""
    for call in facts.attention if seen.error else seen.attention:
        if isinstance(model.get_submodule(call.owner), ATTENTION):
            continue
        weight = call.parameter or ""
        call, unclear = _localized(call, model, [])
        holder = weight.rpartition(".")[0]
        if holder in table.by_name:
            _add_call_to_module(table, holder, call, unclear, seen)
            table.update(holder, attention=call.owner)
        else:
            _add_call_site(table, call, unclear, model, facts, seen)
            table.extra[weight] = replace(table.extra[weight], attention=call.owner)


def _add_angular_calls(table: _SiteTable, model: nn.Module) -> None:
    """Mark the functional calls that are angular already."""
    for owner, module in model.named_modules():
        for key, call in getattr(module, CALLS).items() if answers_calls(module) else ():
            name = join(owner, parameter_name(key))
            holder = name.rpartition(".")[0]
            if holder in table.by_name:
                table.update(holder, called=True, angular=True)
            else:
                shape = () if key == COMPUTED else tuple(model.get_parameter(name).shape)
                table.extra[name] = Site(name, call.kind, shape, called=True, angular=True)


def _add_own_calls(table: _SiteTable, bones: nn.Module) -> None:
    """Observe each subclass by itself, with an input of the size that it declares; for a model that does not run."""
    for site in [s for s in table.sites if s.module is not None and not is_swapped(s.module)]:
        alone = observe_model(bones.get_submodule(site.name))
        inner = [call for call in alone.calls if not call.owner]
        if len(inner) == 1:
            parameter = join(site.name, inner[0].parameter) if inner[0].parameter else None
            table.update(site.name, call=replace(inner[0], owner=site.name, parameter=parameter))
