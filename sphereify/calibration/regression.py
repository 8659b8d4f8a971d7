"""The regression of a given output on the directions of a layer's inputs, through the layer's operator and magnitude.

β·h(‖x‖)·g(θ) + γ is fitted to targets over rows of unit patches: filters first, as the ridge regression for g = cos;
then, in rounds of one Gauss-Newton step each, filters, β and γ for the operator as it is, and for errors that count
only where the ReLU behind the layer lets them pass. Each round passes over rows that come in chunks, and sums up as it
goes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.calibration.moments import Moments, MomentSums, Rows, by_group
from sphereify.calibration.ridge import RidgeSolver
from sphereify.nn import LearnableSigmoidOperator
from sphereify.nn.operators import K_FLOOR

ROWS_PER_UNKNOWN = 20
"""Number of rows for each coefficient of a filter below which the ridge is chosen on held-out rows."""
ROUNDS = 4
CACHE_BYTES = 128 * 2**20
"""Size up to which the cosines of all rows are cached, for each of the filters that were used last."""
CACHED_FILTERS = 3
"""The copied, the present and the proposed ones."""
K_GRID = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)


@dataclass
class Fit:
    """The solution for one layer, and how much it explains.

    Attributes:
        filters: (filters, fan_in), each of length 1.
        beta, gamma: (filters,)
        mean, variance: of h·g over the rows, for each filter.
        before: R² of the layer as it was.
        after: R² of the solution.
        rows: number of rows.
        unknowns: coefficients of one filter.
        explained: gives R² for other filters, β and γ.
    """

    filters: Tensor
    beta: Tensor
    gamma: Tensor
    mean: Tensor
    variance: Tensor
    before: float
    after: float
    rows: int
    unknowns: int
    explained: Callable[[Tensor, Tensor, Tensor], float]


class _Solution(NamedTuple):
    filters: Tensor
    beta: Tensor
    gamma: Tensor
    loss: Tensor
    """(filters,)"""


def fit(
    chunks: Callable[[], Iterator[Rows]],
    operator: Any,
    filters: Tensor,
    *,
    groups: int = 1,
    rectified: bool = False,
    solve_filters: bool = True,
    start: tuple[Tensor, Tensor] | None = None,
    tune_k: bool = False,
) -> Fit:
    """Fit β·h(‖x‖)·g(θ) + γ to the targets by least squares.

    Args:
        chunks: makes an iterator over the rows, the same ones each time.
        operator: g.
        filters: (filters, fan_in); the solution is drawn to them as far as the rows do not say otherwise.
        groups: of the convolution; the filters of one group follow each other.
        rectified: True if a ReLU follows, so that any negative value is right where the target is negative.
        solve_filters: False to leave the filters and fit β and γ alone.
        start: β and γ of the layer as it is, for the R² before; default: the best for its filters.
        tune_k: choose k of a learnable sigmoid, in place.
    """
    copied = _unit(filters)
    problem = _Problem(chunks, operator, groups, rectified)
    solver = None
    if solve_filters:
        solver = RidgeSolver(*problem.moments_to_fit(copied), copied)
    copied_scale = problem.scale(copied)
    before = problem.explained(copied, *(start or copied_scale))
    if solver is not None:
        directions = _unit(torch.where(solver.slopes.norm(dim=1, keepdim=True) > 1e-12, solver.slopes, copied))
    else:
        directions = copied
    if tune_k and isinstance(operator, LearnableSigmoidOperator):
        problem.choose_k(directions)
        copied_scale = problem.scale(copied)
    beta, gamma = problem.scale(directions)
    if solver is not None and (beta < 0).any():
        directions, beta = problem.merged(beta < 0, -directions, directions), beta.abs()
    solution = _Solution(directions, beta, gamma, problem.loss(directions, beta, gamma))
    rate = torch.ones_like(beta)
    for _ in range(ROUNDS if rectified else ROUNDS // 2 if getattr(operator, "name", "") != "cosine" else 0):
        proposal = problem.improved(solution, solver, rate)
        better = proposal.loss < solution.loss
        numbers = (torch.where(better, new, old) for new, old in zip(proposal[1:], solution[1:], strict=True))
        solution = _Solution(problem.merged(better, proposal.filters, solution.filters), *numbers)
        rate = torch.where(better, rate, rate / 2)
    after = problem.explained(solution.filters, solution.beta, solution.gamma)
    if problem.holds_out and problem.explained(copied, *copied_scale) > after:
        solution = _Solution(copied, *copied_scale, solution.loss)  # what the rows say does not hold for others
        after = problem.explained(copied, *copied_scale)
    mean, variance = problem.spread(solution.filters)
    return Fit(
        solution.filters,
        solution.beta,
        solution.gamma,
        mean,
        variance,
        before,
        after,
        rows=sum(len(chunk.weight) for chunk in chunks()),
        unknowns=copied.shape[1],
        explained=problem.explained,
    )


def regress(x: Tensor, target: Tensor, filters: Tensor) -> Tensor:
    """The slopes (filters, fan_in) of ridge regression of target (n, filters) on x (n, fan_in), drawn to `filters`."""
    rows = Rows(x.unsqueeze(0), target, torch.ones_like(target[:, :1]))
    problem = _Problem(lambda: iter([rows]), None, 1, rectified=False)
    unit = _unit(filters)
    return RidgeSolver(*problem.moments_to_fit(unit), unit).slopes


def _unit(filters: Tensor) -> Tensor:
    return filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-12)


class _Problem:
    """The passes over the rows of one layer.

    Attributes:
        holds_out: True if the last eighth of each chunk is held out to judge the solution.
    """

    def __init__(self, chunks: Callable[[], Iterator[Rows]], operator: Any, groups: int, rectified: bool):
        self.chunks = chunks
        self.operator = operator
        self.groups = groups
        self.rectified = rectified
        self.holds_out = False
        self._cache: list[tuple[Tensor, list[Tensor]]] = []  # filters, and the cosines of each chunk

    def rows(self, filters: Tensor, *, held_out: bool = False) -> Iterator[tuple[Rows, Tensor]]:
        """Rows, and the cosines (n, filters) of their angles with these filters."""
        cached = self._cached(filters)
        cosines: list[Tensor] = []
        size = 0
        for number, chunk in enumerate(self.chunks()):
            cos = cached[number] if cached is not None else self._cos(chunk, filters)
            size += cos.numel() * cos.element_size()
            if cached is None and size <= CACHE_BYTES:
                cosines.append(cos)
            part = chunk.part(held_out=held_out) if self.holds_out else slice(None)
            yield chunk[part], cos[part]
        if cached is None and size <= CACHE_BYTES:
            self._cache = [*self._cache, (filters, cosines)][-CACHED_FILTERS:]

    def _cached(self, filters: Tensor) -> list[Tensor] | None:
        return next((cosines for key, cosines in self._cache if key is filters), None)

    def _cos(self, rows: Rows, filters: Tensor) -> Tensor:
        product = rows.unit @ filters.unflatten(0, (self.groups, -1)).mT
        return product.movedim(0, 1).flatten(1).clamp(-1, 1)

    def merged(self, chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """The filters of `one` where `chosen` (filters,) is true, those of `other` elsewhere; cached cosines follow."""
        filters = torch.where(chosen.unsqueeze(1), one, other)
        cached = [self._cached(source) for source in (one, other)]
        if all(cached):
            cosines = [torch.where(chosen, a, b) for a, b in zip(*cached, strict=True)]  # type: ignore[arg-type]
            self._cache = [pair for pair in self._cache if pair[0] is not one and pair[0] is not other]
            self._cache.append((filters, cosines))
        return filters

    def moments_to_fit(self, like: Tensor) -> tuple[Moments, Moments | None]:
        """The moments of the rows to fit, and where these are few, those of the rows held out from now on."""
        to_fit, to_judge = MomentSums(like, self.groups), MomentSums(like, self.groups)
        for chunk in self.chunks():
            to_fit.add(chunk[chunk.part(held_out=False)])
            to_judge.add(chunk[chunk.part(held_out=True)])
        count = to_fit.count + to_judge.count
        self.holds_out = 16 <= count < ROWS_PER_UNKNOWN * like.shape[1]
        if self.holds_out:
            return to_fit.moments(), to_judge.moments()
        to_fit.join(to_judge)
        return to_fit.moments(), None

    def scale(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """β and γ of least squares, without regard to a ReLU."""
        g, y, gg, gy, _ = self._means(filters)
        variance = gg - g * g
        beta = torch.where(variance > 1e-12, (gy - g * y) / variance.clamp_min(1e-12), 0.0)
        return beta.to(filters.dtype), (y - beta * g).to(filters.dtype)

    def spread(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of g."""
        g, _, gg, _, _ = self._means(filters, weighted=False)
        return g, (gg - g * g).clamp_min(0)

    def _means(self, filters: Tensor, *, weighted: bool = True) -> tuple[Tensor, ...]:
        """Means of g, y, g², g·y and y² for each filter."""
        n, sums = 0.0, torch.zeros(5, len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            g, y = rows.sized(self.operator(cos)).double(), rows.target.double()
            w = rows.weight if weighted else torch.ones_like(rows.weight)
            n += float(w.sum())
            sums += torch.stack([(w * value).sum(0) for value in (g, y, g * g, g * y, y * y)])
        return tuple(sums / max(n, 1e-9))

    def loss(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        """The weighted sum of squared errors for each filter."""
        total = torch.zeros(len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            residual = self._residual(rows, rows.sized(self.operator(cos)) * beta + gamma)
            total += (rows.weight * residual.double().square()).sum(0)
        return total

    def explained(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> float:
        """R² of what a ReLU lets pass, where there is one; on the held-out rows, where there are some."""
        error, n = 0.0, 0
        y = yy = torch.zeros(len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters, held_out=self.holds_out):
            prediction, target = rows.sized(self.operator(cos)) * beta + gamma, rows.target
            if self.rectified:
                prediction, target = (
                    (value if rows.added is None else value + rows.added).relu() for value in (prediction, target)
                )
            error += float((prediction - target).double().square().sum())
            n += len(target)
            y = y + target.double().sum(0)
            yy = yy + target.double().square().sum(0)
        variance = float((yy - y.square() / max(n, 1)).sum())
        return 1 - error / variance if variance > 0 else float(error <= 1e-12)

    def improved(self, current: _Solution, solver: RidgeSolver | None, rate: Tensor) -> _Solution:
        """One Gauss-Newton step for the filters, shortened to `rate`, then one for β and γ."""
        filters = current.filters
        if solver is not None:
            n, gradient, weight = 0.0, torch.zeros((), device=filters.device), torch.zeros((), device=filters.device)
            for rows, cos in self.rows(filters):
                g, slope = self._g_and_slope(cos)
                slope = slope * current.beta
                prediction = rows.sized(g) * current.beta + current.gamma
                w = rows.weight
                residual = self._residual(rows, prediction) * slope * w
                n += float(w.sum())
                grouped = by_group(residual, self.groups)
                gradient = (
                    gradient + rows.features.mT @ grouped - solver.mean.unsqueeze(2) * grouped.sum(1, keepdim=True)
                )
                weight = weight + (slope.square() * self._counts(rows, prediction) * w).sum(0)
            step = solver.solve(gradient / n)
            filters = _unit(filters + step * (rate / (weight / n).clamp_min(1e-12)).unsqueeze(1))
        beta, gamma = self._rescaled(filters, current.beta, current.gamma)
        return _Solution(filters, beta, gamma, self.loss(filters, beta, gamma))

    def _g_and_slope(self, cos: Tensor) -> tuple[Tensor, Tensor]:
        cos = cos.detach().requires_grad_()
        with torch.enable_grad():
            g = self.operator(cos)
            (slope,) = torch.autograd.grad(g.sum(), cos) if g.requires_grad else (torch.ones_like(cos),)
        return g.detach(), slope

    def _rescaled(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """β and γ after one Gauss-Newton step."""
        sums = torch.zeros(5, len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            g = rows.sized(self.operator(cos))
            prediction = g * beta + gamma
            residual = self._residual(rows, prediction).double()
            w = rows.weight
            residual = residual * w
            counts = self._counts(rows, prediction).double() * w
            g = g.double()
            terms = (counts, counts * g, counts * g * g, residual, residual * g)
            sums += torch.stack([term.sum(0) for term in terms])
        n, g1, g2, r, rg = sums
        determinant = n * g2 - g1 * g1
        usable = determinant > 1e-9 * n.square().clamp_min(1)
        safe = determinant.where(usable, torch.ones_like(determinant))
        beta = beta + torch.where(usable, (n * rg - g1 * r) / safe, 0.0).to(beta.dtype)
        gamma = gamma + torch.where(usable, (g2 * r - g1 * rg) / safe, 0.0).to(gamma.dtype)
        return beta, gamma

    def choose_k(self, filters: Tensor) -> None:
        """Set k of each filter, or the one k that all share, to the candidate that explains most."""
        operator: LearnableSigmoidOperator = self.operator
        errors = []
        for k in K_GRID:
            operator.p.fill_(k - K_FLOOR)
            g, y, gg, gy, yy = self._means(filters)
            errors.append(yy - y * y - (gy - g * y).square() / (gg - g * g).clamp_min(1e-12))
        table = torch.stack(errors)
        table = table if operator.p.numel() > 1 else table.sum(1, keepdim=True)
        best = torch.tensor(K_GRID, device=table.device)[table.argmin(0)]
        operator.p.copy_(best.to(operator.p.dtype) - K_FLOOR)

    def _residual(self, rows: Rows, prediction: Tensor) -> Tensor:
        """The difference to the target, and where a ReLU follows, what of it passes."""
        if not self.rectified:
            return rows.target - prediction
        if rows.added is None:
            return rows.target.relu() - torch.where(rows.target > 0, prediction, prediction.relu())
        target, total = rows.target + rows.added, prediction + rows.added
        return target.relu() - torch.where(target > 0, total, total.relu())

    def _counts(self, rows: Rows, prediction: Tensor) -> Tensor:
        """1 where the residual moves with the prediction, else 0."""
        if not self.rectified:
            return torch.ones_like(prediction)
        added = 0 if rows.added is None else rows.added
        return ((rows.target + added > 0) | (prediction + added > 0)).to(prediction.dtype)
