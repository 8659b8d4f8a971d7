"""The contents of a report, gathered from a plan, a network and what was measured of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sphereify.calibration.layer_pairs import path_of
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.copies import skeletons
from sphereify.convert.costs import costs
from sphereify.convert.multiplied import Costs
from sphereify.convert.observe import observe_model
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.errors import first_line
from sphereify.nn import HypersphericalEnergy
from sphereify.nn.energy_report import EnergyReport
from sphereify.nn.filters import filter_banks
from sphereify.report.angles import Angles, few, measure_angles
from sphereify.report.fates import Fate, fate_of

MOST_FILTERS = 4096
"""Layers with more filters have no energy in the report: it would take longer than all else together."""


@dataclass(frozen=True)
class Contents:
    """All that a report shows. What is not known is None or empty; its part of the report is left out, or says so."""

    name: str
    """Name of the model for the title."""
    plan: ConversionPlan
    costs: Costs
    radii: dict[str, float]
    """ρ of each converted convolution, as it is now."""
    parameters: int | None = None
    parameters_before: int | None = None
    """Parameters of the original."""
    calibration: Calibration | None = None
    angles: Angles | None = None
    energy: EnergyReport | None = None
    without_energy: tuple[str, ...] = ()
    """Layers with too many filters for an energy."""
    robustness: Mapping[str, Any] | None = None
    """The robustness, as in robustness.json."""
    epochs: Sequence[Mapping[str, Any]] = ()
    """The epochs of the training, as in metrics.jsonl."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further numbers for the summary, by what they are."""
    options: Sequence[str] = ()
    """Options that are not at their defaults, each as it is written."""

    @property
    def fates(self) -> dict[str, Fate]:
        """The fate of each site."""
        return {decision.name: fate_of(decision) for decision in self.plan.decisions}

    @property
    def angular(self) -> list[Decision]:
        """The sites that are angular now."""
        fates = self.fates
        return [decision for decision in self.plan.decisions if fates[decision.name].is_angular]

    @property
    def kept(self) -> list[Decision]:
        """The other sites."""
        fates = self.fates
        return [decision for decision in self.plan.decisions if not fates[decision.name].is_angular]

    @property
    def share(self) -> float | None:
        """The share of the multiplications that are those of angular sites; None if they were not counted."""
        total = self.costs.total
        return sum(self.costs.sites.get(d.name, 0) for d in self.angular) / total if total else None

    @property
    def fits(self) -> list[LayerFit]:
        """The fits of the layers that were calibrated, the least explained first; none without a calibration."""
        return self.calibration.worst() if self.calibration is not None else []

    def r2(self, decision: Decision) -> float | None:
        """R² of a layer after the calibration; None for one that was not calibrated."""
        fit = self.calibration.layers.get(decision.name) if self.calibration is not None else None
        return None if fit is None else fit.after


def contents_of_plan(plan: ConversionPlan, name: str, **parts: Any) -> Contents:
    """The contents of a report on a plan alone."""
    return Contents(name or plan.model.rpartition(".")[2], plan, plan.costs, _planned_radii(plan), **parts)


def contents_of_model(
    model: nn.Module,
    plan: ConversionPlan,
    name: str,
    *,
    original: nn.Module | None = None,
    inputs: Inputs = None,
    described: str = "",
    **parts: Any,
) -> Contents:
    """The contents of a report on a converted network; the arguments are those of `write_report`."""
    energy, without = _energy(model)
    return Contents(
        name or type(model).__name__,
        plan,
        _costs(model, plan),
        _radii(model, plan),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parameters_before=None if original is None else sum(parameter.numel() for parameter in original.parameters()),
        angles=_angles(model, original, inputs, described),
        energy=energy,
        without_energy=without,
        **parts,
    )


def _costs(model: nn.Module, plan: ConversionPlan) -> Costs:
    """The costs of the plan; those of a run where an earlier version made it."""
    if plan.costs.total:
        return plan.costs
    try:
        return costs(model)
    except Exception:  # a forward may raise anything
        return Costs()


def _planned_radii(plan: ConversionPlan) -> dict[str, float]:
    return {decision.name: decision.radius for decision in _with_patches(plan)}


def _with_patches(plan: ConversionPlan) -> list[Decision]:
    """The converted convolutions, which may have a radius."""
    return [decision for decision in plan.converted if decision.kind.startswith("conv")]


def _radii(model: nn.Module, plan: ConversionPlan) -> dict[str, float]:
    """The radii that the layers have, which may have learned them."""
    return {
        decision.name: getattr(model.get_submodule(path_of(decision)), "radius_value", decision.radius)
        for decision in _with_patches(plan)
    }


def _energy(model: nn.Module) -> tuple[EnergyReport | None, tuple[str, ...]]:
    """The energy of each layer, and the layers that are left out for their number of filters."""
    banks = list(filter_banks(model))
    large = tuple(bank.layer for bank in banks if bank.filters.shape[1] > MOST_FILTERS)
    if len(large) == len(banks):
        return None, large
    patterns = [f"re:{re.escape(name)}$" for name in large]
    return HypersphericalEnergy(exclude=patterns or None).report(model), large


def _angles(model: nn.Module, original: nn.Module | None, inputs: Inputs, described: str) -> Angles:
    """The angles on a few of the inputs that are given, or on those that the network is assumed to take."""
    if inputs is not None:
        arguments = few(ModelArguments.of(inputs))
        return measure_angles(model, original, arguments, described=described)
    try:
        seen = observe_model(next(skeletons(model if original is None else original)))
    except Exception as error:  # whatever a user's __deepcopy__ raises
        return Angles(reason=first_line(error))
    if seen.error:
        return Angles(reason=seen.error)
    noise = f"assumed inputs, filled with noise: {seen.arguments.described()}"
    return measure_angles(model, original, seen.arguments, described=noise)
