"""One decision for each convolution and linear map of a model: convert or keep, and why.

Everything that can be refused is refused here, so that applying a plan has nothing left to decide.
"""

import dataclasses
import difflib
import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from sphereify import choices
from sphereify.convert.graph import (
    ATTENTION,
    SWAPPED,
    ModelGraph,
    Site,
    class_name,
    in_order,
    is_site,
    is_swapped,
    skeleton,
    trace,
)  # fmt: skip
from sphereify.convert.running import Call, Inputs, run
from sphereify.errors import ArtifactError, UnsupportedModelError, UsageError, choose
from sphereify.nn import AngularHead, LearnableSigmoidOperator
from sphereify.nn.folded import FoldedLayer
from sphereify.nn.functional import DEFAULT_EPS
from sphereify.nn.operators import is_built_in, make_operator

PLAN_VERSION = 1
Operator = str | Callable[[torch.Tensor], torch.Tensor]
Patterns = str | Iterable[str] | None
Overrides = Mapping[str, Mapping[str, Any] | str] | None


@dataclass(frozen=True)
class Options:
    """What the user asked for, as `sphereify(...)` takes it; checked by `validated`."""

    operator: Operator = "cosine"
    k: float | None = None
    share_k: str = "filter"
    skip_shortcuts: bool = False
    head: str = "auto"
    head_operator: Operator | None = None
    margin: float = 4.0
    scale: float = 30.0
    rescale: str = "auto"
    norm: str = "keep"
    attention: str = "keep"
    include: Patterns = None
    exclude: Patterns = None
    overrides: Overrides = None
    eps: float = DEFAULT_EPS

    def validated(self) -> "Options":
        """The same in canonical spelling, or the error that names the first wrong one."""
        words = {"share_k": choices.SHARE_K, "head": choices.HEADS, "rescale": choices.RESCALE, "norm": choices.NORM,
                 "attention": choices.ATTENTION}  # fmt: skip
        canonical: dict[str, Any] = {}
        for name, allowed in words.items():
            canonical[name] = choices.canonical(str(getattr(self, name)))
            if canonical[name] not in allowed:
                raise choose(name, getattr(self, name), allowed)
        for name, lowest in {"margin": 1.0, "scale": 0.0, "eps": 0.0}.items():
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and value >= lowest and 0 < value < math.inf):
                bound = f"of at least {lowest:g}" if lowest else "above 0"
                raise UsageError(f"{name}: got {value!r}, expected a number {bound}")
        for name, heads in {"margin": choices.MARGIN_HEADS, "scale": ("s-softmax",)}.items():
            changed = getattr(self, name) != getattr(Options, name)
            if changed and canonical["head"] not in heads:
                raise UsageError(f"{name}: has no effect on head={self.head!r}; it belongs to {' and '.join(heads)}")
        # Made once to be checked: an unknown name, or a k that does not belong to it, fails now.
        made = make_operator(self.operator, k=self.k)
        if canonical["head"] == "a-softmax" and choices.canonical(str(self.head_operator or "cosine")) != "cosine":
            raise UsageError(
                f"head_operator: got {self.head_operator!r} for a-softmax, which is cosine; head='ga-softmax' takes any"
            )
        if self.head_operator is not None:
            make_operator(self.head_operator, k=_k_for(self.head_operator, self.operator, self.k))
        k = made.k if self.k is None and is_built_in(made) else self.k
        return replace(self, **canonical, k=_as_number(k))


@dataclass(frozen=True)
class Decision:
    """What happens to one site, and why. Plain data."""

    name: str
    """Qualified name; the first, where a module is shared."""
    kind: str
    """conv1d, conv2d, conv3d, linear, or a kind that is always kept."""
    action: Literal["convert", "keep"]
    reason: str
    operator: str | None = None
    """Name of the operator; for an operator object `module.Class`, with the object in `ConversionPlan.objects`."""
    role: str = "hidden"
    """input, hidden, shortcut, classifier, or auxiliary (a classifier that runs in training only)."""
    aliases: tuple[str, ...] = ()
    k: float | None = None
    share_k: str | None = None
    rescale: bool = False
    eps: float | None = None
    head: str | None = None
    """For a classifier that becomes an `AngularHead`: its kind."""
    scale: float | None = None
    margin: float | None = None
    norm: str | None = None
    """The affine normalization that directly follows, by name."""
    only_read: bool = False
    """Whether it is known that nothing changes the layer's output in place: a normalization alone reads it."""
    owns_norm: bool = False
    """Whether a trace shows that this normalization runs once, on this site's output and on nothing else."""
    drops_norm: bool = False
    """Whether that normalization goes, with SphereNorm in its place."""
    type: str = ""
    """Class of the module that was found."""
    shape: tuple[int, ...] = ()
    """Shape of its weight, filters first."""
    called: bool | None = None
    """Whether a pass through the model calls it; None where no pass was possible."""
    call: Call | None = None
    """Where the site is a functional call: who makes it, with which parameter. It is answered; no layer is swapped."""


