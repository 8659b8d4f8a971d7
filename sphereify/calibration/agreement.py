"""The pooled radius, chosen by how far the calibrated network agrees with the original on held-out inputs.

A larger radius keeps more of what the original computes, a smaller one leaves more of the invariance to local contrast.
So the radius wanted is the smallest one whose network still gives the asked share of inputs the original's class. It is
looked for on a short ladder by bisection, then once more between two rungs, on a logarithmic scale. Last, each layer
may get a radius of its own: the smallest one with which its fit is as good as with any other.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sphereify.annotations import CALIBRATION_FIT, PLAN
from sphereify.calibration.batches import checked_batches
from sphereify.calibration.distillation import check_steps, distill
from sphereify.calibration.held_out import HeldOut, divide
from sphereify.calibration.least_squares import calibrate
from sphereify.calibration.network_state import on_device
from sphereify.calibration.options import CalibrationOptions
from sphereify.calibration.results import Calibration
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.notes import radius_notes
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.errors import UsageError, no_effect, option, refused
from sphereify.nn.modules import check_module
from sphereify.options import checked_option, with_keywords_of
from sphereify.patterns import Patterns, pattern_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

LADDER = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Radii among which bisection looks for the smallest one that is enough."""
POSITIONS = 16_384
"""Positions that a layer is fitted to: a quarter of the usual number agrees as much, in less than half the time."""
EQUAL_FIT = 0.005
"""Difference of R² below which a layer is fitted equally well."""


@dataclass(frozen=True)
class Trial:
    """A calibrated network, with one radius for all layers or with one of each layer's own.

    Attributes:
        radii: the radius of each convolution whose radius was to be chosen.
        agreement: share of the inputs held out for the choice to which the network gives the original's class.
        contrast: share of these inputs whose class stays the same at 0.3 of their contrast.
        r2: R² of each layer.
    """

    radii: dict[str, float]
    agreement: float
    contrast: float
    r2: dict[str, float] = field(repr=False)

    @property
    def radius(self) -> float:
        """The radius of all layers; the largest one where they differ."""
        return max(self.radii.values())

    @property
    def is_uniform(self) -> bool:
        """True if all layers have one radius."""
        return len(set(self.radii.values())) == 1

    @property
    def described(self) -> str:
        """The radii in a few words."""
        if self.is_uniform:
            return f"ρ = {self.radius:.3g}"
        return f"ρ of each layer's own, {min(self.radii.values()):.3g} to {self.radius:.3g}"


@dataclass(frozen=True)
class RadiusChoice:
    """The outcome of `choose_radius`: the radius, the network that has it, and how far it agrees with the original.

    Attributes:
        goal: the share of agreement asked for.
        chosen: the trial whose radii were chosen.
        trials: all trials in their order.
        agreement: share of inputs with the original's class, on inputs that neither the calibration nor the choice
            has seen, after the optimizer steps if there were any.
        contrast: share of these inputs whose class stays the same at 0.3 of their contrast.
        inputs: number of inputs to fit, to choose, and to report on.
        network: the converted and calibrated network.
        calibration: the fit of each of its layers.
        given: the conversion options that were passed to `choose_radius`.
    """

    goal: float
    chosen: Trial
    trials: list[Trial]
    agreement: float
    contrast: float
    inputs: tuple[int, int, int]
    network: nn.Module = field(repr=False)
    calibration: Calibration = field(repr=False)
    given: ConversionKeywords = field(repr=False)

    @property
    def radius(self) -> float:
        """The chosen radius; the largest one where layers have radii of their own."""
        return self.chosen.radius

    @property
    def reached(self) -> bool:
        """True if the goal holds both on the inputs that chose the radius and on those that nothing was chosen by."""
        return min(self.chosen.agreement, self.agreement) >= self.goal

    @property
    def plan(self) -> ConversionPlan:
        """The plan of the network, which holds the chosen radii."""
        return PLAN.required(self.network)

    @property
    def options(self) -> ConversionKeywords:
        """Conversion options with the chosen radii: `sphereify(model, **choice.options)`."""
        return options_with(self.given, self.chosen.radii)

    def summary(self) -> str:
        """A sentence on the radius and the agreement, and on what was asked for if it was not reached."""
        _, for_choice, for_report = self.inputs
        sentence = (
            f"{self.chosen.described}: {self.agreement:.1%} of {for_report} held-out inputs get the original's class "
            f"({self.chosen.agreement:.1%} of the {for_choice} that chose it)"
        )
        if self.reached:
            return sentence
        return f"an agreement of {self.goal:.1%} was not reached; {sentence}"


