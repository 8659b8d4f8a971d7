"""Lemmas 1 and 2 of "Deep Hyperspherical Learning" in numbers: how badly is a rescaled problem conditioned?

    python -m examples.papers.conditioning -o out/conditioning

One linear layer is fitted to F = U·Vᵀ, U of n filters and V of m inputs, unit rows of length k:

    plain     G(U, V)  = ½‖F - U·Vᵀ‖²
    cosine    G_S(U, V) = ½‖F - cos(U, V)‖², the cosine of each row of U to each of V

At the optimum, U is multiplied by c and V divided by it; neither objective changes. The restricted condition number κ
is the largest eigenvalue of the Hessian over the smallest one that is not 0 (fp64). It is taken

    plain               of G, with fewer directions than filters and inputs (k < n, m), and with more
    cosine, free        of G_S in U and V as they are: rows may have any length
    cosine, on sphere   of G_S in the directions, with every row brought back to unit length

Then gradient descent starts close to the optimum, with a rate of one over the largest eigenvalue there: the steps it
takes until the objective is a millionth of what it was.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.papers.report import finish, markdown, parse, picture
from sphereify.nn import CosineOperator
from sphereify.nn.functional import sphere_linear

NARROW, WIDE = (6, 5, 3), (3, 4, 8)
"""Sizes (n, m, k), with fewer directions than filters and inputs, and with more."""
ZERO = 1e-11
"""Eigenvalues below this share of the largest count as 0; rounding leaves 1e-15."""
REACHED = 1e-6


class Problem(NamedTuple):
    """An objective over U and V, with rows of free length or kept at unit length."""

    name: str
    sizes: tuple[int, int, int]
    product: Callable[[Tensor, Tensor], Tensor]
    on_sphere: bool = False


def inner(u: Tensor, v: Tensor) -> Tensor:
    """The inner products (n, m) of rows (n, k) and (m, k)."""
    return u @ v.T


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """The cosines (n, m) of rows (n, k) and (m, k)."""
    return F.normalize(u, dim=1) @ F.normalize(v, dim=1).T


PROBLEMS = [
    Problem("plain, k < n, m", NARROW, inner),
    Problem("plain, k > n, m", WIDE, inner),
    Problem("cosine, free", NARROW, cosine),
    Problem("cosine, on sphere", NARROW, cosine, on_sphere=True),
]


def optimum(sizes: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows U (n, k) and V (m, k)."""
    draw = torch.Generator().manual_seed(seed)
    n, m, k = sizes
    return tuple(F.normalize(torch.randn(rows, k, generator=draw, dtype=torch.float64), dim=1) for rows in (n, m))


def rescaled(problem: Problem, u: Tensor, v: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The pair (c·U, V/c), normalized where rows have unit length."""
    u, v = c * u, v / c
    return (F.normalize(u, dim=1), F.normalize(v, dim=1)) if problem.on_sphere else (u, v)


def objective(problem: Problem, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The objective ½‖F - product‖² as a function of U and V in one vector."""
    n, _, k = problem.sizes

    def of(both: Tensor) -> Tensor:
        u, v = both.view(-1, k)[:n], both.view(-1, k)[n:]
        return (target - problem.product(u, v)).square().sum() / 2

    return of


def eigenvalues(problem: Problem, u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Eigenvalues of the Hessian in U and V, rising."""
    hessian = torch.autograd.functional.hessian(objective(problem, target), torch.cat([u, v]).flatten())
    return torch.linalg.eigvalsh(hessian)


def condition(values: Tensor) -> float:
    """The largest eigenvalue over the smallest that is not 0."""
    return float(values[-1] / values[values > ZERO * values[-1]][0])


def descent(problem: Problem, u: Tensor, v: Tensor, target: Tensor, rate: float, most: int) -> int | None:
    """Steps until the objective is a millionth of the first; None if it takes more than `most`."""
    of, k = objective(problem, target), problem.sizes[2]
    both = torch.cat([u, v]).flatten().requires_grad_()
    first = None
    for step in range(most):
        value = of(both)
        first = value.item() if first is None else first
        if not value.item() <= 1e6 * first:
            return None  # it grows without bound
        if value.item() <= REACHED * first:
            return step
        (slope,) = torch.autograd.grad(value, both)
        with torch.no_grad():
            both -= rate * slope
            if problem.on_sphere:
                both.copy_(F.normalize(both.view(-1, k), dim=1).flatten())
    return None


def measure(problem: Problem, c: float, seed: int, most: int) -> dict[str, Any]:
    """Condition and eigenvalues at the rescaled optimum, steps of gradient descent from a point close to it."""
    u, v = optimum(problem.sizes, seed)
    target = inner(u, v)
    values = eigenvalues(problem, *rescaled(problem, u, v, c), target)
    moved = [row + 0.1 * step for row, step in zip((u, v), optimum(problem.sizes, seed + 1000), strict=True)]
    start = rescaled(problem, *(F.normalize(rows, dim=1) for rows in moved), c)
    steps = descent(problem, *start, target, 1 / values[-1].item(), most)
    return {"c": c, "seed": seed, "condition": condition(values), "eigenvalues": values.tolist(), "steps": steps}


def exponent(scales: list[float], found: list[float]) -> float:
    """The exponent p of κ ~ c^p, between the two largest scales."""
    return math.log(found[-1] / found[-2]) / math.log(scales[-1] / scales[-2])


def agreement() -> float:
    """The largest difference between the cosine here and the package's layer, without its ε."""
    u, v = optimum(NARROW, 0)
    return float((cosine(u, v) - sphere_linear(v, u, CosineOperator(), eps=1e-30).T).abs().max())


def middle(values: list[float]) -> float:
    """The median, the lower one of two."""
    return sorted(values)[(len(values) - 1) // 2]


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv, needs_data=False)
    scales, seeds, most = ([1, 2, 4], 1, 200) if args.scale == "quick" else ([1, 2, 4, 8, 16, 32], 3, 12_000)
    rows, document = [], {}
    figure, (left, right) = picture(width=9, height=3.6, ncols=2)
    for problem in PROBLEMS:
        found = [[measure(problem, c, seed, most) for seed in range(seeds)] for c in scales]
        conditions = [middle([one["condition"] for one in of_scale]) for of_scale in found]
        steps = [middle([math.inf if one["steps"] is None else one["steps"] for one in of_scale]) for of_scale in found]
        power = exponent(scales, conditions)
        told = ["> " + str(most) if math.isinf(step) else f"{step:.0f}" for step in steps]
        rows += [[f"κ: {problem.name}", *(f"{value:.3g}" for value in conditions), f"c^{abs(round(power, 2)):.2f}"]]
        rows += [[f"steps: {problem.name}", *told, ""]]
        left.loglog(scales, conditions, marker=".", label=problem.name)
        right.loglog(scales, steps, marker=".", label=problem.name)
        document[problem.name] = {"exponent": power, "runs": found}
    for axes, title in ((left, "restricted condition number"), (right, "steps of gradient descent")):
        axes.set(xlabel="c", title=title)
        axes.grid(linewidth=0.4)
    left.legend(fontsize=8)
    table = markdown([f"median of {seeds} seeds", *(f"c = {c}" for c in scales), "κ grows as"], rows)
    finish(args, "conditioning", table, figure, {"difference to sphere_linear": agreement(), "problems": document})


if __name__ == "__main__":
    main()
