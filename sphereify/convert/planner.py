"""The planner: for each site of a model it decides whether to convert or to keep it, and why.

Everything that can be refused is refused here, so that applying a plan has nothing left to decide.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sphereify import choices
from sphereify.convert.arguments import Inputs
from sphereify.convert.graph import ModelGraph, read_graph
from sphereify.convert.model_checks import check_model, quantized_layers
from sphereify.convert.names import submodule
from sphereify.convert.notes import CAUSAL, NOT_GIVEN, few, plan_details, plan_notes
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.plan import KEPT_SHORTCUT, ConversionPlan, Decision
from sphereify.convert.pretrained_models import is_regression
from sphereify.convert.sites import ATTENTION, SWAPPED, Call, Site, class_name, is_swapped
from sphereify.errors import UnsupportedModelError, UsageError, no_effect, option, refused
from sphereify.head_numbers import HEAD_NUMBERS, head_number
from sphereify.nn import AngularHead, LearnableSigmoidOperator, Magnitude
from sphereify.nn.operators import is_built_in, make_operator
from sphereify.options import with_keywords_of
from sphereify.patterns import Patterns
from sphereify.wording import count, listed, shortened

if TYPE_CHECKING:
    from typing_extensions import Unpack

EXCLUDED, OVERRIDDEN, NOT_INCLUDED = BY_PATTERN = (
    "excluded by pattern",
    "an override keeps it",
    "no include pattern matches",
)

OF_HEADS = ("operator", "k")
"""Settings of an override that a classifier takes."""

ONE_INPUT = "fan-in 1: the angle to a single number is its sign, and its size would be lost"
FEW_INPUTS = {
    2: "fan-in 2: one of its two numbers, the length, is lost",
    3: "fan-in 3: one of its three numbers, the length, is lost",
}
"""Remarks on what an angle leaves of a few inputs, by their number."""

HEAD_REASONS = {
    "w-softmax": "classifier: logits ‖x‖·g(θ)",
    "ga-softmax": "classifier: logits ‖x‖·g(θ), of the target ‖x‖·ψ(θ) in training",
    "a-softmax": "classifier: logits ‖x‖·cos θ, of the target ‖x‖·ψ(θ) in training",
    "s-softmax": "classifier: logits s·g(θ)",
    "arcface": "classifier: logits s·g(θ), of the target s·ψ(θ + m) in training",
    "cosface": "classifier: logits s·g(θ), of the target s·(g(θ) - m) in training",
    "sphereface2": "classifier: logits s·G(g(θ)) + b, a binary task for each class in training",
}

OTHER_KINDS = {
    "conv-transpose": "transposed convolution: an output has no single patch that an angle could be taken to",
    "bilinear": "bilinear form of two inputs, not the angle to one",
    "recurrent": "recurrent layer: its kernels take plain weights",
    "embedding": "table that is looked up, not multiplied",
    "own-backward": "product inside an autograd.Function, whose backward is its own and would stay plain",
    "beneath": "product by torch.ops or in a scripted function, beneath the functions that can be answered",
    "experts": "product with one of several matrices in a parameter, chosen while it runs, as for experts",
    "product": "product with a parameter that is no linear map of rows (einsum, bmm, W @ x); F.linear would be one",
}
"""Reasons to keep the sites that are no convolution or linear map, by the beginning of their kind."""


@with_keywords_of(ConversionOptions)
def plan_conversion(
    model: nn.Module, *, example_inputs: Inputs = None, **options: "Unpack[ConversionKeywords]"
) -> ConversionPlan:
    """Decide for every convolution and linear map of `model` whether it is converted. The model is not changed.

    Args:
        model: any `nn.Module`, on any device.
        {options}
        example_inputs: inputs to run what a trace cannot follow: a tensor, a tuple of arguments, a dict of keywords
            (such as a tokenizer returns), or a pair (tuple, dict). A tensor on the meta device stands for its shape.
            Default: the usual ones that the model's signature and first layers suggest; `plan.inputs` says which.

    Raises:
        ArgumentTypeError: not an `nn.Module`.
        UsageError: a wrong option, a pattern that matches no site, a head for a model without a classifier, nothing to
            convert.
        UnsupportedModelError: a wrapped model, lazy layers not yet initialised, quantized layers to convert.
    """
    conversion = ConversionOptions.from_keywords(options)
    check_model(model)
    return _Planner(conversion, model, read_graph(model, example_inputs)).plan()


class _Planner:
    """The decisions for one model; each question that a user may have about a site is one method."""

    def __init__(self, options: ConversionOptions, model: nn.Module, graph: ModelGraph):
        self.options = options
        self.model = model
        self.graph = graph
        self.objects: dict[str, Any] = {}
        self.include = Patterns("include", options.include)
        self.exclude = Patterns("exclude", options.exclude)
        self.settings: Any = options.overrides or {}
        self.overrides = Patterns("overrides", self.settings.keys())

    def plan(self) -> ConversionPlan:
        quantized = quantized_layers(self.model)
        if not self.graph.sites and not quantized:
            raise UsageError(self._no_sites())
        decisions = [self._decide(site) for site in self.graph.sites]
        for patterns in (self.include, self.exclude, self.overrides):
            patterns.check([*(n for site in self.graph.sites for n in site.names), *quantized])
        for name in quantized:
            if not self.exclude.match((name,)):
                raise UnsupportedModelError(
                    f"{name} ({type(self.model.get_submodule(name)).__name__}) is quantized: its weights cannot be "
                    f"trained. Convert the float model and quantize afterwards, or keep it with "
                    f"{option('exclude', name)}"
                )
        if self.options.head in choices.HEAD_KINDS:
            self._check_head(decisions)
        if not any(d.action == "convert" for d in decisions) and not any(site.angular for site in self.graph.sites):
            raise UsageError(_nothing_to_convert(decisions))
        self._check_radius(decisions)
        self._check_head_settings(decisions)
        return ConversionPlan(
            class_name(self.model),
            decisions,
            plan_notes(self.model, self.graph, decisions),
            plan_details(self.model, self.graph),
            self.graph.inputs,
            self.objects,
            self.graph.costs,
            sum(parameter.numel() for parameter in self.model.parameters()),
        )

    def _no_sites(self) -> str:
        name = type(self.model).__name__
        layers = "no convolution or linear layer (nn.Conv1d/2d/3d, nn.Linear)"
        if not self.graph.not_run:
            return f"{name} has {layers}: nothing to convert"
        return (
            f"{name} has {layers}, and it was not run ({shortened(self.graph.not_run)}): nothing to convert as far as "
            f"that shows. Products that its forward makes with parameters of its own are seen in a run, for which "
            f"{option('example_inputs')} gives the arguments."
        )

    def _check_radius(self, decisions: list[Decision]) -> None:
        """Make sure that a radius that was asked for is somebody's."""
        if self.options.radius and not any(decision.radius for decision in decisions):
            raise no_effect(
                "radius",
                since="no convolution that may pool is converted: linear maps have no patches, and causal convolutions "
                "must not look ahead. Leave it out.",
                value=self.options.radius,
            )
        for pattern, setting in self.settings.items():
            if isinstance(setting, dict) and setting.get("radius"):
                matched = [d for d in decisions if self.overrides.match((d.name, *d.aliases)) == pattern]
                if matched and not any(decision.radius for decision in matched):
                    raise UsageError(
                        f"{option('overrides')}[{pattern!r}]: radius has no effect on {matched[0].name}: the pattern "
                        f"matches no convolution that is converted, and nothing else has patches to pool",
                        option="overrides",
                    )

    def _check_head_settings(self, decisions: list[Decision]) -> None:
        """Make sure that what is asked for by name is not the classifier's alone, which has none of it."""
        for pattern, setting in self.settings.items():
            odd = next((name for name in setting if name not in OF_HEADS), None) if isinstance(setting, dict) else None
            matched = [d for d in decisions if self.overrides.match((d.name, *d.aliases)) == pattern]
            if odd is not None and matched and all(decision.head for decision in matched):
                raise UsageError(
                    f"{option('overrides')}[{pattern!r}]: {odd} has no effect on the classifier {matched[0].name}, "
                    f"whose kind is {option('head', matched[0].head)}; it takes {listed(OF_HEADS)}",
                    option="overrides",
                )

    def _check_head(self, decisions: list[Decision]) -> None:
        """Make sure that a kind of head that was asked for has a classifier to replace, which nothing else keeps."""
        heads = [d for d, site in zip(decisions, self.graph.sites, strict=True) if self._is_head(site)]
        if not heads:
            raise refused(
                "head",
                f"no classifier was found in {type(self.model).__name__}, that is no nn.Linear that ends in the "
                f"model's output{self._not_classifiers()}. Take {option('head', 'keep')} for a model without one.",
                value=self.options.head,
            )
        between = [site.name for site in self.graph.sites if self._is_head(site) and site.direct is False]
        if self.options.head in choices.MARGIN_HEADS and between:
            raise refused(
                "head",
                f"the model goes on computing with what its classifier {between[0]} returns, but a margin head returns "
                f"an AngularOutput in training. Take {option('head', 'w-softmax')} instead.",
                value=self.options.head,
            )
        unwanted = [d for d in heads if d.reason in (EXCLUDED, OVERRIDDEN)]
        if len(unwanted) == len(heads):
            raise refused(
                "head",
                f"the classifier {unwanted[0].name} is kept by {option('exclude')} or {option('overrides')}. Leave one "
                f"of the two out.",
                value=self.options.head,
            )

    def _not_classifiers(self) -> str:
        """The output layers whose outputs are no classes, for the message that there is no classifier."""
        reasons = ((site.name, self._has_no_classes(site)) for site in self.graph.sites if site.role == "classifier")
        return "".join(f" ({name}: {reason})" for name, reason in reasons if reason)

    def _decide(self, site: Site) -> Decision:
        """The decision about one site."""
        setting = self._setting(site)
        decision = Decision(
            site.name,
            site.kind,
            "keep",
            self._reason_to_keep(site, setting) or "",
            role=site.role,
            aliases=site.aliases,
            norm=site.norm,
            owns_norm=site.owns_norm,
            type="" if site.module is None else class_name(site.module),
            shape=site.shape,
            called=site.called,
            call=site.call,
        )
        if decision.reason:
            return decision
        operator, k = self._operator(site, setting)
        share_k = self.options.share_k if operator == LearnableSigmoidOperator.name else None
        if site.attention is not None and share_k == "filter":
            share_k = "layer"  # queries, keys and values are slices of one weight
        decision = replace(decision, action="convert", operator=operator, k=k, share_k=share_k)
        if site.role == "classifier":
            kind = "w-softmax" if self.options.head == "auto" else self.options.head
            options = {name: getattr(self.options, name) for name, kinds in HEAD_NUMBERS.items() if kind in kinds}
            numbers: dict[str, Any] = {name: head_number(name, kind, value) for name, value in options.items()}
            gradient = None if self.options.margin_gradient == "true" else self.options.margin_gradient
            return replace(decision, reason=HEAD_REASONS[kind], head=kind, margin_gradient=gradient, **numbers)
        magnitude, rows = self._magnitude(site, setting)
        rescale, drops_norm, reason = self._rescale(site, setting, magnitude)
        radius, without = self._radius(site, setting)
        lost = "" if radius or magnitude.form != "sphere" else FEW_INPUTS.get(site.fan_in, "")
        return replace(
            decision,
            reason="; ".join(filter(None, (reason, without, rows, lost))),
            radius=radius,
            learn_radius=self.options.learn_radius and radius > 0,
            magnitude=None if magnitude.is_sphere else magnitude,
            rescale=rescale,
            drops_norm=drops_norm,
            eps=self.options.eps,
            output_read_only=site.norm_seen and not rescale,
        )

    def _setting(self, site: Site) -> dict[str, Any] | str:
        """The first override that matches; else "exclude" or "not included" if a pattern says so; else nothing."""
        pattern = self.overrides.match(site.names)
        if pattern is not None:
            return self.settings[pattern]
        if self.exclude.match(site.names) is not None:
            return "exclude"
        if self.include and self.include.match(site.names) is None:
            explicit_head = site.role == "classifier" and self.options.head in choices.HEAD_KINDS
            return {} if explicit_head else "not included"
        return {}

    def _reason_to_keep(self, site: Site, setting: dict[str, Any] | str) -> str | None:
        if site.called is False and not (site.angular or site.fixed or site.unclear):
            return self._reason_for_no_call(site)
        return _cannot_convert(site) or self._should_not_convert(site, setting)

    def _reason_for_no_call(self, site: Site) -> str:
        if site.reader:
            return f"its own forward is not called: its weight is an operand of {site.reader}"
        if self.graph.left_out:
            return f"{NOT_GIVEN} {few(self.graph.left_out)}: give them as example_inputs if they call it"
        return "never called by the model's forward"

    def _should_not_convert(self, site: Site, setting: dict[str, Any] | str) -> str | None:
        if isinstance(setting, str):
            return {
                "keep": OVERRIDDEN,
                "exclude": EXCLUDED,
                "not included": NOT_INCLUDED,
            }[setting]
        if site.attention is not None and self.options.attention == "keep":
            owner = self.model.get_submodule(site.attention)
            what = "nn.MultiheadAttention" if isinstance(owner, ATTENTION) else "by F.multi_head_attention_forward"
            return f"projection of {site.attention or 'the model'} ({what}): attention='convert' makes it angular"
        if site.role == "auxiliary":
            return "auxiliary classifier: it runs in training only and keeps its loss"
        if site.role == "classifier":
            return self._reason_to_keep_head(site)
        if site.role == "shortcut" and self.options.skip_shortcuts and not setting:
            return KEPT_SHORTCUT
        if site.is_depthwise and self.options.skip_depthwise and not setting:
            return "depthwise convolution: skip_depthwise"
        return None

    def _reason_to_keep_head(self, site: Site) -> str | None:
        if self.options.head == "keep":
            return "classifier: head='keep'"
        if site.kind != "linear":
            return "output convolution: an angular head takes the place of a linear classifier only"
        if site.call is not None:
            return "classifier in a functional call: an angular head takes the place of an nn.Linear only"
        if site.processed:
            return "more is done to its scores before the output: an angular head would change what that means"
        if no_classes := self._has_no_classes(site):
            return no_classes
        if self.options.head != "auto":
            return None
        if site.heads > 1:
            return f"one of {site.heads} outputs: ask for an angular head with head='w-softmax'"
        shape = next((s for s in site.output_shapes if len(s) != 2 and s != site.shape[:1]), None)
        if shape is not None:
            return f"the output has shape {shape}, not one score a class and image: ask with head='w-softmax'"
        return None

    def _has_no_classes(self, site: Site) -> str | None:
        """The reason why the outputs of an output layer are no scores of classes; None if they may be."""
        if site.shape[0] < 2:
            return "output of a single number, which has no classes"
        if is_regression(self.model):
            return "regression (problem_type of its configuration): its outputs are numbers, not scores of classes"
        return None

    def _is_head(self, site: Site) -> bool:
        linear = site.kind == "linear" and site.module is not None and site.call is None and not site.processed
        is_classifier = site.role == "classifier" and linear and not self._has_no_classes(site)
        return isinstance(site.module, AngularHead) or is_classifier

    def _operator(self, site: Site, setting: Any) -> tuple[str, float | None]:
        """The name of the operator and its k; an object of the user's own is stored under the name of its class."""
        default = self.options.operator
        if site.role == "classifier" and self.options.head == "a-softmax":
            default = self.options.head_operator or "cosine"
            setting = {}
        elif site.role == "classifier" and self.options.head_operator is not None:
            default = self.options.head_operator
        operator = setting.get("operator", default)
        k = setting.get("k", self.options.k_of(operator))
        try:
            g = make_operator(operator, k=k)
        except UsageError as error:  # an override gives a k alone, and the operator does not take it
            raise refused("overrides", f"{site.name}: {error}") from None
        if not is_built_in(g):
            name = class_name(g)
            while self.objects.get(name, g) is not g:
                name += "'"  # another object of the same class
            self.objects[name] = g
            return name, None
        return g.name, _as_number(g.k)

    def _radius(self, site: Site, setting: Any) -> tuple[float, str]:
        """The radius of a site, and the reason why it has none although one was asked for."""
        asked = setting.get("radius", self.options.radius or 0.0)
        if asked and site.kind == "linear":
            return 0.0, "no radius: a linear map has no patches to pool"
        if asked and site.causal and "radius" not in setting:
            return 0.0, f"{CAUSAL}, {site.causal}"
        return float(asked), ""

    def _magnitude(self, site: Site, setting: Any) -> tuple[Magnitude, str]:
        """The magnitude of a site, and the reason why its ρ is relative to the data although it was not asked for."""
        try:
            asked = self.options.magnitude_of(setting)
        except UsageError as error:  # an override gives a number alone, and the form does not take it
            raise refused("overrides", f"{site.name}: {error}") from None
        rows = asked.of_rows()
        if rows != asked and site.kind == "linear":
            return rows, "a linear map has no patches: ρ of its magnitude is relative to the data"
        if rows != asked and site.causal and "magnitude_mean" not in setting:
            return rows, f"ρ of its magnitude is relative to the data: causal, {site.causal}"
        return asked, ""

    def _rescale(self, site: Site, setting: Any, magnitude: Magnitude) -> tuple[bool, bool, str]:
        """True if the layer gets β and γ, True if the following norm is dropped, and the reason."""
        policy = setting.get("rescale", self.options.rescale)
        if self.options.norm == "replace" and site.norm and site.owns_norm and policy != "never":
            norm = submodule(self.model, site.norm)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and "conv" in site.kind:
                return True, True, f"SphereNorm in place of {site.norm}"
        if policy == "always":
            return True, False, "SphereNorm rescaling: always"
        if policy == "never":
            return False, False, "no rescaling"
        if site.norm:
            return False, False, f"{site.norm} rescales"
        if magnitude.keeps_scale:
            return False, False, "both lengths are kept: no rescaling"
        if site.foreign_norm:
            return True, False, f"{site.foreign_norm} normalizes along another axis: SphereNorm rescaling"
        return True, False, "no norm follows: SphereNorm rescaling"


