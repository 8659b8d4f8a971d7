"""What a user may ask of a conversion, each option once. Imports no torch, so that `--help` answers at once."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from sphereify import choices
from sphereify.errors import UsageError, choose, invalid, option
from sphereify.options import check_options, option_field
from sphereify.patterns import PatternList

if TYPE_CHECKING:
    import torch

    OperatorLike = str | Callable[[torch.Tensor], torch.Tensor]
else:
    OperatorLike = str | Callable
"""An operator's name, or a callable cos θ -> g(θ)."""

Overrides = Mapping[str, Mapping[str, Any] | str] | None

ANGLES, WHERE = "Angular layers", "Which layers"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert a network.

    Raises:
        UsageError: a value that is not valid, or that has no effect on the others.
    """

    operator: OperatorLike = option_field(
        "cosine",
        f"g(θ) in place of the inner product: {_listed(choices.OPERATORS)}.",
        panel=ANGLES,
    )
    k: float | None = option_field(
        None,
        "Curvature of the sigmoid (default 0.3), or start of a learnable one (default 0.5).",
        panel=ANGLES,
        usual="0.1 to 0.7",
    )
    share_k: str = option_field(
        "filter",
        f"What shares one learnable k: {_listed(choices.SHARE_K)}.",
        panel=ANGLES,
        choices=choices.SHARE_K,
    )
    skip_shortcuts: bool = option_field(False, "Keep 1×1 convolutions on residual shortcuts.", panel=WHERE)
    head: str = option_field(
        "auto",
        f"Classifier: {_listed(choices.HEADS)}. auto: w-softmax where there is a linear classifier.",
        panel=ANGLES,
        choices=choices.HEADS,
    )
    head_operator: OperatorLike | None = option_field(None, "g(θ) of the head; default: the operator.", panel=ANGLES)
    margin: float = option_field(
        4.0,
        "Angular margin m ≥ 1 of ga-softmax and a-softmax; usual: 2 to 4.",
        panel=ANGLES,
        at_least=1,
    )
    scale: float = option_field(30.0, "Scale s > 0 of s-softmax; usual: 10 to 64.", panel=ANGLES, above=0)
    rescale: str = option_field(
        "auto",
        f"SphereNorm β·g(θ)+γ: {_listed(choices.RESCALE)}. auto: where no affine normalization follows.",
        panel=ANGLES,
        choices=choices.RESCALE,
    )
    norm: str = option_field(
        "keep",
        f"BatchNorm after a converted convolution: {_listed(choices.NORM)} (by SphereNorm).",
        panel=ANGLES,
        choices=choices.NORM,
    )
    attention: str = option_field(
        "keep",
        f"Projections of nn.MultiheadAttention: {_listed(choices.ATTENTION)}.",
        panel=ANGLES,
        choices=choices.ATTENTION,
    )
    include: PatternList = option_field(
        None, "Convert only the layers that match: a glob over names, or re:…; repeatable.", panel=WHERE
    )
    exclude: PatternList = option_field(None, "Keep the layers that match; repeatable.", panel=WHERE)
    overrides: Overrides = option_field(
        None,
        "PATTERN=keep or PATTERN=operator:linear,k:0.3,rescale:never; the first match wins; repeatable.",
        panel=WHERE,
        command_line="--override",
    )
    eps: float = option_field(choices.DEFAULT_EPS, "ε > 0, added to both squared norms.", panel=ANGLES, above=0)

    def __post_init__(self) -> None:
        check_options(self)
        for name, heads in {"margin": choices.MARGIN_HEADS, "scale": ("s-softmax",)}.items():
            changed = getattr(self, name) != getattr(ConversionOptions, name)
            if changed and self.head not in heads:
                raise UsageError(
                    f"{option(name)}: has no effect on {option('head', self.head)}; it belongs to {' and '.join(heads)}"
                )
        if self.head == "a-softmax" and choices.canonical(str(self.head_operator or "cosine")) != "cosine":
            raise invalid(
                "head_operator",
                self.head_operator,
                "cosine, which a-softmax is",
                f"{option('head', 'ga-softmax')} takes any operator",
            )
        # Made once to be checked: an unknown name, or a k that does not belong to it, fails now.
        from sphereify.nn.operators import is_built_in, make_operator

        made = make_operator(self.operator, k=self.k)
        if self.head_operator is not None:
            make_operator(self.head_operator, k=self.k_of(self.head_operator))
        k = made.k if self.k is None and is_built_in(made) else self.k
        object.__setattr__(self, "k", k if k is None or isinstance(k, (int, float)) else float(k.detach().mean()))

    def k_of(self, operator: OperatorLike) -> float | None:
        """The k of the whole conversion belongs to its operator; another one at some place takes its own default."""
        same = isinstance(operator, str) and isinstance(self.operator, str)
        return self.k if same and choices.canonical(operator) == choices.canonical(self.operator) else None  # type: ignore[arg-type]

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "ConversionOptions":
        """The options that a function received as keyword arguments.

        Raises:
            UsageError: an unknown name, with the nearest one; or as the class.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                raise choose("option", name, names)
        return cls(**keywords)


class ConversionKeywords(TypedDict, total=False):
    """The fields of `ConversionOptions` as keyword arguments, for completion and type checkers."""

    operator: OperatorLike
    k: float | None
    share_k: str
    skip_shortcuts: bool
    head: str
    head_operator: OperatorLike | None
    margin: float
    scale: float
    rescale: str
    norm: str
    attention: str
    include: PatternList
    exclude: PatternList
    overrides: Overrides
    eps: float