@with_keywords_of(ConversionOptions)
def choose_radius(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    agreement: float = 0.98,
    steps: int = 0,
    contrast_jitter: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    example_inputs: Inputs = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    on_layer: Callable[[str, float], None] = lambda name, explained: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **options: "Unpack[ConversionKeywords]",
) -> RadiusChoice:
    """Find the smallest radius with which a converted, calibrated network agrees with the original, without labels.

    Three quarters of the inputs are for calibrations, an eighth for the choice of the radius. The last eighth only says
    how far the chosen network agrees, so that this number holds for inputs that were not used.

    Args:
        model: the trained network, which returns class scores of shape (B, K). It is not changed.
        batches: as for `calibrate`; 1,000 to 2,000 images are usual.
        agreement: share of held-out inputs, in (0, 1), that must get the original's class. The choice asks for one
            standard error more, since a share that is just reached where it was chosen is missed elsewhere.
        steps: number of optimizer steps of the chosen network towards the original's outputs; see `distill`.
        contrast_jitter: True for steps in which the converted network sees the images at lower contrast; see `distill`.
        seed: random seed; see `calibrate`.
        device: where to run; see `calibrate`.
        example_inputs: as for `plan_conversion`.
        on_trial: called after each trial.
        on_layer: called after each layer of each trial with its name and R².
        on_step: called after each step with its number and loss.
        {options}

    Returns:
        The choice. Where no radius is enough, it is the one that agrees best, and `reached` is False.

    Raises:
        UsageError: an agreement outside (0, 1), a radius given as well, no converted convolution that may pool, outputs
            that are no class scores, fewer than 8 inputs, or options that `plan_conversion` does not take.
        ArgumentTypeError: the model is no module.
    """
    check_module(model)
    check_agreement(agreement, options)
    check_steps(steps)
    division = divide(checked_batches(batches), "agreement")
    plan, names = plan_with_radius(model, example_inputs, options)
    if not names:
        raise no_effect(
            "agreement",
            since="there is no convolution whose radius could be chosen: linear maps have no patches, and causal "
            "convolutions must not look ahead. Leave it out.",
        )
    home = next(model.parameters()).device
    with on_device(device, model) as target:
        fit, choice, report = (_moved(part, target) for part in (division.fit, division.choice, division.report))
        held_out, unused = HeldOut(model, choice, "agreement"), HeldOut(model, report, "agreement")
        if not held_out.has_classes:
            raise refused(
                "agreement",
                f"needs class scores of shape (B, K), K > 1, on which two networks can agree; this one returns "
                f"something else. Choose {option('radius')} yourself; usual: 1 to 4.",
            )
        search = RadiusSearch(model, plan, names, fit, held_out, agreement, seed, on_trial, on_layer)
        search.smallest()
        search.with_own_radii()
        chosen, network, calibration = search.best
        if steps:
            calibration.difference = distill(
                network, model, fit, steps=steps, seed=seed, contrast_jitter=contrast_jitter, on_step=on_step
            )
        result = RadiusChoice(
            agreement,
            chosen,
            search.trials,
            unused.agreement(network),
            unused.contrast_agreement(network),
            (sum(len(batch.tensors()[0]) for batch in fit), held_out.count, unused.count),
            network,
            calibration,
            options,
        )
    network.to(home)
    noted = replace(result.plan, notes=[*result.plan.notes, f"radius chosen by agreement: {_told(result)}"])
    PLAN.write(network, noted)
    CALIBRATION_FIT.write(network, calibration.to_json(steps=steps, **_measured(result)))
    return result


def _measured(choice: RadiusChoice) -> dict[str, Any]:
    """The agreement of a choice as plain JSON values."""
    inputs, _, reported = choice.inputs
    return {
        "inputs": inputs,
        "agreement": choice.agreement,
        "agreement_inputs": reported,
        "low_contrast_agreement": choice.contrast,
    }


def _told(choice: RadiusChoice) -> str:
    asked = f"{choice.goal:.1%} asked for" + ("" if choice.reached else " and not reached")
    return f"{choice.chosen.described}, {choice.agreement:.1%} of held-out inputs get the original's class ({asked})"


def check_agreement(agreement: object, options: ConversionKeywords) -> None:
    """Make sure that a share of agreement is valid, and that no radius was given as well.

    Raises:
        UsageError: a share outside (0, 1), or a radius.
    """
    checked_option(CalibrationOptions, "agreement", agreement, required=True)
    if options.get("radius"):
        raise refused(
            "radius", f"{option('agreement')} chooses the radius; give one of the two", value=options["radius"]
        )


def plan_with_radius(
    model: nn.Module, example_inputs: Inputs, options: ConversionKeywords
) -> tuple[ConversionPlan, list[str]]:
    """A plan with a radius of 1 wherever one may be chosen, and the names of these convolutions.

    There are none where no converted convolution may pool, and where overrides set every radius.
    """
    without = cast(ConversionKeywords, {**options, "learn_radius": False})
    plain = plan_conversion(model, example_inputs=example_inputs, **without)
    try:
        plan, other = (
            plan_conversion(model, example_inputs=example_inputs, **cast(ConversionKeywords, {**options, "radius": r}))
            for r in (1.0, 2.0)
        )
    except UsageError:
        plan = other = plain  # a radius has no effect there
    names = [a.name for a, b in zip(plan.decisions, other.decisions, strict=True) if a.radius != b.radius]
    return plan, names