def _cannot_convert(site: Site) -> str | None:
    """The reason why this site cannot become angular, whatever the user asks for; None if it can."""
    module = site.module
    if site.angular:
        return "already angular"
    if site.fixed:
        return "its filter is not learned: a buffer, or computed from activations"
    if site.unclear:
        return site.unclear
    if site.call is not None and site.attention is None and _is_position_table(site.call):
        return "table of positions: its products are attention scores, not features"
    if site.kind not in SWAPPED.values():
        return next(reason for kind, reason in OTHER_KINDS.items() if site.kind.startswith(kind))
    if site.call is not None or (module is not None and is_swapped(module)):
        return ONE_INPUT if site.fan_in == 1 else None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return f"{class_name(module)} is a subclass, and no single convolution or linear map was seen in its forward"


def _is_position_table(call: Call) -> bool:
    own = (call.parameter or "").rpartition(".")[2]
    return (
        call.kind in ("linear", "product")
        and re.search(r"(^|_)(rel|relative|pos|position|positional)(_|$)", own) is not None
    )


def _as_number(k: float | torch.Tensor | None) -> float | None:
    return float(k.detach().mean()) if isinstance(k, torch.Tensor) else k


def _nothing_to_convert(decisions: list[Decision]) -> str:
    reasons = Counter(decision.reason for decision in decisions)
    listed = "; ".join(f"{number} × {reason}" for reason, number in reasons.items())
    advice = " Widen the patterns." if any(reason in BY_PATTERN for reason in reasons) else ""
    return f"nothing to convert: all {count(len(decisions), 'layer')} would be kept ({listed}).{advice}"