@dataclass(frozen=True)
class ConversionPlan:
    """The decisions for one architecture: prints, goes to JSON and back, applies to any model of the same shape."""

    model: str
    """Class of the model."""
    decisions: list[Decision]
    notes: list[str] = field(default_factory=list)
    """What the user should know beyond single sites: parts that could not be traced, for one."""
    objects: dict[str, Any] = field(default_factory=dict, compare=False)
    """Operator objects by the name that decisions use. They are not part of the JSON."""

    @property
    def converted(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.action == "convert"]

    @property
    def kept(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.action == "keep"]

    def verify(self, model: nn.Module, inputs: Inputs = None) -> "ConversionPlan":
        """The plan with each site marked as called or never called, by real passes in training and in evaluation.

        Args:
            model: the plain or the converted model; a copy of it runs.
            inputs: a tensor or a tuple of arguments; default: two images of the size in the model's `pretrained_cfg`.

        Returns:
            A plan in which a site that is never called is kept, with that reason.

        Raises:
            UsageError: the model does not run with these inputs.
        """
        seen = run(skeleton(model), inputs, on_shapes=False)
        if seen.error:
            raise UsageError(f"verify: {type(model).__name__} does not run with these inputs: {seen.error}")
        made = {(call.owner, call.parameter) for call in [*seen.calls, *seen.fixed]}
        decisions = []
        for decision in self.decisions:
            called = any(name in seen.order for name in (decision.name, *decision.aliases))
            if decision.call is not None:
                owner = decision.call.owner
                attention = isinstance(model.get_submodule(owner), ATTENTION) and owner in seen.order
                called = attention or (owner, decision.call.parameter) in made
            if decision.action == "convert" and not called:
                decision = replace(decision, action="keep", reason="never called in training or evaluation")
            decisions.append(replace(decision, called=called))
        return replace(self, decisions=in_order(decisions, seen.order))

    def __str__(self) -> str:
        width = max((len(d.name) for d in self.decisions), default=0)
        lines = [f"{d.name:<{width}}  {d.kind:<8} {d.action:<7} {d.operator or '':<10} {d.reason}".rstrip()
                 for d in self.decisions]  # fmt: skip
        return "\n".join([f"{self.model}: {self.summary()}", *lines, *self.notes])

    def summary(self) -> str:
        """One line: how many sites of each kind are converted, and how many are kept."""
        converted = [d for d in self.converted if d.head is None]
        convolutions = sum(d.kind.startswith("conv") for d in converted)
        shortcuts = sum(d.role == "shortcut" for d in self.kept)
        heads = [d for d in self.converted if d.head]
        linear = len(converted) - convolutions
        parts = [count(convolutions, "convolution") + " converted"] if convolutions or not linear else []
        if linear:
            parts.append(count(linear, "linear map") + " converted")
        if shortcuts:
            parts.append(count(shortcuts, "shortcut") + " kept")
        if others := len(self.kept) - shortcuts:
            parts.append(f"{count(others, 'other layer')} kept" if shortcuts else f"{count(others, 'layer')} kept")
        parts.append(f"the head swapped for {heads[0].head}" if heads else "no head swapped")
        return ", ".join(parts)

    def to_json(self) -> str:
        """The plan as JSON text; operator objects appear by name only."""
        plain = {
            "version": PLAN_VERSION,
            "model": self.model,
            "notes": self.notes,
            "decisions": [dataclasses.asdict(decision) for decision in self.decisions],
        }
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ConversionPlan":
        """The plan that `to_json` wrote.

        Raises:
            ArtifactError: not such a JSON text, or of a newer version than this package knows.
        """
        try:
            plain = json.loads(text)
            if plain["version"] > PLAN_VERSION:
                raise ArtifactError(
                    f"plan: format version {plain['version']} is newer than {PLAN_VERSION}, which this sphereify "
                    f"reads. Upgrade with: pip install --upgrade sphereify"
                )
            decisions = [
                Decision(**{**d, "aliases": tuple(d["aliases"]), "shape": tuple(d["shape"]), "call": _call(d["call"])})
                for d in plain["decisions"]
            ]
            return cls(plain["model"], decisions, list(plain["notes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"plan: not a conversion plan in JSON ({type(error).__name__}: {error})") from error


def plan_conversion(model: nn.Module, *, example_inputs: Inputs = None, **options: Any) -> ConversionPlan:
    """Decide for every convolution and linear map of `model` whether it is converted. The model is not changed.

    Args:
        model: any `nn.Module`, on any device.
        example_inputs, options: as `sphereify.sphereify`.

    Raises:
        UsageError: a wrong option, a pattern that matches no site, a head that cannot be found, nothing to convert.
        UnsupportedModelError: a wrapped model, lazy layers not yet initialised, quantized layers to convert.
    """
    known = [option.name for option in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            raise choose("option", name, known)
    asked = Options(**options).validated()
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
        if isinstance(module, FoldedLayer):
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

    def __init__(self, options: Options, model: nn.Module, graph: ModelGraph):
        self.options = options
        self.model = model
        self.graph = graph
        self.objects: dict[str, Any] = {}
        self.include = _Patterns("include", options.include)
        self.exclude = _Patterns("exclude", options.exclude)
        if not isinstance(options.overrides or {}, Mapping):
            raise UsageError(f"overrides: got {options.overrides!r}, expected a dict of pattern to 'keep' or settings")
        self.overrides = _Patterns("overrides", (options.overrides or {}).keys())
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
                       only_read=site.norm_seen and not rescale)  # fmt: skip

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
        k = setting.get("k", _k_for(operator, self.options.operator, self.options.k))
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


def _call(plain: dict[str, Any] | None) -> Call | None:
    return None if plain is None else Call(**{**plain, "shape": tuple(plain["shape"])})


def _as_number(k: float | torch.Tensor | None) -> float | None:
    return float(k.detach().mean()) if isinstance(k, torch.Tensor) else k


def _weight(module: nn.Module) -> torch.Tensor:
    weight: Any = getattr(module, "weight", torch.empty(0))  # quantized modules have a method of that name
    return weight() if callable(weight) and not isinstance(weight, torch.Tensor) else weight


def _k_for(operator: Operator, default_operator: Operator, k: float | None) -> float | None:
    """The k of the whole conversion belongs to its operator; another operator at one place takes its own default."""
    same = isinstance(operator, str) and isinstance(default_operator, str)
    return k if same and choices.canonical(operator) == choices.canonical(default_operator) else None  # type: ignore[arg-type]


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


class _Patterns:
    """Globs over qualified names, or regular expressions after "re:", of which each must match some site."""

    def __init__(self, option: str, patterns: Patterns):
        if not isinstance(patterns, (str, Iterable, type(None))):
            raise UsageError(f"{option}: got {patterns!r}, expected a pattern or a list of patterns over layer names")
        self.option = option
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
        self.matchers = {pattern: self._compile(pattern) for pattern in self.patterns}

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def _compile(self, pattern: str) -> re.Pattern[str]:
        if not isinstance(pattern, str):
            raise UsageError(f"{self.option}: got {pattern!r}, expected a glob over layer names, or 're:…'")
        if not pattern.startswith("re:"):
            return re.compile(fnmatch.translate(pattern))
        try:
            return re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"{self.option}: {pattern!r} is not a regular expression: {error}") from None

    def match(self, names: Iterable[str]) -> str | None:
        """The first pattern that matches one of `names`."""
        names = list(names)
        return next((p for p, m in self.matchers.items() if any(m.fullmatch(name) for name in names)), None)

    def check(self, names: list[str]) -> None:
        for pattern, matcher in self.matchers.items():
            if any(matcher.fullmatch(name) for name in names):
                continue
            inside = any(name.startswith(pattern + ".") for name in names)
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            hint = f"did you mean {pattern + '.*'!r}?" if inside else f"names look like {', '.join(near)}"
            raise UsageError(f"{self.option}: pattern {pattern!r} matches no convolution or linear layer; {hint}")


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


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
