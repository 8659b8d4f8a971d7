"""Who decides: for each convolution and linear map of a model, convert or keep, and why.

Everything that can be refused is refused here, so that applying a plan has nothing left to decide.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sphereify import choices
from sphereify.convert.graph import SWAPPED, ModelGraph, Site, class_name, is_site, is_swapped, trace
from sphereify.convert.observe import Call, Inputs
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.plan import ConversionPlan, Decision, count
from sphereify.errors import UnsupportedModelError, UsageError, choose
from sphereify.nn import AngularHead, LearnableSigmoidOperator
from sphereify.nn.layers import is_folded_layer
from sphereify.nn.operators import is_built_in, make_operator
from sphereify.patterns import Patterns

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan_conversion(
    model: nn.Module, *, example_inputs: Inputs = None, **options: "Unpack[ConversionKeywords]"
) -> ConversionPlan:
    """Decide for every convolution and linear map of `model` whether it is converted. The model is not changed.

    Args:
        model: any `nn.Module`, on any device.
        example_inputs, options: as `sphereify.sphereify`.

    Raises:
        UsageError: a wrong option, a pattern that matches no site, a head that cannot be found, nothing to convert.
        UnsupportedModelError: a wrapped model, lazy layers not yet initialised, quantized layers to convert.
    """
    asked = ConversionOptions.from_keywords(options)
    check_model(model)
    graph = trace(model, example_inputs)
    return _Planner(asked, model, graph).plan()


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    wrappers = {
        "DistributedDataParallel": "torch.nn.parallel",
        "DataParallel": "torch.nn.parallel",
        "FullyShardedDataParallel": "torch.distributed.fsdp",
        "OptimizedModule": "torch.compile",
    }
    for name, module in model.named_modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in wrappers), None)
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if wrapper or compiled:
            what = f"{wrapper} ({wrappers[wrapper]})" if wrapper else "compiled in place by .compile()"
            raise UnsupportedModelError(
                f"{name or 'the model'} is {what}: convert the plain model first, then wrap or compile the result"
            )
        if is_folded_layer(module):
            raise UnsupportedModelError(
                f"{name or 'the model'} is folded for inference: take the model that it was folded from"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled by torch.jit: convert the Python model that it was made from"
            )
        lazy = getattr(module, "has_uninitialized_params", None)
        if lazy is not None and lazy():
            raise UnsupportedModelError(
                f"{name or 'the model'} ({type(module).__name__}) is lazy and has no weights yet: run one forward pass "
                f"with an example input, then convert"
            )


class _Planner:
    """The decisions for one model; each question a user may have about a site is one method."""

    def __init__(self, options: ConversionOptions, model: nn.Module, graph: ModelGraph):
        self.options = options
        self.model = model
        self.graph = graph
        self.objects: dict[str, Any] = {}
        self.include = Patterns("include", options.include)
        self.exclude = Patterns("exclude", options.exclude)
        if not isinstance(options.overrides or {}, Mapping):
            raise UsageError(f"overrides: got {options.overrides!r}, expected a dict of pattern to 'keep' or settings")
        self.overrides = Patterns("overrides", (options.overrides or {}).keys())
        self.settings = {pattern: _check_override(pattern, v) for pattern, v in (options.overrides or {}).items()}

    def plan(self) -> ConversionPlan:
        quantized = self._quantized()
        if not self.graph.sites and not quantized:
            raise UsageError(
                f"{type(self.model).__name__} has no convolution or linear layer (nn.Conv1d/2d/3d, nn.Linear): "
                f"nothing to convert"
            )
        decisions = [self._decide(site) for site in self.graph.sites]
        for patterns in (self.include, self.exclude, self.overrides):
            patterns.check([*(n for site in self.graph.sites for n in site.names), *quantized])
        for name in quantized:
            if not self.exclude.match((name,)):
                raise UnsupportedModelError(
                    f"{name} ({type(self.model.get_submodule(name)).__name__}) is quantized: its weights cannot be "
                    f"trained. Convert the float model and quantize afterwards, or keep it with --exclude '{name}'"
                )
        if self.options.head in choices.HEAD_KINDS:
            self._check_head(decisions)
        if not any(d.action == "convert" for d in decisions) and not any(site.angular for site in self.graph.sites):
            raise UsageError(_nothing_to_convert(decisions))
        notes = [f"{name or type(self.model).__name__}: not traced ({why}); roles inside it come from names and shapes"
                 for name, why in self.graph.untraced.items()]  # fmt: skip
        if self.graph.not_run and any(site.called is not True for site in self.graph.sites):
            notes.append(f"{type(self.model).__name__}: not run ({self.graph.not_run}); example_inputs=… would show "
                         f"which layers are called")  # fmt: skip
        return ConversionPlan(class_name(self.model), decisions, notes, self.objects)

    def _check_head(self, decisions: list[Decision]) -> None:
        """A kind of head was asked for: there must be a classifier, and nothing else that keeps it."""
        heads = [d for d, site in zip(decisions, self.graph.sites, strict=True) if self._is_head(site)]
        if not heads:
            raise UsageError(
                f"head={self.options.head!r}: no classifier was found in {type(self.model).__name__}, that is no "
                f"nn.Linear that ends in the model's output. Take head='keep' for a model without one."
            )
        between = [site.name for site in self.graph.sites if self._is_head(site) and site.direct is False]
        if self.options.head in choices.MARGIN_HEADS and between:
            raise UsageError(
                f"head={self.options.head!r}: the model goes on computing with what its classifier {between[0]} "
                f"returns, but a margin head returns an AngularOutput in training. Take head='w-softmax' instead."
            )
        kept = [d for d in heads if d.reason in (_EXCLUDED, _OVERRIDDEN)]
        if len(kept) == len(heads):
            raise UsageError(
                f"head={self.options.head!r}: the classifier {kept[0].name} is kept by exclude or overrides. Leave one "
                f"of the two out."
            )

    def _quantized(self) -> list[str]:
        found: list[str] = []
        for name, module in self.model.named_modules():
            if any(name.startswith(outer + ".") for outer in found):
                continue  # a part of what was found
            cls = type(module)
            of_torch = cls.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized"))
            integer = is_site(module) and not _weight(module).is_floating_point()
            if integer or (of_torch and re.search("Conv|Linear", cls.__name__)):
                found.append(name)
        return found

    def _decide(self, site: Site) -> Decision:
        setting = self._setting(site)
        found = Decision(
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
        if found.reason:
            return found
        operator, k = self._operator(site, setting)
        share_k = self.options.share_k if operator == LearnableSigmoidOperator.name else None
        if site.attention is not None and share_k == "filter":
            share_k = "layer"  # queries, keys and values are slices of one weight
        angular = replace(found, action="convert", operator=operator, k=k, share_k=share_k)
        if site.role == "classifier":
            kind = "w-softmax" if self.options.head == "auto" else self.options.head
            scale = self.options.scale if kind == "s-softmax" else None
            margin = self.options.margin if kind in choices.MARGIN_HEADS else None
            return replace(angular, reason=_HEAD_REASONS[kind], head=kind, scale=scale, margin=margin)
        rescale, drops_norm, why = self._rescale(site, setting)
        return replace(angular, reason=why, rescale=rescale, drops_norm=drops_norm, eps=self.options.eps,
                       output_read_only=site.norm_seen and not rescale)  # fmt: skip

    def _setting(self, site: Site) -> dict[str, Any] | str:
        """The first override that matches, "keep" from `exclude` or `include`, or nothing."""
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
        return _cannot_convert(site) or self._should_not_convert(site, setting)

    def _should_not_convert(self, site: Site, setting: dict[str, Any] | str) -> str | None:
        if isinstance(setting, str):
            return {
                "keep": _OVERRIDDEN,
                "exclude": _EXCLUDED,
                "not included": "no include pattern matches",
            }[setting]
        if site.attention is not None and self.options.attention == "keep":
            return f"projection of {site.attention} (nn.MultiheadAttention): attention='convert' makes it angular"
        if site.role == "auxiliary":
            return "auxiliary classifier: it runs in training only and keeps its loss"
        if site.role == "classifier":
            return self._reason_to_keep_head(site)
        if site.role == "shortcut" and self.options.skip_shortcuts and not setting:
            return "1×1 convolution on a residual shortcut"
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
        if self.options.head != "auto":
            return None
        if self.graph.output is not None and len(self.graph.output) != 2:
            return (
                f"the output has shape {self.graph.output}, not one score a class and image: ask with head='w-softmax'"
            )
        if site.heads > 1:
            return f"one of {site.heads} outputs: ask for an angular head with head='w-softmax'"
        if site.shape[0] < 2:
            return "output of a single number, which has no classes"
        return None

    def _is_head(self, site: Site) -> bool:
        linear = site.kind == "linear" and site.module is not None and site.call is None and not site.processed
        return isinstance(site.module, AngularHead) or (site.role == "classifier" and linear)

    def _operator(self, site: Site, setting: Any) -> tuple[str, float | None]:
        """Name and k; an operator object of the user's own is put aside under its class's name."""
        default = self.options.operator
        if site.role == "classifier" and self.options.head == "a-softmax":
            default = self.options.head_operator or "cosine"
            setting = {}
        elif site.role == "classifier" and self.options.head_operator is not None:
            default = self.options.head_operator
        operator = setting.get("operator", default)
        k = setting.get("k", self.options.k_of(operator))
        made = make_operator(operator, k=k)
        if not is_built_in(made):
            name = class_name(made)
            while self.objects.get(name, made) is not made:
                name += "'"  # another object of the same class
            self.objects[name] = made
            return name, None
        return made.name, _as_number(made.k)

    def _rescale(self, site: Site, setting: Any) -> tuple[bool, bool, str]:
        """Whether the layer gets β and γ, whether the following norm goes, and the reason to print."""
        wish = setting.get("rescale", self.options.rescale)
        if self.options.norm == "replace" and site.norm and site.owns_norm and wish != "never":
            norm = submodule(self.model, site.norm)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and "conv" in site.kind:
                return True, True, f"SphereNorm in place of {site.norm}"
        if wish == "always":
            return True, False, "SphereNorm rescaling: always"
        if wish == "never":
            return False, False, "no rescaling"
        if site.norm:
            return False, False, f"{site.norm} rescales"
        return True, False, "no norm follows: SphereNorm rescaling"


_EXCLUDED, _OVERRIDDEN = "excluded by pattern", "an override keeps it"
_HEAD_REASONS = {
    "w-softmax": "classifier: logits ‖x‖·g(θ)",
    "ga-softmax": "classifier: logits ‖x‖·g(θ), of the target ‖x‖·ψ(θ) in training",
    "a-softmax": "classifier: logits ‖x‖·cos θ, of the target ‖x‖·ψ(θ) in training",
    "s-softmax": "classifier: logits s·g(θ)",
}


_OTHER_KINDS = {
    "conv-transpose": "transposed convolution: an output has no single patch that an angle could be taken to",
    "bilinear": "bilinear form of two inputs, not the angle to one",
    "recurrent": "recurrent layer: its kernels take plain weights",
    "embedding": "table that is looked up, not multiplied",
    "own-backward": "product inside an autograd.Function, whose backward is its own and would stay plain",
    "beneath": "product by torch.ops or in a scripted function, beneath the functions that can be answered",
    "product": "product with a parameter that is no linear map of rows (einsum, bmm, W @ x); F.linear would be one",
}


def _cannot_convert(site: Site) -> str | None:
    """What stands in the way of an angular twin of this site, whatever the user asks for."""
    module = site.module
    if site.angular:
        return "already angular"
    if site.fixed:
        return "its filter is not learned: a buffer, or computed from activations"
    if site.unclear:
        return site.unclear
    if site.called is False:
        return "never called by the model's forward"
    if site.call is not None and site.attention is None and _is_position_table(site.call):
        return "table of positions: its products are attention scores, not features"
    if site.kind not in SWAPPED.values():
        return next(reason for kind, reason in _OTHER_KINDS.items() if site.kind.startswith(kind))
    if site.call is not None or (module is not None and is_swapped(module)):
        return None
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


def _weight(module: nn.Module) -> torch.Tensor:
    weight: Any = getattr(module, "weight", torch.empty(0))  # quantized modules have a method of that name
    return weight() if callable(weight) and not isinstance(weight, torch.Tensor) else weight


def _check_override(pattern: str, value: Any) -> dict[str, Any] | str:
    place = f"overrides[{pattern!r}]"
    if value == "keep":
        return "keep"
    if not isinstance(value, Mapping):
        raise UsageError(f"{place}: got {value!r}, expected 'keep' or a dict of operator, k, rescale")
    for key in value:
        if key not in ("operator", "k", "rescale"):
            raise choose(f"{place}: key", key, ("operator", "k", "rescale"))
    setting = dict(value)
    if "rescale" in setting:
        setting["rescale"] = choices.canonical(str(setting["rescale"]))
        if setting["rescale"] not in choices.RESCALE:
            raise choose(f"{place}: rescale", value["rescale"], choices.RESCALE)
    if "operator" in setting:
        make_operator(setting["operator"], k=setting.get("k"))
    return setting


def _nothing_to_convert(decisions: list[Decision]) -> str:
    reasons: dict[str, int] = {}
    for decision in decisions:
        reasons[decision.reason] = reasons.get(decision.reason, 0) + 1
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return f"nothing to convert: all {count(len(decisions), 'layer')} would be kept ({listed}). Widen the patterns."


def submodule(model: nn.Module, name: str | None) -> Any:
    """The module of that name, or None: without a name, or where there is no such module."""
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:  # a functional norm has a node's name, not a module's
        return None
