"""The angles between the filters of a network and what they see, before a conversion and after it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.annotations import PLAN
from sphereify.calibration.layer_pairs import path_of, reference_of
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.input_values import filled
from sphereify.convert.model_inputs import evaluating, seeded, unchanged
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.errors import UsageError, first_line
from sphereify.nn import AngularHead, CosineOperator
from sphereify.nn.functional_calls import ANGULAR, AngularCall
from sphereify.nn.layers import AngularLayer, ConvGeometry
from sphereify.nn.modules import check_module

SAMPLES = 8
"""Largest number of inputs on which angles are measured."""
VALUES = 20_000
"""Number of angles that are drawn of each layer."""
TINY = 1e-20
"""Added to the squared norms of an original layer, which has no ε."""


@dataclass(frozen=True)
class Spread:
    """Angles of a layer, in degrees."""

    values: Tensor
    """A sample of them, sorted: (N,)."""

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return float(self.values.std(correction=0))

    def quantile(self, share: float) -> float:
        """The angle below which this share of the angles lies."""
        return float(self.values[min(len(self.values) - 1, int(share * len(self.values)))])

    def histogram(self, low: float, high: float, bins: int) -> list[float]:
        """The density in each of the bins between two angles, per degree."""
        counts = torch.histc(self.values, bins, low, high)
        return (counts / len(self.values) * bins / (high - low)).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Angles:
    """The angles of the converted layers."""

    before: dict[str, Spread] = field(default_factory=dict)
    """Angles between patches and filters in the original, by layer; empty without it."""
    after: dict[str, Spread] = field(default_factory=dict)
    """Angles that the operators of the converted network receive, which count its radius."""
    inputs: str = ""
    """The inputs on which they were measured, in words."""
    reason: str = ""
    """Reason why none could be measured; empty if they were."""


@torch.no_grad()
def measure_angles(
    model: nn.Module, original: nn.Module | None = None, inputs: Inputs = None, *, described: str = ""
) -> Angles:
    """Measure the angles of each converted layer in one pass through the network, and one through the original.

    Args:
        model: a converted network. Neither network is changed.
        original: the network that it was made of; without it, only the angles after the conversion are measured.
        inputs: as `example_inputs` of `plan_conversion`. Tensors on the meta device are filled with noise.
        described: the inputs in words.

    Returns:
        Angles in degrees, up to 20,000 of each layer, the same in each call. A network that does not run with the
        inputs has none, and `reason` says why.

    Raises:
        UsageError: the model was not converted.
        ArgumentTypeError: a network that is no module.
    """
    check_module(model)
    if original is not None:
        check_module(original, "original")
    plan = PLAN.of(model)
    if plan is None:
        raise UsageError(f"measure_angles: {type(model).__name__} was not converted")
    arguments = filled(ModelArguments.of(inputs), model)
    described = described or arguments.described()
    try:
        after = _measured(model, plan, arguments, _angular_cosines)
        before = {}
        if original is not None:
            arguments = filled(arguments, original)
            before = _measured(reference_of(original, plan), plan, arguments, _plain_cosines)
    except Exception as error:  # a forward may raise anything
        return Angles(inputs=described, reason=first_line(error))
    return Angles({name: before[name] for name in after if name in before}, after, described)


def few(arguments: ModelArguments) -> ModelArguments:
    """The first samples of a batch, where all of its tensors have as many."""
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in arguments.tensors()}
    return arguments.map(lambda tensor: tensor[:SAMPLES]) if len(sizes) == 1 else arguments


Cosines = Callable[[Decision, Any, tuple], "Tensor | None"]
"""A function that takes a decision, the module that stands for its layer, and the arguments of a call of it."""


def _measured(
    network: nn.Module, plan: ConversionPlan, arguments: ModelArguments, cosines: Cosines
) -> dict[str, Spread]:
    """The angles of each converted layer in one pass."""
    values: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        stack.enter_context(seeded(network))
        stack.enter_context(unchanged(network))
        stack.enter_context(evaluating(network))
        stack.enter_context(_observed(network, plan, cosines, values))
        arguments.run(network)
    spreads = {}
    for decision in plan.converted:
        if parts := values.get(decision.name):
            angles = _sample(torch.cat(parts), VALUES).clamp(-1, 1).acos() * (180 / math.pi)
            spreads[decision.name] = Spread(angles.sort().values)
    return spreads


@contextmanager
def _observed(
    network: nn.Module, plan: ConversionPlan, cosines: Cosines, values: Mapping[str, list[Tensor]]
) -> Iterator[None]:
    """Note a sample of the cosines in each call of a converted layer."""
    handles = []
    for decision in plan.converted:
        module = network.get_submodule(path_of(decision))

        def note(module: nn.Module, args: tuple, kwargs: dict, decision: Decision = decision) -> None:
            cos = cosines(decision, module, args or tuple(kwargs.values()))
            if cos is not None:
                values[decision.name].append(_sample(cos.detach().float().cpu().flatten(), VALUES))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(values: Tensor, count: int) -> Tensor:
    """Some of the finite values, drawn with repetitions; all where there are no more."""
    values = values[values.isfinite()]
    if len(values) <= count:
        return values
    return values[torch.randint(len(values), (count,), generator=torch.Generator().manual_seed(0))]


def _angular_cosines(decision: Decision, layer: Any, args: tuple) -> Tensor | None:
    """The cosines that the operator of an angular layer receives."""
    if isinstance(layer, AngularHead):
        return _cosines("linear", args[0], layer.weight, (), TINY, 0.0)
    if not isinstance(layer, (AngularLayer, AngularCall)):
        return None  # folded
    x, weight, geometry = _operands(layer, args)
    return _cosines(decision.kind, x, weight, geometry, layer.eps, layer.radius if geometry else 0.0)


def _plain_cosines(decision: Decision, layer: Any, args: tuple) -> Tensor:
    """The cosines of the angles between patches and filters of a plain layer."""
    x, weight, geometry = _operands(layer, args)
    return _cosines(decision.kind, x, weight, geometry, TINY, 0.0)


def _operands(layer: Any, args: tuple) -> tuple[Tensor, Tensor, tuple]:
    """Input, weight and geometry of a call; the geometry of a linear map is empty."""
    if isinstance(layer, AngularCall):
        return args[0].x, args[0].weight, args[0].geometry
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return args[0], layer.weight, ()
    x, padding = ConvGeometry._padded(layer, args[0])  # type: ignore[arg-type]
    return x, layer.weight, (layer.stride, padding, layer.dilation, layer.groups)


def _cosines(kind: str, x: Tensor, weight: Tensor, geometry: tuple, eps: float, radius: Any) -> Tensor:
    pooled = {"radius": radius} if geometry else {}
    cosine = CosineOperator()
    return ANGULAR[kind](x.float(), weight.float(), cosine, None, *geometry, eps=eps, **pooled)
