"""The energy of every layer of a model, as a table."""

import shutil
from dataclasses import dataclass

from sphereify.wording import shortened_name


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one layer."""

    layer: str
    groups: int
    filters: int
    """Number of filters in each group."""
    fan_in: int
    energy: float
    least: float | None
    """The minimum where it is known, which it is for at most fan_in + 1 filters in the full space; otherwise None."""
    is_output: bool


@dataclass(frozen=True)
class EnergyReport:
    """The energy of every layer of a model; prints as a table as wide as the terminal.
    `sphereify.plots.plot_energy` draws it."""

    layers: list[LayerEnergy]
    measure: str
    """Kind, options and space of the energy, as it prints itself."""

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.layer) for row in self.layers))
        width = min(width, max(shutil.get_terminal_size().columns - 42, 12))
        wide = max(8, *(len(f"{row.energy:.4f}") for row in self.layers))
        lines = [
            f"hyperspherical energy ({self.measure})",
            f"{'layer':<{width}}  {'filters':>9}  fan-in  {'energy':>{wide}}  {'least':>8}",
        ]
        for row in self.layers:
            filters = f"{row.groups}×{row.filters}" if row.groups > 1 else str(row.filters)
            least = "" if row.least is None else f"{row.least:.4f}"
            numbers = f"{filters:>9}  {row.fan_in:>6}  {row.energy:>{wide}.4f}  {least:>8}"
            lines.append(f"{shortened_name(row.layer, width):<{width}}  {numbers}".rstrip())
        return "\n".join(lines)
