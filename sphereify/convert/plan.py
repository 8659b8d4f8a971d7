"""The plan of a conversion: one decision for each convolution and linear map of a model, and why. Plain data."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from sphereify.convert.graph import ATTENTION, in_order, skeleton
from sphereify.convert.observe import Call, Inputs, run
from sphereify.errors import ArtifactError, UsageError

PLAN_VERSION = 1


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
    output_read_only: bool = False
    """True if nothing changes the layer's output in place, because a normalization alone reads it."""
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
            decisions = [_decision(d) for d in plain["decisions"]]
            return cls(plain["model"], decisions, list(plain["notes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"plan: not a conversion plan in JSON ({type(error).__name__}: {error})") from error


def _decision(plain: dict[str, Any]) -> Decision:
    fields = {RENAMED.get(name, name): value for name, value in plain.items()}
    about = {"aliases": tuple(fields["aliases"]), "shape": tuple(fields["shape"]), "call": _call(fields["call"])}
    return Decision(**{**fields, **about})


RENAMED = {"only_read": "output_read_only"}
"""Fields of a decision by the names that plans written earlier give them."""


def _call(plain: dict[str, Any] | None) -> Call | None:
    return None if plain is None else Call(**{**plain, "shape": tuple(plain["shape"])})


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
