"""The options of a conversion, each declared once. Imports no torch, so that `--help` answers at once."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from sphereify import choices
from sphereify.errors import UsageError, choose, invalid, option, refused
from sphereify.head_numbers import HEAD_NUMBERS, number_of
from sphereify.options import check_belongs, check_options, option_field, options_of
from sphereify.patterns import PatternList, Patterns
from sphereify.wording import listed

if TYPE_CHECKING:
    import torch

    from sphereify.nn.magnitudes import Magnitude

    OperatorLike = str | Callable[[torch.Tensor], torch.Tensor]
else:
    OperatorLike = str | Callable
"""An operator's name, or a callable cos θ -> g(θ)."""

Overrides = Mapping[str, Mapping[str, Any] | str] | None
"""Settings for single layers: a pattern over names -> a dict of operator, k and rescale, or "keep"."""

ANGLES, WHERE = "Angular layers", "Which layers"
BEFORE = {"margin": 4.0, "scale": 30.0}
"""Values that options written by earlier versions name where none was given, whatever the head."""
MAGNITUDE = ("magnitude", "weighted", "magnitude_radius", "magnitude_mean", "magnitude_beta")
"""Options of a magnitude that an override may set, too."""
SETTINGS = ("operator", "k", "rescale", "radius", *MAGNITUDE)
"""Options that an override may set for single layers."""


def _default(name: str, kind: str) -> str:
    """The default of a number of a kind of head, for the help."""
    return f"{HEAD_NUMBERS[name][kind].default:g}"


@dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion: which layers become angular, and how.

    Raises:
        UsageError: a value that is not valid, or that has no effect on the others.
    """

    operator: OperatorLike = option_field(
        "cosine",
        f"Function g(θ) in place of the inner product: {listed(choices.OPERATORS)}.",
        panel=ANGLES,
        python_help=f"Function g(θ) in place of the inner product: {listed(choices.OPERATORS)}, or an operator object.",
    )
    k: float | None = option_field(
        None,
        "Curvature of the sigmoid (default 0.3), or start of a learnable one (default 0.5).",
        panel=ANGLES,
        usual="0.1 to 0.7",
    )
    share_k: str = option_field(
        "filter",
        f"Extent over which a learnable k is shared: {listed(choices.SHARE_K)}.",
        panel=ANGLES,
        choices=choices.SHARE_K,
    )
    radius: float | None = option_field(
        None,
        "Pooled radius ρ ≥ 0 of converted convolutions; default: 0, the paper's operator, and 4 where a trained "
        "network is fine-tuned.",
        panel=ANGLES,
        at_least=0,
        usual="1 to 4",
    )
    learn_radius: bool = option_field(
        False, "Learn the radius of each convolution, starting from the given one.", panel=ANGLES
    )
    magnitude: str = option_field(
        "sphere",
        f"Function h(‖x‖) of the patch's length that multiplies g(θ): {listed(choices.MAGNITUDES)}. sphere is 1, "
        "linear with --weighted and the cosine operator is the original layer.",
        panel=ANGLES,
        choices=choices.MAGNITUDES,
        python_help=f"Function h(‖x‖) of the patch's length that multiplies g(θ): {listed(choices.MAGNITUDES)}. sphere "
        "is 1, linear with `weighted` and the cosine operator is the original layer.",
    )
    weighted: bool = option_field(False, "Multiply by the length ‖w‖ of the filter, too.", panel=ANGLES)
    magnitude_radius: float | None = option_field(
        None,
        "ρ > 0 of ball, tanh and segment (default: 1), in units of the mean patch norm; log and mix measure lengths in "
        "these units where it is given.",
        panel=ANGLES,
        above=0,
        usual="0.5 to 2",
    )
    magnitude_mean: str = option_field(
        "input",
        f"Origin of the mean patch norm: {listed(choices.MAGNITUDE_MEANS)}. input: of each input by itself; data: a "
        "running mean over the training, as always in linear maps.",
        panel=ANGLES,
        choices=choices.MAGNITUDE_MEANS,
    )
    learn_magnitude_radius: bool = option_field(
        False, "Learn ρ of the magnitude, one for each filter, starting from the given one.", panel=ANGLES
    )
    magnitude_beta: float | None = option_field(
        None,
        "β ≥ 0: slope of segment beyond ρ (default: 0.5), weight of the logarithm in mix (default: 1).",
        panel=ANGLES,
        at_least=0,
        usual="0.1 to 1",
    )
    skip_shortcuts: bool = option_field(
        False, "Keep 1×1 convolutions on residual shortcuts, as SphereResNet-v2 does.", panel=WHERE
    )
    skip_depthwise: bool = option_field(
        False,
        "Keep depthwise convolutions: an angle loses the size of the one channel that each filter sees.",
        panel=WHERE,
    )
    head: str = option_field(
        "auto",
        f"Kind of classifier: {listed(choices.HEADS)}. auto: w-softmax where there is a linear classifier.",
        panel=ANGLES,
        choices=choices.HEADS,
    )
    head_operator: OperatorLike | None = option_field(
        None, "Function g(θ) of the head; default: the operator.", panel=ANGLES
    )
    margin: float | None = option_field(
        None,
        "Margin m of the target class: of ga-softmax and a-softmax times its angle (usual: 2 to 4; default "
        f"{_default('margin', 'ga-softmax')}), of arcface in radians (0.1 to 0.5; {_default('margin', 'arcface')}), of "
        f"cosface and sphereface2 of its score (0.2 to 0.4; {_default('margin', 'cosface')} and "
        f"{_default('margin', 'sphereface2')}).",
        panel=ANGLES,
    )
    scale: float | None = option_field(
        None,
        f"Scale s > 0 of s-softmax (default {_default('scale', 's-softmax')}), arcface and cosface "
        f"({_default('scale', 'arcface')}) and sphereface2 ({_default('scale', 'sphereface2')}); usual: 10 to 64.",
        panel=ANGLES,
    )
    margin_gradient: str = option_field(
        "true",
        f"Gradient of a margin: {listed(choices.MARGIN_GRADIENTS)}. detached: that of the score without a margin, "
        "which is steadier for large margins.",
        panel=ANGLES,
        choices=choices.MARGIN_GRADIENTS,
    )
    similarity_power: float | None = option_field(
        None,
        "Power t ≥ 1 of sphereface2, which spreads out its scores; default "
        f"{_default('similarity_power', 'sphereface2')}.",
        panel=ANGLES,
        usual="2 to 4",
    )
    positive_weight: float | None = option_field(
        None,
        "Weight λ of the target's binary task in sphereface2, in (0, 1); default "
        f"{_default('positive_weight', 'sphereface2')}.",
        panel=ANGLES,
        usual="0.5 to 0.9",
    )
    rescale: str = option_field(
        "auto",
        f"SphereNorm rescaling β·g(θ)+γ: {listed(choices.RESCALE)}. auto: where no affine normalization follows.",
        panel=ANGLES,
        choices=choices.RESCALE,
    )
    norm: str = option_field(
        "keep",
        f"BatchNorm after a converted convolution: {listed(choices.NORM)} (by SphereNorm).",
        panel=ANGLES,
        choices=choices.NORM,
    )
    attention: str = option_field(
        "keep",
        f"Projections of nn.MultiheadAttention: {listed(choices.ATTENTION)}.",
        panel=ANGLES,
        choices=choices.ATTENTION,
    )
    include: PatternList = option_field(
        None,
        "Convert only the layers that match: a glob over names, or re:…; repeatable.",
        panel=WHERE,
        python_help="Convert only the layers whose names match: globs, or regular expressions after re:. "
        "A string or a list.",
    )
    exclude: PatternList = option_field(
        None,
        "Keep the layers that match; repeatable.",
        panel=WHERE,
        python_help="Keep the layers whose names match. A string or a list.",
    )
    overrides: Overrides = option_field(
        None,
        "PATTERN=keep or PATTERN=operator:linear,k:0.3,rescale:never,radius:2,magnitude:tanh; first match wins; "
        "repeatable.",
        panel=WHERE,
        command_line="--override",
        python_help='Settings for single layers: {pattern: {"operator": …, "k": …, "rescale": …, "radius": …, '
        '"magnitude": …, "weighted": …} or "keep"}. The first match wins, and it wins over include, exclude, '
        "skip_shortcuts and skip_depthwise.",
    )
    eps: float = option_field(choices.DEFAULT_EPS, "ε > 0, added to both squared norms.", panel=ANGLES, above=0)

    def __post_init__(self) -> None:
        check_options(self)
        self._check_head()
        self._check_operators()
        self.magnitude_of({})
        if self.learn_radius and not self.radius:
            raise refused(
                "learn_radius",
                f"ρ starts from {option('radius')}, whose gradient is 0 at 0; give it a start, such as "
                f"{option('radius', 1.0)}",
            )
        for name in ("include", "exclude"):
            patterns = Patterns(name, getattr(self, name)).patterns
            if not isinstance(getattr(self, name), (str, type(None))):
                object.__setattr__(self, name, patterns)
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))

    def _check_head(self) -> None:
        for name, kinds in HEAD_NUMBERS.items():
            value = getattr(self, name)
            about = number_of(name, self.head).range
            if value is not None and not about.allows(value):
                raise invalid(name, value, about.expected)
            if value not in (None, BEFORE.get(name)):
                check_belongs(name, kinds, "head", self.head)
        if self.margin_gradient != "true":
            check_belongs("margin_gradient", choices.MARGIN_HEADS, "head", self.head)
        if self.head == "a-softmax" and choices.canonical(str(self.head_operator or "cosine")) != "cosine":
            raise invalid(
                "head_operator",
                self.head_operator,
                "cosine, which a-softmax is",
                f"{option('head', 'ga-softmax')} takes any operator",
            )

    def _check_operators(self) -> None:
        """Make each operator once, so that an unknown name, or a k that does not belong to it, fails now."""
        from sphereify.nn.operators import is_built_in, make_operator

        operator = make_operator(self.operator, k=self.k)
        if self.head_operator is not None:
            make_operator(self.head_operator, k=self.k_of(self.head_operator), option_name="head_operator")
        k = operator.k if self.k is None and is_built_in(operator) else self.k
        object.__setattr__(self, "k", k if k is None or isinstance(k, (int, float)) else float(k.detach().mean()))

    def magnitude_of(self, setting: Mapping[str, Any]) -> "Magnitude":
        """The magnitude of layers with these overrides. Another form takes its own ρ and β where they give none.

        Raises:
            UsageError: a word or a number that is not valid, or that the form does not have.
        """
        from sphereify.nn.magnitudes import Magnitude

        form = choices.canonical(str(setting.get("magnitude", self.magnitude)))
        own = form == self.magnitude
        return Magnitude(
            form,
            setting.get("weighted", self.weighted),
            setting.get("magnitude_radius", self.magnitude_radius if own else None),
            setting.get("magnitude_mean", self.magnitude_mean if own else "input"),
            self.learn_magnitude_radius if own else False,
            setting.get("magnitude_beta", self.magnitude_beta if own else None),
        )

    def k_of(self, operator: OperatorLike) -> float | None:
        """The k for an operator at some place: that of the conversion if it is the same operator, else its default."""
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
                raise choose(None, name, names, place="option")
        return cls(**keywords)

    def keywords(self) -> "ConversionKeywords":
        """The options as keyword arguments, for `sphereify`, `plan_conversion` and `suggest`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[return-value]

    def to_json(self) -> str:
        """The options as JSON text.

        Raises:
            UsageError: an operator object, which JSON cannot hold.
        """
        operators = {option("operator"): self.operator, option("head_operator"): self.head_operator}
        for pattern, setting in (self.overrides or {}).items():
            if isinstance(setting, Mapping):
                operators[f"{option('overrides')}[{pattern!r}]"] = setting.get("operator")
        for place, operator in operators.items():
            if not isinstance(operator, (str, type(None))):
                raise UsageError(
                    f"{place}: got {operator!r}, an operator object, which JSON cannot hold; expected one of "
                    f"{listed(choices.OPERATORS)}"
                )
        return json.dumps(self.keywords(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ConversionOptions":
        """Read the options from the text that `to_json` wrote.

        Raises:
            UsageError: the text is no JSON object, or holds an unknown name or a value that is not valid.
        """
        try:
            keywords = json.loads(text)
        except ValueError as error:
            raise UsageError(f"options: not JSON ({error})") from error
        if not isinstance(keywords, dict):
            raise UsageError(f"options: got {type(keywords).__name__} in JSON, expected an object of name and value")
        return cls.from_keywords(keywords)


def _checked_overrides(overrides: Any) -> dict[str, Any] | None:
    """The overrides with their words in the canonical spelling."""
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping):
        raise invalid("overrides", overrides, "a dict of pattern to 'keep' or settings")
    Patterns("overrides", overrides.keys())
    return {pattern: _checked_override(pattern, value) for pattern, value in overrides.items()}


def _checked_override(pattern: str, value: Any) -> dict[str, Any] | str:
    place = f"{option('overrides')}[{pattern!r}]"
    if value == "keep":
        return "keep"
    if not isinstance(value, Mapping):
        raise invalid("overrides", value, f"'keep' or a dict of {listed(SETTINGS)}", place=place)
    for key in value:
        if key not in SETTINGS:
            raise choose("overrides", key, SETTINGS, place=f"{place}: key")
    setting = dict(value)
    if "rescale" in setting:
        setting["rescale"] = choices.canonical(str(setting["rescale"]))
        if setting["rescale"] not in choices.RESCALE:
            raise choose("overrides", value["rescale"], choices.RESCALE, place=f"{place}: rescale")
    for name in ("radius", "magnitude_radius", "magnitude_beta"):
        about = options_of(ConversionOptions)[name]
        if name in setting and not about.allows(setting[name]):
            raise invalid("overrides", setting[name], about.expected, place=f"{place}: {name}")
    for name in ("magnitude", "magnitude_mean"):
        if name in setting:
            setting[name] = choices.canonical(str(setting[name]))
            words = options_of(ConversionOptions)[name].choices
            if setting[name] not in words:
                raise choose("overrides", value[name], words, place=f"{place}: {name}")
    if not isinstance(setting.get("weighted", False), bool):
        raise invalid("overrides", setting["weighted"], "true or false", place=f"{place}: weighted")
    if "operator" in setting:
        from sphereify.nn.operators import make_operator

        try:
            make_operator(setting["operator"], k=setting.get("k"))
        except UsageError as error:
            raise UsageError(f"{place}: {error}", option="overrides", value=setting["operator"]) from None
    return setting


class ConversionKeywords(TypedDict, total=False):
    """The fields of `ConversionOptions` as keyword arguments, for type checkers."""

    operator: OperatorLike
    k: float | None
    share_k: str
    radius: float | None
    learn_radius: bool
    magnitude: str
    weighted: bool
    magnitude_radius: float | None
    magnitude_mean: str
    learn_magnitude_radius: bool
    magnitude_beta: float | None
    skip_shortcuts: bool
    skip_depthwise: bool
    head: str
    head_operator: OperatorLike | None
    margin: float | None
    scale: float | None
    margin_gradient: str
    similarity_power: float | None
    positive_weight: float | None
    rescale: str
    norm: str
    attention: str
    include: PatternList
    exclude: PatternList
    overrides: Overrides
    eps: float
