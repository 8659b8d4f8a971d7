"""Remarks of a plan on the model as a whole: one for each kind, and what they count."""

from collections.abc import Sequence

from torch import nn

from sphereify.convert.graph import ModelGraph
from sphereify.convert.merging import merging_note
from sphereify.convert.plan import Decision
from sphereify.convert.sites import Site
from sphereify.wording import count, shortened

CAUSAL = "no radius: causal"
NOT_GIVEN = "not called without"
"""Beginnings of reasons that remarks count."""


def plan_notes(model: nn.Module, graph: ModelGraph, decisions: list[Decision]) -> list[str]:
    """The remarks, one for each kind."""
    merging = merging_note(model, {d.module for d in decisions if d.action == "convert"})
    return [
        *_notes_on_passes(type(model).__name__, graph, decisions),
        *_depthwise_notes(graph, decisions),
        *radius_notes(decisions),
        *([merging] if merging else []),
    ]


def plan_details(model: nn.Module, graph: ModelGraph) -> list[str]:
    """The cases that the remarks count, one line for each, with the whole reasons."""
    name = type(model).__name__
    details = [f"{module or name}: not traced ({why})" for module, why in graph.untraced.items()]
    return [*details, *([f"{name}: not run ({graph.not_run})"] if graph.not_run else [])]


def _notes_on_passes(model: str, graph: ModelGraph, decisions: list[Decision]) -> list[str]:
    """Remarks on what could not be traced or run, and on what that leaves open."""
    untraced, not_run = graph.untraced, graph.not_run
    notes = []
    if untraced:
        name, why = next((name or model, shortened(why)) for name, why in untraced.items())
        what = f"{name}: not traced ({why})"
        if len(untraced) > 1:
            what = f"{len(untraced)} modules: not traced ({name} and others: {why})"
        inside = "roles inside come from names and shapes" if not_run else "a run shows what is called inside"
        notes.append(f"{what}; {inside}")
    if not_run:
        unknown = any(site.called is not True for site in graph.sites)
        shown = "which layers are called" if unknown else "products whose weights are computed"
        notes.append(f"{model}: not run ({shortened(not_run)}); a run with other inputs would show {shown}")
    elif waiting := sum(d.reason.startswith(NOT_GIVEN) for d in decisions):
        notes.append(
            f"{model}: run without {few(graph.left_out)}, for which {count(waiting, 'layer')} may wait; what else "
            f"would be called is not in the plan"
        )
    return notes


def _depthwise_notes(graph: ModelGraph, decisions: list[Decision]) -> list[str]:
    """One line on depthwise convolutions that are converted, if there are some."""
    pairs = zip(decisions, graph.sites, strict=True)
    converted = [site for decision, site in pairs if decision.action == "convert"]
    depthwise = [site for site in converted if site.is_depthwise]
    if not depthwise:
        return []
    share = _elements(graph, depthwise) / (_elements(graph, converted) or 1)
    time = f"about {share:.0%} of the time that all angles take" if share >= 0.005 else "time"
    return [
        f"{count(len(depthwise), 'depthwise convolution')}: angles to single channels cost a trained network accuracy, "
        f"and {time}; skip_depthwise keeps them"
    ]


def _elements(graph: ModelGraph, sites: Sequence[Site]) -> int:
    """Elements that the norms and angles of some sites read and write, in one pass over the inputs of the plan."""
    weights = {name if site.module is None else f"{name}.weight" for site in sites for name in site.names}
    return sum(graph.elements.get(weight, 0) for weight in weights)


def radius_notes(decisions: list[Decision]) -> list[str]:
    """One line on the converted layers with a radius and those without one, where some have one."""
    layers = [d for d in decisions if d.action == "convert" and not d.head]
    if not any(layer.radius for layer in layers):
        return []
    without = [layer for layer in layers if not layer.radius]
    linear = sum(layer.kind == "linear" for layer in without)
    causal = sum(CAUSAL in layer.reason for layer in without)
    unasked = len(without) - linear - causal
    parts = [
        f"{count(linear, 'linear map')} (no patches to pool)" if linear else "",
        f"{count(causal, 'causal convolution')} (a pool would look ahead)" if causal else "",
        f"{count(unasked, 'convolution')} (not asked for)" if unasked else "",
    ]
    rest = "; without: " + ", ".join(filter(None, parts)) if without else ""
    return [f"pooled radius: {count(len(layers) - len(without), 'convolution')}{rest}"]


def few(names: Sequence[str]) -> str:
    """The first names of some."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
