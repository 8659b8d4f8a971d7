"""The plan of a conversion, as plain data: one decision, with its reason, for each site of a model."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from sphereify.convert.arguments import Inputs, described, does_not_run
from sphereify.convert.copies import skeletons
from sphereify.convert.multiplied import Costs, costs_of
from sphereify.convert.observe import Observation, observe_model
from sphereify.convert.sites import ATTENTION, Call, in_order
from sphereify.errors import ArtifactError, UnsupportedModelError
from sphereify.nn.magnitudes import Magnitude
from sphereify.wording import count

KEPT_SHORTCUT = "1×1 convolution on a residual shortcut"
"""Reason to keep a layer that `skip_shortcuts` asks to keep."""
PLAN_VERSION = 2
"""Format of the JSON. Version 1 called `output_read_only` `only_read`."""


@dataclass(frozen=True)
class Decision:
    """The decision about one site, with its reason. Plain data."""

    name: str
    """Qualified name; the first one if a module is shared."""
    kind: str
    """conv1d, conv2d, conv3d, linear, or a kind that is always kept."""
    action: Literal["convert", "keep"]
    reason: str
    operator: str | None = None
    """Name of the operator; for an operator object `module.Class`, with the object in `ConversionPlan.objects`."""
    role: str = "hidden"
    """input, hidden, shortcut, classifier, or auxiliary (a classifier that runs in training only)."""
    aliases: tuple[str, ...] = ()
    """Further names of a shared module."""
    k: float | None = None
    """Curvature of a sigmoid, or start of a learnable one."""
    share_k: str | None = None
    """The set of filters that share one learnable k: filter, layer, network, or network-2 … of a later conversion."""
    radius: float = 0.0
    """Pooled radius ρ of a convolution, or its start; 0 is the paper's operator."""
    learn_radius: bool = False
    """True if ρ is a parameter of the layer."""
    magnitude: Magnitude | None = None
    """Magnitude h(‖x‖) that multiplies g(θ); None is the paper's, 1."""
    rescale: bool = False
    """True if the layer gets SphereNorm's β and γ."""
    eps: float | None = None
    head: str | None = None
    """Kind of the `AngularHead` that a classifier becomes."""
    scale: float | None = None
    """Scale of a head that has one."""
    margin: float | None = None
    """Margin of a head that has one."""
    margin_gradient: str | None = None
    """Gradient of that margin, where it is not its own."""
    similarity_power: float | None = None
    """Power t of a sphereface2 head."""
    positive_weight: float | None = None
    """Weight λ of the target's task in a sphereface2 head."""
    norm: str | None = None
    """Name of the normalization with an affine part that directly follows."""
    output_read_only: bool = False
    """True if nothing changes the layer's output in place: a normalization alone reads it."""
    owns_norm: bool = False
    """True if a trace shows that this normalization runs once, on the output of this site and on nothing else."""
    drops_norm: bool = False
    """True if that normalization is dropped, with SphereNorm in its place."""
    type: str = ""
    """Class of the module; empty for a functional call."""
    shape: tuple[int, ...] = ()
    """Shape of the weight, filters first."""
    called: bool | None = None
    """True if a forward pass calls the site; None if no pass was possible."""
    call: Call | None = None
    """Functional call that the site is: its owner answers it with an angle, and no layer is swapped."""

    @property
    def module(self) -> str:
        """Qualified name of the module that becomes angular: the layer, or the one that makes the call."""
        return self.name if self.call is None else self.call.owner


