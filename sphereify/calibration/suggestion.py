"""A radius and layers to leave as they are, with which a converted network gives the original's answers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sphereify.calibration.agreement import POSITIONS, RadiusSearch, Trial, plan_with_radius
from sphereify.calibration.batches import checked_batches
from sphereify.calibration.held_out import HeldOut, divide
from sphereify.calibration.least_squares import calibrate
from sphereify.calibration.options import SuggestionOptions
from sphereify.calibration.results import LayerFit
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.nn.modules import check_module
from sphereify.options import checked_option, with_keywords_of
from sphereify.patterns import pattern_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Suggestion:
    """The radius, the layers to keep, and what conversions with other radii or other layers kept would give.

    Attributes:
        layers: the fit of each layer with all of them converted, the least explained first.
        trials: the agreement with the original by the number of layers kept, counted from the first in `layers`.
        exclude: a pattern for each layer to keep: the fewest with which the goal was reached; if it was not, all that
            were tried.
        goal: the agreement asked for.
        agreement: the agreement on inputs that nothing was chosen by, with the suggested layers kept.
        given: the conversion options that were passed to `suggest`.
        radius: the smallest radius that is enough, else the best one; None if there was none to choose.
        radii: the trials of the search for it.
        pooled: the names of the convolutions that have a radius with all layers converted.

    The agreement is the share of held-out inputs to which both networks give one class; for outputs that are no class
    scores, the share of their variance that the converted network explains.
    """

    layers: list[LayerFit]
    trials: dict[int, float]
    exclude: list[str]
    goal: float
    agreement: float
    given: ConversionKeywords = field(default_factory=lambda: ConversionKeywords())
    radius: float | None = None
    radii: list[Trial] = field(default_factory=list)
    pooled: list[str] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """True if what was asked for holds on the inputs of the choice and on those that nothing was chosen by."""
        return min(self.trials[len(self.exclude)], self.agreement) >= self.goal

    @property
    def overrides(self) -> dict[str, Any]:
        """The suggested layers as overrides, followed by the given ones, of which the first match wins.

        Overrides win over `exclude`: where some were given, `exclude` alone may have no effect.
        """
        return _overrides(self.exclude, self.given)

    @property
    def options(self) -> ConversionKeywords:
        """Conversion options that keep the suggested layers: `sphereify(model, **suggestion.options)`."""
        return _options(self.exclude, self.radius, self.given, self.pooled)


def _overrides(exclude: list[str], options: ConversionKeywords) -> dict[str, Any]:
    settings = options.get("overrides") or {}
    return {**dict.fromkeys(exclude, "keep"), **{p: v for p, v in settings.items() if p not in exclude}}


def _options(
    exclude: list[str], radius: float | None, options: ConversionKeywords, pooled: list[str]
) -> ConversionKeywords:
    chosen: dict[str, Any] = {}
    if pooled and {pattern_of(name) for name in pooled} <= set(exclude):
        chosen = {"radius": 0.0, "learn_radius": False}  # a radius that no layer takes would be refused
    elif radius is not None:
        chosen = {"radius": radius} if radius else {"learn_radius": False}
    overrides = {"overrides": _overrides(exclude, options)} if exclude else {}
    return cast(ConversionKeywords, {**options, **chosen, **overrides})


@with_keywords_of(ConversionOptions)
def suggest(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    loss: float = SuggestionOptions.loss,
    example_inputs: Inputs = None,
    on_trial: Callable[[int, float], None] = lambda excluded, agreement: None,
    on_radius: Callable[[Trial], None] = lambda trial: None,
    **options: "Unpack[ConversionKeywords]",
) -> Suggestion:
    """Find a radius, and the fewest layers to exclude, for a converted, calibrated network to agree with the original.

    All layers are converted and calibrated with the radius that `choose_radius` would take for all of them, or the one
    given. If that is not enough, those layers that the calibration explains least are excluded, as many as bisection
    shows to be needed, each time with a calibration of its own. No labels are needed: the accuracy cannot fall by more
    than the share of inputs on which the networks disagree.

    Args:
        model: the trained network. It is not changed.
        batches: as for `calibrate`; an eighth is held out to choose by, and another one to report the agreement on.
        loss: largest accepted share of disagreement, in (0, 1).
        example_inputs: as for `plan_conversion`.
        on_trial: called after each trial with the number of excluded layers and the agreement.
        on_radius: called after each trial of a radius.
        {options}

    Raises:
        UsageError: a loss outside (0, 1), fewer than 8 inputs, or options that `plan_conversion` does not take.
        ArgumentTypeError: the model is no module.
    """
    check_module(model)
    checked_option(SuggestionOptions, "loss", loss)
    division = divide(checked_batches(batches), "suggest")
    held_out, unused = (HeldOut(model, part, "suggest") for part in (division.choice, division.report))
    goal = 1 - loss
    search = _radius_search(model, division.fit, held_out, goal, example_inputs, options, on_radius)
    radius = None if search is None else search.smallest().radius
    trials: dict[int, float] = {}
    layers: list[LayerFit] = []
    networks: dict[int, nn.Module] = {}
    pooled: list[str] = []

    def agreement_without(number: int) -> float:
        if number not in trials:
            trial_options = _options([pattern_of(layer.name) for layer in layers[:number]], radius, options, pooled)
            if number == 0 and search is not None:
                _, networks[0], calibration = search.best
            else:
                networks[number] = apply_plan(
                    model, plan_conversion(model, example_inputs=example_inputs, **trial_options)
                )
                calibration = calibrate(networks[number], model, division.fit, positions=POSITIONS)
            if not layers:
                layers.extend(calibration.worst())
                pooled.extend(d.name for d in networks[number].conversion_plan.converted if d.radius)  # type: ignore[union-attr]
            trials[number] = held_out.agreement(networks[number])
            on_trial(number, trials[number])
        return trials[number]

    if agreement_without(0) < goal:
        low, high = 0, len(layers) - 1
        if high > low and agreement_without(high) >= goal:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if agreement_without(middle) >= goal else (middle, high)
    enough = [number for number, agreement in trials.items() if agreement >= goal]
    number = min(enough) if enough else max(trials)
    return Suggestion(
        layers,
        dict(sorted(trials.items())),
        [pattern_of(layer.name) for layer in layers[:number]],
        goal,
        unused.agreement(networks[number]),
        options,
        radius,
        search.trials if search is not None else [],
        pooled,
    )


def _radius_search(
    model: nn.Module,
    fit: list[ModelArguments],
    held_out: HeldOut,
    goal: float,
    example_inputs: Inputs,
    options: ConversionKeywords,
    on_radius: Callable[[Trial], None],
) -> RadiusSearch | None:
    """The search for a radius; None if one was given, or if no layer may have one."""
    if options.get("radius"):
        return None
    plan, names = plan_with_radius(model, example_inputs, options)
    if not names:
        return None
    return RadiusSearch(model, plan, names, fit, held_out, goal, on_trial=on_radius)
