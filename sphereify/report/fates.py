"""Fates of a layer in a conversion, in classes that a reader tells apart at a glance."""

from dataclasses import dataclass

from sphereify.convert.notes import NOT_GIVEN
from sphereify.convert.plan import KEPT_SHORTCUT, Decision
from sphereify.convert.planner import BY_PATTERN


@dataclass(frozen=True)
class Fate:
    """A class of decisions."""

    key: str
    """Its colour: a class of the style sheet."""
    label: str
    is_angular: bool = False


OPERATORS = {
    "cosine": Fate("cosine", "cosine", True),
    "linear": Fate("linear", "linear", True),
    "sigmoid": Fate("sigmoid", "sigmoid", True),
    "learnable-sigmoid": Fate("learnable", "learnable sigmoid", True),
}
"""Converted layers, by operator."""
OWN = Fate("own", "an operator of your own", True)
HEAD = Fate("head", "angular classifier", True)
ALREADY = Fate("already", "angular before", True)
SHORTCUT = Fate("shortcut", "kept: shortcut")
ASKED = Fate("asked", "kept: as asked")
ATTENTION = Fate("attention", "kept: attention")
CLASSIFIER = Fate("classifier", "kept: classifier")
UNUSED = Fate("unused", "kept: not called")
OTHER = Fate("other", "kept: cannot be angular")

ALL = (*OPERATORS.values(), OWN, HEAD, ALREADY, SHORTCUT, ASKED, ATTENTION, CLASSIFIER, UNUSED, OTHER)
"""Each class, in the order of the legend."""


def fate_of(decision: Decision) -> Fate:
    """The class of a decision."""
    if decision.action == "convert":
        return HEAD if decision.head else OPERATORS.get(decision.operator or "", OWN)
    reason = decision.reason
    if reason == "already angular":
        return ALREADY
    if decision.called is False or reason.startswith(("never called", NOT_GIVEN)):
        return UNUSED
    if reason == KEPT_SHORTCUT:
        return SHORTCUT
    if reason in BY_PATTERN or reason.startswith("depthwise convolution"):
        return ASKED
    if reason.startswith("projection of"):
        return ATTENTION
    return CLASSIFIER if decision.role in ("classifier", "auxiliary") else OTHER