@dataclass(frozen=True)
class ConversionPlan:
    """The decisions for one architecture. A plan prints, goes to JSON and back, and applies to any model of that
    architecture."""

    model: str
    """Class of the model."""
    decisions: list[Decision]
    notes: list[str] = field(default_factory=list)
    """Remarks on the model as a whole, one line for each kind."""
    details: list[str] = field(default_factory=list)
    """What the remarks count, one line for each: modules that could not be traced, with the reasons."""
    inputs: str = field(default="", compare=False)
    """The inputs that the model was run on, and whether they were assumed; empty if it was not run."""
    objects: dict[str, Any] = field(default_factory=dict, compare=False)
    """Operator objects by the name that decisions use. They are not part of the JSON."""
    costs: Costs = field(default_factory=Costs, compare=False)
    """The multiplications of the run on `inputs`; none if there was no run, or an earlier version made the plan."""

    @property
    def converted(self) -> list[Decision]:
        """The decisions to convert a site."""
        return [decision for decision in self.decisions if decision.action == "convert"]

    @property
    def kept(self) -> list[Decision]:
        """The decisions to keep a site as it is."""
        return [decision for decision in self.decisions if decision.action == "keep"]

    def verify(self, model: nn.Module, inputs: Inputs = None) -> "ConversionPlan":
        """Run the model in training and in evaluation, and mark each site as called or never called.

        Args:
            model: the plain or the converted model; a copy of it runs.
            inputs: as `example_inputs` of `plan_conversion`.

        Returns:
            A plan in which a site that is never called is kept, with that reason.

        Raises:
            UsageError: the model does not run with these inputs.
        """
        seen = _observed(model, inputs)
        calls = {(call.owner, call.parameter) for call in [*seen.calls, *seen.fixed, *seen.attention]}
        decisions = []
        for decision in self.decisions:
            called: bool | None = any(name in seen.order for name in (decision.name, *decision.aliases))
            if not (decision.type or decision.call):
                called = decision.called  # inside a part that torch.jit has compiled
            if decision.call is not None:
                owner = decision.call.owner
                is_attention = isinstance(model.get_submodule(owner), ATTENTION) and owner in seen.order
                called = is_attention or (owner, decision.call.parameter) in calls
            if decision.action == "convert" and not called:
                decision = replace(decision, action="keep", reason="never called in training or evaluation")
            decisions.append(replace(decision, called=called))
        decisions, costs = in_order(decisions, seen.order), costs_of(decisions, seen.multiplications)
        return replace(self, decisions=decisions, inputs=described(seen.arguments, inputs), costs=costs)

    def __str__(self) -> str:
        width = max((len(d.name) for d in self.decisions), default=0)
        radii = [f"ρ={d.radius:g}" if d.radius else "" for d in self.decisions]
        radii = [f"{radius} {d.magnitude or ''}".strip() for d, radius in zip(self.decisions, radii, strict=True)]
        room = max(map(len, radii), default=0)
        room += room > 0
        lines = [
            f"{d.name:<{width}}  {d.kind:<8} {d.action:<7} {d.operator or '':<10} {radius:<{room}}{d.reason}".rstrip()
            for d, radius in zip(self.decisions, radii, strict=True)
        ]
        run = [f"run on {self.inputs}"] if self.inputs else []
        return "\n".join([f"{self.model}: {self.summary()}", *lines, *run, *self.notes])

    def summary(self) -> str:
        """One line: how many sites of each kind are converted, and how many are kept."""
        converted = [d for d in self.converted if d.head is None]
        convolutions = sum(d.kind.startswith("conv") for d in converted)
        shortcuts = sum(d.reason == KEPT_SHORTCUT for d in self.kept)
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
            "inputs": self.inputs,
            "notes": self.notes,
            "details": self.details,
            "costs": dataclasses.asdict(self.costs),
            "decisions": [_plain(decision) for decision in self.decisions],
        }
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ConversionPlan":
        """Read a plan from the text that `to_json` wrote.

        Raises:
            ArtifactError: the text is no such JSON, or of a newer version than this package reads.
        """
        try:
            plain = json.loads(text)
            if plain["version"] > PLAN_VERSION:
                raise ArtifactError(
                    f"plan: format version {plain['version']} is newer than {PLAN_VERSION}, which this sphereify "
                    f"reads. Upgrade with: pip install --upgrade sphereify"
                )
            decisions = [_decision(decision, plain["version"]) for decision in plain["decisions"]]
            notes, details = list(plain["notes"]), list(plain.get("details", ()))
            costs = Costs(**plain.get("costs", {}))
            return cls(plain["model"], decisions, notes, details, plain.get("inputs", ""), costs=costs)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"plan: not a conversion plan in JSON ({type(error).__name__}: {error})") from error


def _observed(model: nn.Module, inputs: Inputs) -> Observation:
    """What runs of a copy of the model, with values, show."""
    failed = []
    try:
        for bones in skeletons(model):
            seen = observe_model(bones, inputs, on_shapes=False)
            if not seen.error:
                return seen
            failed.append(seen)
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise UnsupportedModelError(
            f"verify: runs a copy of {type(model).__name__}, which cannot be copied ({type(error).__name__}: {error})"
        ) from error
    raise does_not_run("verify", model, failed[0].arguments, failed[0].error)


def _plain(decision: Decision) -> dict[str, Any]:
    """A decision as plain JSON values. One without a magnitude says nothing of it, as before there were any."""
    plain = dataclasses.asdict(decision)
    if plain["magnitude"] is None:
        del plain["magnitude"]
    return plain


def _decision(plain: dict[str, Any], version: int) -> Decision:
    """A decision from its JSON, of this or an earlier version of the format."""
    fields = {**plain, "aliases": tuple(plain["aliases"]), "shape": tuple(plain["shape"])}
    if version < 2:
        fields["output_read_only"] = fields.pop("only_read")
    if (call := plain["call"]) is not None:
        fields["call"] = Call(**{**call, "shape": tuple(call["shape"])})
    if (magnitude := plain.get("magnitude")) is not None:
        fields["magnitude"] = Magnitude(**magnitude)
    return Decision(**fields)
