"""A check that the passes of a maker compute what the reference computes, of each pass alone, on small tensors.

The reference gives its answers in float64 on the CPU, from the same numbers, so that no library of the device has a
part in them. What a result may differ by follows from its dtype (`allowed`).

Kernels are checked before their first use with each device, dtype, layout, curve and form of a layer (`is_trusted`):
no more than what the layer needs, since Triton compiles a kernel for about a second. Once they are compiled, a check
takes some milliseconds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.choices import DEFAULT_EPS
from sphereify.nn.geometry import Ints, Projection, output_size
from sphereify.nn.passes import reference, triton
from sphereify.nn.passes.protocol import Passes
from sphereify.nn.passes.switch import KernelFailure
from sphereify.nn.precision import accumulate_dtype, is_channels_last

LAYOUTS = ("channels_last", "contiguous", "linear")
"""Layouts in memory of the input of a convolution; "linear" stands for a linear map."""


class Kind(NamedTuple):
    """The properties that the code of a pass depends on."""

    device: torch.device
    dtype: torch.dtype
    """The dtype of the input, in which the products are computed."""
    weight_dtype: torch.dtype
    layout: str

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, projection: Projection | None) -> "Kind":
        layout = "linear" if projection is None else "channels_last" if is_channels_last(x) else "contiguous"
        return cls(x.device, x.dtype, weight.dtype, layout)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.layout.replace('_', ' ')}, on {self.device}"


class Use(NamedTuple):
    """The demands of a layer on the passes."""

    curve: str
    form: str
    """The sums that its norms need, see `form_of`; "dense" for a linear map."""

    @classmethod
    def of(cls, weight: Tensor, projection: Projection | None, curve: str) -> "Use":
        if projection is None:
            return cls(curve, "dense")
        return cls(curve, form_of(weight.shape[1], weight.shape[2:], projection.groups))


def form_of(fan_in: int, kernel: Sequence[int], groups: int) -> str:
    """The form of a convolution with `fan_in` channels a group: "dense", "grouped", "depthwise" or "pointwise"."""
    if math.prod(kernel) == 1:
        return "pointwise"
    return "dense" if groups == 1 else "depthwise" if fan_in == 1 else "grouped"


# ---- What is compared


class Case(NamedTuple):
    """A layer whose passes are compared, as a convolution, or as a linear map without groups, window and radius."""

    curve: str
    channels: int
    filters: int
    groups: int = 1
    kernel: Ints = (3, 3)
    stride: Ints = (1, 1)
    padding: Ints = (1, 1)
    dilation: Ints = (1, 1)
    batch: int = 2
    size: Ints = (9, 7)
    k: float | None = None
    """A number, or None where the curve has no k or learns it."""
    learned: int = 0
    """Number of k that are learned: 1, or one for each filter."""
    beta: bool = False
    shift: bool = False
    radius: float = 0.0

    @property
    def form(self) -> str:
        return form_of(self.channels // self.groups, self.kernel, self.groups)

    @property
    def longest_sum(self) -> int:
        """Number of terms of the longest sum of a pass: over places, over a patch, or over filters."""
        patch = self.channels // self.groups * math.prod(self.kernel)
        return max(self.batch * math.prod(self.size), patch, self.filters)


CASES = (
    Case("cosine", 32, 48, beta=True, shift=True),
    Case("linear", 6, 4, 2, (3, 2), (2, 1), (1, 0), (1, 2), beta=True, shift=True),
    Case("sigmoid", 16, 16, 16, k=0.3, beta=True, shift=True, radius=2.0),
    Case("learnable-sigmoid", 16, 24, 1, (1, 1), padding=(0, 0), learned=24, beta=True, shift=True),
    Case("learnable-sigmoid", 6, 10, 2, (1, 1), padding=(0, 0), learned=1),
)
"""Each operator and each form, in few combinations: a kernel is compiled for each. Nearly all have β and γ, whose code
holds that of a layer without them. Channels are a multiple of 16, read 16 bytes at a time, or not; tensors have more
than one tile."""


class Operands(NamedTuple):
    """The arguments of all passes of one case."""

    kernel: Ints
    projection: Projection | None
    radius: float
    curve: str
    x: Tensor
    weight: Tensor
    filter_norm: Tensor
    dot: Tensor
    norm: Tensor
    k: float | Tensor | None
    beta: Tensor | None
    shift: Tensor | None
    grad: Tensor
    g: Tensor
    grad_x: Tensor
    radial: Tensor
    v: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Operands":
        """The same with each tensor changed."""
        values: Iterable[Any] = self
        return Operands._make(change(value) if isinstance(value, Tensor) else value for value in values)


Answer = tuple[Tensor | None, ...]

PASSES: dict[str, Callable[[Passes, Operands], Answer]] = {
    "normalize_filters": lambda p, o: p.normalize_filters(o.weight, DEFAULT_EPS, o.x.dtype),
    "patch_norm": lambda p, o: (p.patch_norm(o.x, o.kernel, DEFAULT_EPS, o.projection, o.radius),),
    "curve": lambda p, o: p.curve(o.dot, o.norm, o.curve, o.k, o.projection, o.beta, o.shift),
    "curve_backward": lambda p, o: p.curve_backward(
        o.grad, o.g, o.norm, o.curve, o.k, o.projection, o.beta, None if o.shift is None else o.shift.dtype, (True,) * 3
    ),
    "subtract_radial": lambda p, o: (p.subtract_radial(o.grad_x, o.x, o.radial, o.kernel, o.projection),),
    "filter_gradient": lambda p, o: (p.filter_gradient(o.v, o.weight, o.filter_norm),),
}
"""The passes of the protocol, each with its arguments."""
OF_THE_CURVE = ("curve", "curve_backward")
"""The passes that depend on the curve, besides the form."""


def make_operands(case: Case, kind: Kind) -> Operands:
    """Operands of a case on the CPU, in the dtypes and the layout of `kind`; each call draws the same numbers.

    Cosines reach from -0.9 to 0.9, and some lie beyond 1, where they are clamped: between the two the slope of the
    arccosine turns any rounding into a large difference.
    """
    source = torch.Generator("cpu").manual_seed(0)  # of its own: the state of torch's generators stays

    def draw(*shape: int, low: float = -1.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        uniform = torch.rand(shape, generator=source, dtype=torch.float64, device="cpu")
        return (low + (high - low) * uniform).to(dtype or kind.dtype)

    linear = kind.layout == "linear"
    projection = None if linear else Projection(case.stride, case.padding, case.dilation, case.groups)
    kernel: Ints = () if linear else case.kernel
    radius = 0.0 if linear else case.radius
    x_shape, y_shape, patches, weight_shape = _shapes(case, projection)
    precise = accumulate_dtype(kind.dtype)
    x, weight = draw(*x_shape), draw(*weight_shape, dtype=kind.weight_dtype)
    _, filter_norm = reference.normalize_filters(weight, DEFAULT_EPS, kind.dtype)
    norm = draw(*patches, low=0.5, high=1.5, dtype=precise)
    cos = draw(*y_shape, low=-0.9, high=0.9, dtype=torch.float64)
    learned = None
    if case.learned:
        learned = draw(case.learned, low=0.3, high=0.9, dtype=precise)
        learned = learned.view(-1, 1, 1) if projection and case.learned > 1 else learned
    k = case.k if learned is None else learned
    g, _ = reference.curve(
        cos.clone(), torch.ones_like(norm, dtype=torch.float64), case.curve, k, projection, None, None
    )
    cos.view(-1)[::7] *= 2  # beyond 1 for half of these
    cos = torch.where(cos.abs() > 0.9, cos.sign() * 1.25, cos)
    lengths = norm.repeat_interleave(case.filters if linear else case.filters // case.groups, -1 if linear else 1)
    operands = Operands(
        kernel, projection, radius, case.curve, x, weight, filter_norm, (cos * lengths).to(kind.dtype), norm, k,
        draw(case.filters, low=0.5, high=1.5, dtype=kind.weight_dtype) if case.beta else None,
        draw(case.filters, dtype=kind.weight_dtype) if case.shift else None,
        draw(*y_shape), g.to(kind.dtype), draw(*x_shape), draw(*patches, dtype=precise), draw(*weight_shape),
    )  # fmt: skip
    if kind.layout != "channels_last":
        return operands
    return operands.each(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


def _shapes(case: Case, projection: Projection | None) -> tuple[Ints, Ints, Ints, Ints]:
    """The shapes of x, of the outputs, of the patch norms and of the weight."""
    if projection is None:
        rows = (case.batch, math.prod(case.size))
        return (*rows, case.channels), (*rows, case.filters), (*rows, 1), (case.filters, case.channels)
    places = output_size(case.size, case.kernel, projection)
    x, y, patches = ((case.batch, n) for n in (case.channels, case.filters, case.groups))
    weight = (case.filters, case.channels // case.groups, *case.kernel)
    return (*x, *case.size), (*y, *places), (*patches, *places), weight


# ---- The comparison


class Deviation(NamedTuple):
    """The deviation of a pass from the reference."""

    name: str
    """Name of the pass."""
    kernels: tuple[str, ...]
    """Those that it launched."""
    case: Case
    deviation: float
    """The largest difference of a result, as a share of its largest value; infinite where there is no number."""
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.deviation <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.case.curve}) is {self.deviation:.1e} of the largest value away from the reference, "
            f"where rounding allows {self.allowed:.1e}"
        )


def deviations(passes: Passes, kind: Kind, use: Use | None = None) -> Iterator[Deviation]:
    """Each pass compared with the reference in each of the cases, or in those that resemble a use.

    Raises:
        KernelFailure: a kernel could not be compiled or launched.
    """
    for case in CASES:
        asked = {name: run for name, run in PASSES.items() if use is None or _resembles(case, name, use)}
        if not asked:
            continue
        operands = make_operands(case, kind)
        placed, exact = operands.each(lambda t: t.to(kind.device)), operands.each(torch.Tensor.double)
        for name, run in asked.items():
            with torch.no_grad():
                expected = run(reference, exact.each(torch.clone))
                with triton.launches() as kernels:
                    got = run(passes, placed.each(torch.clone))
            yield max(
                (
                    Deviation(name, tuple(kernels), case, *_compare(a, b, case.longest_sum))
                    for a, b in zip(got, expected, strict=True)
                ),
                key=lambda one: one.deviation / one.allowed,
            )


def _resembles(case: Case, name: str, use: Use) -> bool:
    """True if a pass of the case runs code that the use needs: of its form, or of its curve."""
    return case.form == use.form or (name in OF_THE_CURVE and case.curve == use.curve)


def _compare(got: Tensor | None, expected: Tensor | None, terms: int) -> tuple[float, float]:
    """(deviation, what is allowed) of one result."""
    if got is None or expected is None:
        return (0.0 if got is expected else math.inf), 1.0
    limit = allowed(got.dtype, terms)
    if got.shape != expected.shape:
        return math.inf, limit
    largest = expected.abs().max().item()
    difference = (got.cpu().double() - expected).abs().max().item() / largest
    return (difference if math.isfinite(difference) else math.inf), limit


def allowed(dtype: torch.dtype, terms: int) -> float:
    """The largest deviation, relative to the largest value, that rounding explains.

    A result is rounded to its dtype twice at most, where β·g + γ is computed from a g that was rounded before, by one
    unit in the last place each. Before that come sums of at most `terms` terms in fp32, or float64 for float64, off by
    one unit for each.
    """
    precise = accumulate_dtype(dtype)
    rounding = 0.0 if dtype is precise else 2 * torch.finfo(dtype).eps
    return rounding + terms * torch.finfo(precise).eps


# ---- Before the first use


class Disagreement(ArithmeticError):
    """A pass computes something else than the reference."""


_trusted: set[tuple[Passes, Kind, Use]] = set()


def is_trusted(maker: Passes, x: Tensor, weight: Tensor, projection: Projection | None, curve: str) -> bool:
    """True if a maker agrees with the reference for such a layer, which is found out before the first use.

    False while a CUDA graph is captured before that, since a check reads results, and where no thread can be started,
    as when the interpreter ends: the check is left to a later call.

    Raises:
        KernelFailure: a kernel disagrees, or could not be compiled or launched.
    """
    kind, use = Kind.of(x, weight, projection), Use.of(weight, projection, curve)
    if (maker, kind, use) in _trusted:
        return True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    # In a thread of its own no mode of the caller holds: autocast, inference mode, a default device, a mode that counts
    # or records operations.
    with ThreadPoolExecutor(1) as thread:
        try:
            checked = thread.submit(check, maker, kind, use)
        except RuntimeError:
            return False
        checked.result()
    _trusted.add((maker, kind, use))
    return True


def check(maker: Passes, kind: Kind, use: Use | None = None) -> None:
    """Compare a maker with the reference, up to the first pass that disagrees.

    Raises:
        KernelFailure: one disagrees, or could not be compiled or launched.
    """
    for checked in deviations(maker, kind, use):
        if not checked.agrees:
            raise KernelFailure(", ".join(checked.kernels) or checked.name) from Disagreement(f"{checked}, in {kind}")