def options_with(options: ConversionKeywords, radii: dict[str, float]) -> ConversionKeywords:
    """Conversion options with these radii added: one for all, or as overrides where they differ."""
    if not any(radii.values()):
        return cast(ConversionKeywords, {**options, "learn_radius": False, "radius": 0.0})
    if len(set(radii.values())) == 1:
        return cast(ConversionKeywords, {**options, "radius": next(iter(radii.values()))})
    settings: dict[str, Any] = dict(options.get("overrides") or {})
    overrides = Patterns("overrides", settings.keys())
    own = {}
    for name, radius in radii.items():
        matched = overrides.match((name,))
        own[pattern_of(name)] = {**(settings[matched] if matched is not None else {}), "radius": radius}
    largest = max(radii.values())
    return cast(ConversionKeywords, {**options, "radius": largest, "overrides": {**own, **settings, **own}})


class RadiusSearch:
    """Calibrated networks with different radii, and the search among them.

    Args:
        model: the original.
        plan: from `plan_with_radius`.
        names: the convolutions whose radius is to be chosen.
        fit: inputs for the calibrations.
        held_out: inputs to choose by.
        goal: the agreement asked for.
        seed, on_trial, on_layer: see `choose_radius`.

    Attributes:
        trials: all trials so far.
        best: the best of them, with its network and its calibration. The smallest radius that is enough is best, and
            where none is, the one that agrees most.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ConversionPlan,
        names: list[str],
        fit: list[ModelArguments],
        held_out: HeldOut,
        goal: float,
        seed: int = 0,
        on_trial: Callable[[Trial], None] = lambda trial: None,
        on_layer: Callable[[str, float], None] = lambda name, explained: None,
    ):
        self.trials: list[Trial] = []
        self._model = model
        self._plan = plan
        self._names = names
        self._fit = fit
        self._held_out = held_out
        self._goal = goal
        margin = math.sqrt(goal * (1 - goal) / held_out.count) if held_out.has_classes else 0.0
        self._safe_goal = min(1.0, goal + margin)
        self._seed = seed
        self._on_trial = on_trial
        self._on_layer = on_layer
        self.best: tuple[Trial, nn.Module, Calibration]

    def smallest(self) -> Trial:
        """The trial with the smallest radius that is enough for all layers; the best one if none is."""
        low, high = -1, len(LADDER)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_enough(LADDER[middle]) else (middle, high)
        if high < len(LADDER) and low >= 0 and LADDER[low] > 0:
            self._is_enough(math.sqrt(LADDER[low] * LADDER[high]))
        return self.best[0]

    def with_own_radii(self) -> None:
        """Try radii of the layers' own. They are best if they agree more and are as indifferent to contrast.

        A layer's own radius is the smallest one that was tried with which its R² is the highest, or nearly so.
        """
        uniform = self.best[0]
        radii = {}
        for name in self._names:
            fits = {trial.radii[name]: trial.r2[name] for trial in self.trials if name in trial.r2}
            highest = max(fits.values(), default=0.0)
            radii[name] = min((r for r, r2 in fits.items() if r2 >= highest - EQUAL_FIT), default=uniform.radius)
        if len(set(radii.values())) == 1:
            return
        own, network, calibration = self._tried(radii)
        if own.agreement > uniform.agreement and own.contrast >= uniform.contrast:
            self.best = own, network, calibration

    def _is_enough(self, radius: float) -> bool:
        tried = self._tried(dict.fromkeys(self._names, radius))
        if len(self.trials) == 1 or self._rank(tried[0]) > self._rank(self.best[0]):
            self.best = tried
        return tried[0].agreement >= self._safe_goal

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        enough = trial.agreement >= self._safe_goal
        return enough, 0.0 if enough else trial.agreement, -trial.radius

    def _tried(self, radii: dict[str, float]) -> tuple[Trial, nn.Module, Calibration]:
        network = apply_plan(self._model, self._plan_with(radii))
        calibration = calibrate(
            network, self._model, self._fit, seed=self._seed, positions=POSITIONS, on_layer=self._on_layer
        )
        contrast = self._held_out.contrast_agreement(network) if self._held_out.has_classes else math.nan
        trial = Trial(radii, self._held_out.agreement(network), contrast, calibration.r2)
        self.trials.append(trial)
        self._on_trial(trial)
        return trial, network, calibration

    def _plan_with(self, radii: dict[str, float]) -> ConversionPlan:
        decisions = [
            replace(d, radius=radii[d.name], learn_radius=d.learn_radius and radii[d.name] > 0)
            if d.name in radii
            else d
            for d in self._plan.decisions
        ]
        before, now = radius_notes(self._plan.decisions), radius_notes(decisions)
        notes = [*(note for note in self._plan.notes if note not in before), *now]
        return replace(self._plan, decisions=decisions, notes=notes)


def _moved(inputs: list[ModelArguments], device: torch.device | None) -> list[ModelArguments]:
    if device is None:
        return inputs
    return [batch.to(device) for batch in inputs]
