"""Magnitudes h(‖x‖): how much of a patch's length an angular layer passes on (Decoupled Networks, CVPR 2018).

A layer then computes h(‖x‖)·g(θ), or in the weighted form ‖w‖·h(‖x‖)·g(θ). With r = ‖x‖ and u = ρ·m, where m is the
mean norm of patches:

    sphere      1                                  no length at all: SphereNets
    ball        min(r, u) / u                      bounded
    tanh        tanh(r / u)                        bounded and smooth
    linear      r                                  weighted, and with the cosine operator: a plain convolution
    segment     min(r, u) + β·max(r - u, 0)        one slope up to u, another one beyond
    log         log(1 + r)                         unbounded, with a falling slope
    mix         r + β·log(1 + r)

The paper's α is a scale, which SphereNorm's β or a BatchNorm holds. Of ball, tanh and segment ρ is 1 by default; log
and mix measure r itself, unless they are given a ρ: then they take r / u in its place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify import choices
from sphereify.errors import choose, invalid, option, refused


class Form(NamedTuple):
    """A form of h, and which numbers it takes."""

    of: Callable[[Tensor, Any, Any], Tensor]
    """(r, u, β) -> h, elementwise; u is None for lengths that are taken as they are."""
    radius: float | None = None
    """ρ by default; None: the lengths themselves."""
    takes_radius: bool = True
    beta: float | None = None
    """β by default; None: the form has none."""


def _in_units(r: Tensor, u: Any) -> Tensor:
    return r if u is None else r / u


def _segment(r: Tensor, u: Any, beta: float) -> Tensor:
    near = torch.minimum(r, u)
    return near + beta * (r - near)


def _mix(r: Tensor, u: Any, beta: float) -> Tensor:
    t = _in_units(r, u)
    return t + beta * t.log1p()


FORMS: dict[str, Form] = {
    "sphere": Form(lambda r, u, beta: torch.ones_like(r), takes_radius=False),
    "ball": Form(lambda r, u, beta: (r / u).clamp_max(1), radius=1.0),
    "tanh": Form(lambda r, u, beta: (r / u).tanh(), radius=1.0),
    "linear": Form(lambda r, u, beta: r, takes_radius=False),
    "segment": Form(_segment, radius=1.0, beta=0.5),
    "log": Form(lambda r, u, beta: _in_units(r, u).log1p()),
    "mix": Form(_mix, beta=1.0),
}


@dataclass(frozen=True)
class Magnitude:
    """A magnitude h(‖x‖) with its numbers. Plain data; what is None takes the default of its form.

    Args:
        form: a name from `sphereify.choices.MAGNITUDES`.
        weighted: True to multiply by ‖w‖, so that the lengths of filters matter.
        radius: ρ > 0, in units of the mean patch norm. Usual: 0.5 to 2.
        mean: where the mean patch norm comes from: "input", of each input and group by itself, or "data", a running
            mean over the training. Linear maps have one row for an input, and take "data" only.
        learned: True to learn ρ, one for each filter, starting at `radius`.
        beta: β ≥ 0 of segment (default 0.5) and of mix (default 1).

    Raises:
        UsageError: an unknown word, a number out of its range, or one that the form does not have.

    >>> Magnitude("tanh").of(torch.tensor([0.0, 2.0]), torch.tensor(1.0)).round(decimals=3)
    tensor([0.0000, 0.9640])
    """

    form: str = "sphere"
    weighted: bool = False
    radius: float | None = None
    mean: str = "input"
    learned: bool = False
    beta: float | None = None

    def __post_init__(self) -> None:
        for name, words in (("form", choices.MAGNITUDES), ("mean", choices.MAGNITUDE_MEANS)):
            word = choices.canonical(str(getattr(self, name)))
            if word not in words:
                raise choose("magnitude" if name == "form" else "magnitude_mean", getattr(self, name), words)
            object.__setattr__(self, name, word)
        form = FORMS[self.form]
        self._check_radius(form)
        if self.beta is not None and form.beta is None:
            raise refused("magnitude_beta", f"{self.form} has no β; segment and mix have one")
        if self.beta is not None and not (_is_finite(self.beta) and self.beta >= 0):
            raise invalid("magnitude_beta", self.beta, "a finite number of at least 0", "Usual: 0.1 to 1")
        object.__setattr__(self, "beta", form.beta if self.beta is None else float(self.beta))

    def _check_radius(self, form: Form) -> None:
        settings = {
            "magnitude_radius": self.radius is not None,
            "magnitude_mean": self.mean != "input",
            "learn_magnitude_radius": self.learned,
        }
        used = next((name for name, is_set in settings.items() if is_set), None)
        if used is not None and not form.takes_radius:
            others = ", ".join(name for name, other in FORMS.items() if other.takes_radius)
            shown = self.mean if used == "magnitude_mean" else None
            raise refused(used, f"{option('magnitude', self.form)} has no ρ; {others} have one", value=shown)
        if self.radius is not None and not (_is_finite(self.radius) and self.radius > 0):
            raise invalid("magnitude_radius", self.radius, "a finite number above 0", "Usual: 0.5 to 2")
        radius = form.radius if used is None else self.radius or 1.0
        object.__setattr__(self, "radius", None if radius is None else float(radius))

    @property
    def is_sphere(self) -> bool:
        """True if no length has an effect, neither of patches nor of filters: the paper's layer."""
        return self.form == "sphere" and not self.weighted

    @property
    def keeps_scale(self) -> bool:
        """True if the output is proportional to both lengths, as that of a plain layer is."""
        return self.form == "linear" and self.weighted

    def of_rows(self) -> "Magnitude":
        """This magnitude for a linear map, whose inputs are single rows: ρ is relative to the data."""
        return self if self.radius is None else replace(self, mean="data")

    def of(self, norm: Tensor, unit: Any = None) -> Tensor:
        """h for patches of these norms; `unit` is u = ρ·m, None where the form takes the norms as they are."""
        return FORMS[self.form].of(norm, unit, self.beta)

    def at_mean(self, norm: Tensor) -> Tensor:
        """h where the norm of a patch is the mean of all."""
        return self.of(norm, None if self.radius is None else self.radius * norm)

    def __str__(self) -> str:
        numbers = [
            "" if self.radius is None else f"ρ={self.radius:g}" + " learned" * self.learned,
            "of the data" if self.radius is not None and self.mean == "data" else "",
            "" if self.beta is None else f"β={self.beta:g}",
        ]
        return " ".join(filter(None, ["weighted" if self.weighted else "", self.form, *numbers]))


SPHERE = Magnitude()
"""The magnitude of the paper: none."""


def make_magnitude(magnitude: str | Magnitude, weighted: bool = False) -> Magnitude:
    """A magnitude from its name, with the defaults of its form; one that is made already as it is.

    Raises:
        UsageError: as `Magnitude`.
    """
    if isinstance(magnitude, Magnitude):
        return replace(magnitude, weighted=True) if weighted else magnitude
    return Magnitude(magnitude, weighted=weighted)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
