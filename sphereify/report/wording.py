"""Numbers and names as the report writes them."""

import re

from sphereify.convert.plan import Decision


def amount(value: float) -> str:
    """A count in three digits, with the thousands as a letter.

    >>> amount(512), amount(11_689_512), amount(3_628_146_688)
    ('512', '11.7 M', '3.63 G')
    """
    if value < 1000:
        return f"{value:g}"
    power = 0
    while value >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {'kMGTP'[power - 1]}"


def percent(share: float) -> str:
    """A share in [0, 1], with one decimal where it is not whole.

    >>> percent(1.0), percent(0.98765), percent(0.9999), percent(0.0001)
    ('100 %', '98.8 %', '> 99.9 %', '< 0.1 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    shown = f"{100 * share:.1f}"
    shown = {"100.0": "> 99.9", "0.0": "< 0.1"}.get(shown, shown)
    return f"{shown} %"


def r2(value: float) -> str:
    """R²; below 0 the mean explains more, and by how much says little."""
    return "< 0" if value < 0 else f"{value:.3f}"


def shown_name(decision: Decision) -> str:
    """The name of a site; the model itself has none."""
    return decision.name or "(the model)"


def general_reason(decision: Decision) -> str:
    """The reason of a decision without the names that it has alone, so that like reasons are equal.

    >>> general_reason(Decision("layer1.conv", "conv2d", "convert", "layer1.bn rescales", norm="layer1.bn"))
    'its normalization rescales'
    """
    reason = decision.reason
    owner = decision.call.owner if decision.call is not None else None
    for name, general in ((decision.norm, "its normalization"), (owner, "its module")):
        if name:
            reason = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", general, reason)
    return reason


def steps(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers between two bounds, for the marks of an axis.

    >>> steps(0, 1), steps(63, 117)
    ([0.0, 0.5, 1.0], [75.0, 90.0, 105.0])
    """
    for step in (s * 10.0**e for e in range(-6, 9) for s in (1, 1.5, 2, 5)):
        first = -(-low // step)
        last = high // step
        if last - first + 1 <= most:
            return [step * place for place in range(int(first), int(last) + 1)]
    return []
