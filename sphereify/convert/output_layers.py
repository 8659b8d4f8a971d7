"""Output layers: the sites whose products a model returns, and which no other layer reads.

A trace shows them where it reaches the outputs, an observation shows them for any model that runs. Where neither does,
names and shapes are left.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from sphereify.convert.names import join
from sphereify.convert.observe import Observation
from sphereify.convert.sites import Site, attribute_of, is_affine_norm, is_site
from sphereify.convert.trace import TraceFacts
from sphereify.nn.filters import own_classifier

USUAL_NAMES = re.compile(r"(^|\.)(fc\d*|classifier|heads?|logits|last_linear|output|out)(\.|$)")
"""Names that a classifier often has."""


def with_output_layers(model: nn.Module, sites: list[Site], facts: TraceFacts, seen: Observation) -> list[Site]:
    """The sites of a model, with the role "classifier" for its output layers and the shapes of their outputs."""
    if not ("" in facts.untraced or facts.open_ended or _ran_more(sites, facts, seen)):
        return [_as_traced(site, facts, seen) for site in sites]
    if not seen.error and (seen.outputs or seen.ends):
        return [_as_seen(site, seen) if _ran(site, seen) else site for site in sites]
    if any(site.role == "classifier" for site in sites):
        return sites  # those outputs that a trace reaches
    return _guessed(model, sites, seen.output)


def _ran_more(sites: list[Site], facts: TraceFacts, seen: Observation) -> bool:
    """True if the model ran with arguments that the trace did not have, and called layers that the trace does not."""
    return not seen.error and any(
        site.module is not None
        and _ran(site, seen)
        and not any(name in facts.called or facts.is_untraced(name) for name in site.names)
        for site in sites
    )


def _ran(site: Site, seen: Observation) -> bool:
    """True if a layer was called: of one that needs other arguments, a trace knows more."""
    return site.module is None or any(name in seen.order for name in site.names)


def _weights_of(site: Site) -> frozenset[str]:
    """The names that the weight of a site may have."""
    own = {join(name, weight) for name in site.names for weight in ("weight", "computed")}
    called = [site.call.parameter] if site.call is not None and site.call.parameter else []
    return frozenset({*site.names, *own, *called})


def _as_traced(site: Site, facts: TraceFacts, seen: Observation) -> Site:
    """A site with the role that a trace of the whole model shows it in."""
    if site.role != "classifier":
        return site
    if site.kind == "embedding":
        return replace(site, role="hidden")
    return _with_shapes(replace(site, processed=any(name in facts.corrections for name in site.names)), seen)


def _as_seen(site: Site, seen: Observation) -> Site:
    """A site with the role that an observation shows it in."""
    weights = _weights_of(site)
    if site.kind == "embedding":
        return site  # its rows are looked up; what multiplies with them as an output layer is a site of its own
    ends = [end for end in seen.ends if weights & end.weights and not (site.kind == "linear" and end.activated)]
    scores = any(end.keeps_classes for end in ends)
    in_training = any(weights & end.weights for end in seen.training_ends)
    if ends or (in_training and _runs_in_evaluation(site, seen)):
        outputs = 1 if seen.output is not None else len({end.weights for end in seen.ends})
        return _with_shapes(replace(site, role="classifier", heads=outputs, processed=not scores), seen)
    if in_training:
        return replace(site, role="auxiliary")
    return replace(site, role="hidden") if site.role == "classifier" else site


def _runs_in_evaluation(site: Site, seen: Observation) -> bool:
    return not _weights_of(site).isdisjoint(seen.in_evaluation)


def _with_shapes(site: Site, seen: Observation) -> Site:
    """A classifier with the shapes of the outputs that it ends in."""
    weights = _weights_of(site)
    shapes = {end.shape for end in seen.ends if weights & end.weights and end.shape}
    if not shapes and seen.output is not None:
        shapes = {seen.output}
    return replace(site, output_shapes=tuple(sorted(shapes)))


def _guessed(model: nn.Module, sites: list[Site], output: tuple[int, ...] | None) -> list[Site]:
    """The sites with a classifier by its name, for a model that can be neither traced nor run as a whole."""
    classifiers = {id(module) for module in own_classifier(model) if is_site(module)}
    if not classifiers:
        linear = [site for site in sites if site.kind == "linear" and site.module is not None]
        fits = linear and (output is None or (len(output) == 2 and output[1] == linear[-1].shape[0]))
        usual = fits and USUAL_NAMES.search(linear[-1].name) and not _fits_other_layers(model, linear[-1])
        classifiers = {id(linear[-1].module)} if usual else set()
    return [replace(s, role="classifier", heads=1) if id(s.module) in classifiers else s for s in sites]


def _fits_other_layers(model: nn.Module, site: Site) -> bool:
    """True if another layer takes, gives or normalizes features as wide as what this one returns.

    Such a layer goes back to the width of a hidden state, as the last one of a residual block does.
    """
    width = site.shape[0]
    for module in model.modules():
        weight: Any = attribute_of(module, "weight")
        if module is site.module or not hasattr(weight, "shape"):
            continue
        if width in (weight.shape[1:2] if is_site(module) else weight.shape[:1] if is_affine_norm(module) else ()):
            return True
    return False
