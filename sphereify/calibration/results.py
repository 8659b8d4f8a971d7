"""The results of a calibration: how much of each layer, and of the network, the angular form explains."""

import math
from dataclasses import dataclass, field
from typing import Any

from sphereify.convert.plan import count


@dataclass(frozen=True)
class LayerFit:
    """The share of a layer's original output that the angular layer explains on the calibration inputs.

    R² is the share of the variance over positions and filters: 1 for all of it, below 0 if worse than the mean. Where
    the output is added to a shortcut or passes a ReLU, R² refers to what comes out there: to the sum where a ReLU
    follows it, else to the layer's part in the sum. Where positions are few, it refers to positions that were held out.
    """

    name: str
    before: float
    """R² with copied weights, on the same inputs."""
    after: float
    """R² after the calibration."""
    rows: int
    """Positions of the layer's output that the fit looked at."""
    unknowns: int
    """Coefficients of one filter."""
    note: str = ""


@dataclass
class Calibration:
    """The outcome of `calibrate`.

    Attributes:
        layers: the fit of each converted layer that the inputs reach, by name, in the order in which they run.
        notes: remarks for the user: inputs outside the model's range, layers that were not reached.
        difference: loss of the outputs before and after the optimizer steps (see `distill`); None without steps.
    """

    layers: dict[str, LayerFit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    difference: tuple[float, float] | None = None

    @property
    def r2(self) -> dict[str, float]:
        """R² after the calibration, by layer."""
        return {name: layer.after for name, layer in self.layers.items()}

    def worst(self) -> list[LayerFit]:
        """The layers, the least explained first."""
        return sorted(self.layers.values(), key=lambda layer: layer.after)

    def summary(self) -> str:
        """One sentence on the fits, and one on the optimizer steps if there were any."""
        sentences = [f"{count(len(self.layers), 'layer')} calibrated"]
        if self.layers:
            mean, worst = sum(self.r2.values()) / len(self.layers), self.worst()[0]
            sentences[0] += f", R² {mean:.2f} on average, {worst.after:.2f} at {worst.name}"
        if self.difference is not None:
            before, after = self.difference
            sentences.append(f"steps: the outputs' error fell from {before:.3f} to {after:.3f} of their variance")
        return "\n".join(sentences)

    def to_json(self, **more: Any) -> dict[str, Any]:
        """The fits as plain JSON values, with `more` of them; a number that is not finite is None."""
        layers = {
            fit.name: {"copied": _finite(fit.before), "calibrated": _finite(fit.after)} for fit in self.layers.values()
        }
        return {"r2": layers, "notes": list(self.notes), **{name: _finite(value) for name, value in more.items()}}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Calibration":
        """The fits that an artifact tells of; it does not say on how many positions they are."""
        finite = {name: r2 for name, r2 in plain["r2"].items() if None not in r2.values()}
        layers = {name: LayerFit(name, r2["copied"], r2["calibrated"], 0, 0) for name, r2 in finite.items()}
        return cls(layers, list(plain["notes"]))

    def __str__(self) -> str:
        layers = [
            f"{fit.name}: R² {fit.before:.3f} copied, {fit.after:.3f} calibrated"
            + (f" ({fit.note})" if fit.note else "")
            for fit in self.layers.values()
        ]
        return "\n".join([self.summary(), *layers, *(f"note: {note}" for note in self.notes)])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
