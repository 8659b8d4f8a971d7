"""The plan of a conversion, as plain data: one decision, with its reason, for each site of a model."""

import dataclasses
import json
import shutil
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from sphereify.convert.arguments import Inputs, described, does_not_run
from sphereify.convert.copies import skeletons
from sphereify.convert.multiplied import Costs, costs_of
from sphereify.convert.observe import Observation, observe_model
from sphereify.convert.repeats import repeats
from sphereify.convert.sites import ATTENTION, Call, in_order
from sphereify.errors import ArtifactError, UnsupportedModelError
from sphereify.nn.magnitudes import Magnitude
from sphereify.nn.modules import check_module
from sphereify.wording import count, shortened_name

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
class PlanRow:
    """A row of a plan's table: what becomes of one site, or of several that are alike, as text."""

    layer: str
    """Name of the site with its aliases, or of sites that repeat, such as `layer1.1–2`."""
    kind: str
    """Kind of the site, with the number of sites where the row has several."""
    action: Literal["convert", "keep"]
    becomes: str
    """Operator with its numbers; "kept" for a site that stays as it is."""
    why: str
    """Reason, and the role of the site where the reason does not name it."""

    @classmethod
    def of(cls, first: Decision, *others: Decision, name: str | None = None) -> "PlanRow":
        """The row of one decision, or of decisions that are alike under a common name."""
        names = [first.name if name is None else name] if others else [first.name or "(the model)", *first.aliases]
        kind = f"{len(others) + 1} {first.kind}" if others else first.kind
        is_same = all(other.reason == first.reason for other in others)
        reason = first.reason if is_same else _without_norm(first)
        is_said = first.role == "hidden" or first.role in reason
        why = reason if is_said else f"{first.role}; {reason}"
        becomes = _operator(first) if first.action == "convert" else "kept"
        return cls(", ".join(names), kind, first.action, becomes, why)


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
    """Cases that the remarks count, one line for each: modules that could not be traced, with the reasons."""
    inputs: str = field(default="", compare=False)
    """The inputs that the model was run on, and whether they were assumed; empty if it was not run."""
    objects: dict[str, Any] = field(default_factory=dict, compare=False)
    """Operator objects by the name that decisions use. They are not part of the JSON."""
    costs: Costs = field(default_factory=Costs, compare=False)
    """The multiplications of the run on `inputs`; none if there was no run, or an earlier version made the plan."""
    parameters: int = field(default=0, compare=False)
    """Number of the model's parameters; 0 if an earlier version made the plan."""

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
            ArgumentTypeError: the model is no module.
        """
        check_module(model)
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

    def rows(self, *, every: bool = False) -> list["PlanRow"]:
        """The plan as the rows of a table: layers that repeat share one, layers that differ have their own.

        Args:
            every: True for a row of each site, in the order in which they run.
        """
        if every:
            return [PlanRow.of(decision) for decision in self.decisions]
        folded = repeats([decision.name for decision in self.decisions], list(map(_pattern, self.decisions)))
        return [PlanRow.of(*(self.decisions[place] for place in row.places), name=row.name) for row in folded]

    def __str__(self) -> str:
        """The table of `rows`, as wide as the terminal, or 80 columns where there is none."""
        width = shutil.get_terminal_size().columns
        rows = [(row.layer, row.kind, row.becomes, row.why) for row in self.rows()]
        longest = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        longest[0] = min(longest[0], max(width - sum(longest[1:]) - 36, 12))  # 30 columns are for the reasons
        start = sum(longest) + 6
        lines = []
        for layer, *others, why in rows:
            cells = [shortened_name(layer, longest[0]), *others]
            text = "  ".join(f"{cell:<{room}}" for cell, room in zip(cells, longest, strict=True))
            reason = textwrap.wrap(why, max(width - start, 12)) or [""]
            lines += [f"{text}  {reason[0]}".rstrip(), *(" " * start + line for line in reason[1:])]
        run = [f"run on {self.inputs}"] if self.inputs else []
        return "\n".join([f"{self.model}: {self.summary()}", *lines, *run, *self.notes, self.size()])

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

    @property
    def angular_share(self) -> float | None:
        """The share in [0, 1] of the network's multiplications that belong to converted sites.

        None if the model could not be run, or the plan comes from a version that did not count them.
        """
        angular = sum(self.costs.sites.get(decision.name, 0) for decision in self.converted)
        return angular / self.costs.total if self.costs.total else None

    def size(self) -> str:
        """One line: the parameters of the model, and the share of its multiplications that is angular."""
        parameters = f"{self.parameters:,} parameters; " if self.parameters else ""
        share = self.angular_share
        if share is not None:
            return f"{parameters}{share:.1%} of the multiplications are angular"
        why = "this plan does not count them" if self.inputs else "the model was not run"
        return f"{parameters}the share of the multiplications that are angular is unknown: {why}"

    def to_json(self) -> str:
        """The plan as JSON text; operator objects appear by name only."""
        plain = {
            "version": PLAN_VERSION,
            "model": self.model,
            "inputs": self.inputs,
            "notes": self.notes,
            "details": self.details,
            "costs": dataclasses.asdict(self.costs),
            "parameters": self.parameters,
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
            counted = {"costs": Costs(**plain.get("costs", {})), "parameters": plain.get("parameters", 0)}
            return cls(plain["model"], decisions, notes, details, plain.get("inputs", ""), **counted)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"plan: not a conversion plan in JSON ({type(error).__name__}: {error})") from error


def _operator(decision: Decision) -> str:
    """The operator of a converted site with its numbers, its radius and its magnitude."""
    k = "" if decision.k is None else f" k={decision.k:g}"
    shared = f"/{decision.share_k}" if decision.share_k not in (None, "filter") else ""
    radius = f" ρ={decision.radius:g}" if decision.radius else ""
    learned = " learned" if decision.radius and decision.learn_radius else ""
    magnitude = "" if decision.magnitude is None else f", {decision.magnitude}"
    return f"{decision.operator or ''}{k}{shared}{radius}{learned}{magnitude}"


def _pattern(decision: Decision) -> Decision:
    """A decision without what only says where its site is: equal ones are alike for a reader of the plan."""
    return replace(
        decision, name="", reason=_without_norm(decision), norm=None, type="", shape=(), call=None, called=None,
        owns_norm=False, output_read_only=False,
    )  # fmt: skip


def _without_norm(decision: Decision) -> str:
    """The reason, without the name of the normalization that follows."""
    return decision.reason.replace(decision.norm, "its norm") if decision.norm else decision.reason


def _observed(model: nn.Module, inputs: Inputs) -> Observation:
    """Facts that runs of a copy of the model, with values, show."""
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
