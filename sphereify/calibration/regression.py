"""One angular layer as the regression of a given output on the directions of its inputs.

β·g(θ) + γ is fitted to targets over rows of unit patches: filters first, as the ridge regression for g = cos; then, in
rounds of one Gauss-Newton step each, filters, β and γ for the operator as it is, and for errors that count only where
the ReLU behind the layer lets them pass. Each is a pass over rows that come in chunks, summed up as it goes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.nn import LearnableSigmoidOperator
from sphereify.nn.operators import K_FLOOR

RIDGES = (1e-4, 1e-2, 1.0, 100.0)
"""Of the mean eigenvalue of the Gram matrix, added to its diagonal; those after the first are for few rows."""
ROWS_A_COEFFICIENT = 20
"""Fewer rows than this for each unknown of a filter: the ridge is chosen on rows held out."""
ROUNDS = 4
KEPT_BYTES = 128 * 2**20
"""Cosines of all rows are kept, for the filters looked at last, up to this size."""
K_GRID = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)


@dataclass(frozen=True)
class Rows:
    """Some positions of a layer's input and what is wanted there."""

    unit: Tensor
    """(groups, n, fan_in): patches over their norms."""
    target: Tensor
    """(n, filters)"""
    weight: Tensor
    """(n, 1): how much an error counts there."""
    added: Tensor | None = None
    """(n, filters): what the layer's output is added to before the ReLU, where there is one."""

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.unit[:, part], self.target[part], self.weight[part], _part(self.added, part))

    def part(self, *, held_out: bool) -> slice:
        """The first seven eighths, or the rest."""
        n = self.target.shape[0] - self.target.shape[0] // 8
        return slice(n, None) if held_out else slice(None, n)


@dataclass
class Fit:
    """A layer's filters (directions), β, γ, and how well they did."""

    filters: Tensor
    """(filters, fan_in), each of length 1."""
    beta: Tensor
    gamma: Tensor
    mean: Tensor
    """Of g over the rows, for each filter."""
    variance: Tensor
    before: float
    """R² of the layer as it was."""
    after: float
    rows: int
    unknowns: int
    """Of one filter."""
    explained: Callable[[Tensor, Tensor, Tensor], float]
    """R² for other filters, β and γ."""


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
    """Least squares of the targets on β·g(θ) + γ.

    Args:
        chunks: makes an iterator over the rows, the same ones each time.
        operator: g.
        filters: (filters, fan_in): where the solution is drawn to as far as the rows do not say otherwise.
        groups: of the convolution; the filters of one group follow each other.
        rectified: whether a ReLU follows, so that what is negative and should be is right.
        solve_filters: whether filters are free, or β and γ alone.
        start: β and γ of the layer as it is, for the R² before; default: the best for its filters.
        tune_k: choose k of a learnable sigmoid, in place.
    """
    copied = _unit(filters)
    problem = _Problem(chunks, operator, groups, rectified)
    solver = None
    if solve_filters:
        solver = _Solver(*problem.moments_to_fit(copied), copied)
    best = problem.scale(copied)
    before = problem.explained(copied, *(start or best))
    if solver is not None:
        directions = _unit(torch.where(solver.slopes.norm(dim=1, keepdim=True) > 1e-12, solver.slopes, copied))
    else:
        directions = copied
    if tune_k and isinstance(operator, LearnableSigmoidOperator):
        problem.choose_k(directions)
        best = problem.scale(copied)
    beta, gamma = problem.scale(directions)
    if solver is not None and (beta < 0).any():
        directions, beta = problem.merged(beta < 0, -directions, directions), beta.abs()
    found = _State(directions, beta, gamma, problem.loss(directions, beta, gamma))
    rate = torch.ones_like(beta)
    for _ in range(ROUNDS if rectified else ROUNDS // 2 if getattr(operator, "name", "") != "cosine" else 0):
        proposed = problem.improved(found, solver, rate)
        better = proposed.loss < found.loss
        numbers = (torch.where(better, new, old) for new, old in zip(proposed[1:], found[1:], strict=True))
        found = _State(problem.merged(better, proposed.filters, found.filters), *numbers)
        rate = torch.where(better, rate, rate / 2)
    after = problem.explained(found.filters, found.beta, found.gamma)
    if problem.held_out and problem.explained(copied, *best) > after:
        found = _State(copied, *best, found.loss)  # what the rows say does not hold for others
        after = problem.explained(copied, *best)
    mean, variance = problem.spread(found.filters)
    return Fit(
        found.filters, found.beta, found.gamma, mean, variance, before,
        after, sum(len(chunk.weight) for chunk in chunks()), copied.shape[1], problem.explained,
    )  # fmt: skip


def regress(x: Tensor, target: Tensor, filters: Tensor) -> Tensor:
    """The slopes (filters, fan_in) of ridge regression of target (n, filters) on x (n, fan_in), drawn to `filters`."""
    rows = Rows(x.unsqueeze(0), target, torch.ones_like(target[:, :1]))
    problem = _Problem(lambda: iter([rows]), None, 1, rectified=False)
    unit = _unit(filters)
    return _Solver(*problem.moments_to_fit(unit), unit).slopes


class _State(NamedTuple):
    filters: Tensor
    beta: Tensor
    gamma: Tensor
    loss: Tensor
    """(filters,)"""


@dataclass
class _Moments:
    """Sums over rows, divided by their number, in float64."""

    count: int
    mean: Tensor
    """(groups, fan_in)"""
    covariance: Tensor
    """(groups, fan_in, fan_in)"""
    cross: Tensor
    """(groups, fan_in, filters of one group): covariance with the targets"""


class _Sums:
    """The sums of which moments are made."""

    def __init__(self, like: Tensor, groups: int):
        filters, fan_in = like.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=like.device)

        self.groups = groups
        self.count = 0
        self.parts = [
            zeros(), zeros(groups, fan_in), zeros(groups, fan_in, fan_in),
            zeros(groups, fan_in, filters // groups), zeros(filters),
        ]  # fmt: skip
        """Of w, wx, wxx, wxy and wy."""

    def add(self, rows: Rows) -> None:
        w = rows.weight
        self.count += len(w)
        wx = rows.unit * w
        sums = (w, wx, wx.mT @ rows.unit, wx.mT @ _grouped(rows.target, self.groups), w * rows.target)
        for part, values, axis in zip(self.parts, sums, (None, 1, (), (), 0), strict=True):
            part += values if axis == () else values.sum(axis, dtype=torch.float64)

    def join(self, other: "_Sums") -> None:
        self.count += other.count
        for part, theirs in zip(self.parts, other.parts, strict=True):
            part += theirs

    def moments(self) -> _Moments:
        n, x, xx, xy, y = self.parts
        n = n.clamp_min(1e-9)
        x, y = x / n, y / n
        covariance = (xx / n).sub_(x.unsqueeze(2) * x.unsqueeze(1))
        cross = xy / n - x.unsqueeze(2) * y.unflatten(0, (self.groups, 1, -1))
        return _Moments(self.count, x, covariance, cross)


class _Problem:
    """The passes over the rows."""

    def __init__(self, chunks: Callable[[], Iterator[Rows]], operator: Any, groups: int, rectified: bool):
        self.chunks = chunks
        self.operator = operator
        self.groups = groups
        self.rectified = rectified
        self.held_out = False
        """Whether the last eighth of each chunk is kept for judging."""

        self._cosines: list[tuple[Tensor, list[Tensor]]] = []
        """Of the filters looked at last, those of each chunk."""

    def rows(self, filters: Tensor, *, held_out: bool = False) -> Iterator[tuple[Rows, Tensor]]:
        """Rows, and the cosines (n, filters) of their angles with these filters."""
        known = next((cosines for asked, cosines in self._cosines if asked is filters), None)
        made: list[Tensor] = []
        size = 0
        for number, chunk in enumerate(self.chunks()):
            cos = known[number] if known is not None else self._cos(chunk, filters)
            size += cos.numel() * cos.element_size()
            if known is None and size <= KEPT_BYTES:
                made.append(cos)
            part = chunk.part(held_out=held_out) if self.held_out else slice(None)
            yield chunk[part], cos[part]
        if known is None and size <= KEPT_BYTES:
            self._cosines = [*self._cosines, (filters, made)][-3:]  # copied, found, proposed

    def merged(self, chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """The chosen filters (filters,) of one, the rest of the other; their cosines follow."""
        filters = torch.where(chosen.unsqueeze(1), one, other)
        known = [next((c for asked, c in self._cosines if asked is source), None) for source in (one, other)]
        if all(known):
            cosines = [torch.where(chosen, a, b) for a, b in zip(*known, strict=True)]  # type: ignore[arg-type]
            self._cosines = [pair for pair in self._cosines if pair[0] is not one and pair[0] is not other]
            self._cosines.append((filters, cosines))
        return filters

    def moments_to_fit(self, like: Tensor) -> "tuple[_Moments, _Moments | None]":
        """Of the rows to fit, and where they are few of those that are held out from now on."""
        fitted, judge = _Sums(like, self.groups), _Sums(like, self.groups)
        for chunk in self.chunks():
            fitted.add(chunk[chunk.part(held_out=False)])
            judge.add(chunk[chunk.part(held_out=True)])
        count = fitted.count + judge.count
        self.held_out = 16 <= count < ROWS_A_COEFFICIENT * like.shape[1]
        if self.held_out:
            return fitted.moments(), judge.moments()
        fitted.join(judge)
        return fitted.moments(), None

    def scale(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """β and γ of least squares, ReLU or not."""
        g, y, gg, gy, _ = self._sums(filters)
        variance = gg - g * g
        beta = torch.where(variance > 1e-12, (gy - g * y) / variance.clamp_min(1e-12), 0.0)
        return beta.to(filters.dtype), (y - beta * g).to(filters.dtype)

    def spread(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of g."""
        g, _, gg, _, _ = self._sums(filters, weighted=False)
        return g, (gg - g * g).clamp_min(0)

    def _sums(self, filters: Tensor, *, weighted: bool = True) -> tuple[Tensor, ...]:
        n, sums = 0.0, torch.zeros(5, len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            g, y = self.operator(cos).double(), rows.target.double()
            w = rows.weight if weighted else torch.ones_like(rows.weight)
            n += float(w.sum())
            sums += torch.stack([(w * value).sum(0) for value in (g, y, g * g, g * y, y * y)])
        return tuple(sums / max(n, 1e-9))

    def loss(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        total = torch.zeros(len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            residual = self._residual(rows, self.operator(cos) * beta + gamma)
            total += (rows.weight * residual.double().square()).sum(0)
        return total

    def explained(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> float:
        """R² of what a ReLU lets pass, where there is one; on the rows held out where there are such."""
        error, n = 0.0, 0
        y = yy = torch.zeros(len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters, held_out=self.held_out):
            got, wanted = self.operator(cos) * beta + gamma, rows.target
            if self.rectified:
                got, wanted = ((one if rows.added is None else one + rows.added).relu() for one in (got, wanted))
            error += float((got - wanted).double().square().sum())
            n += len(wanted)
            y = y + wanted.double().sum(0)
            yy = yy + wanted.double().square().sum(0)
        variance = float((yy - y.square() / max(n, 1)).sum())
        return 1 - error / variance if variance > 0 else float(error <= 1e-12)

    def improved(self, now: _State, solver: "_Solver | None", rate: Tensor) -> _State:
        """One Gauss-Newton step for the filters, shortened to `rate`, then one for β and γ."""
        filters = now.filters
        if solver is not None:
            n, pull, weight = 0.0, torch.zeros((), device=filters.device), torch.zeros((), device=filters.device)
            for rows, cos in self.rows(filters):
                g, slope = self._g_and_slope(cos)
                slope = slope * now.beta
                prediction = g * now.beta + now.gamma
                w = rows.weight
                residual = self._residual(rows, prediction) * slope * w
                n += float(w.sum())
                grouped = _grouped(residual, self.groups)
                pull = pull + rows.unit.mT @ grouped - solver.mean.unsqueeze(2) * grouped.sum(1, keepdim=True)
                weight = weight + (slope.square() * self._counts(rows, prediction) * w).sum(0)
            step = solver.solve(pull / n)
            filters = _unit(filters + step * (rate / (weight / n).clamp_min(1e-12)).unsqueeze(1))
        beta, gamma = self._rescaled(filters, now.beta, now.gamma)
        return _State(filters, beta, gamma, self.loss(filters, beta, gamma))

    def _rescaled(self, filters: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(5, len(filters), dtype=torch.float64, device=filters.device)
        for rows, cos in self.rows(filters):
            g = self.operator(cos)
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
        """Of each filter, or of all where they share it, the k that explains most."""
        operator: LearnableSigmoidOperator = self.operator
        errors = []
        for k in K_GRID:
            operator.p.fill_(k - K_FLOOR)
            g, y, gg, gy, yy = self._sums(filters)
            errors.append(yy - y * y - (gy - g * y).square() / (gg - g * g).clamp_min(1e-12))
        table = torch.stack(errors)
        table = table if operator.p.numel() > 1 else table.sum(1, keepdim=True)
        best = torch.tensor(K_GRID, device=table.device)[table.argmin(0)]
        operator.p.copy_(best.to(operator.p.dtype) - K_FLOOR)

    def _cos(self, rows: Rows, filters: Tensor) -> Tensor:
        product = rows.unit @ filters.unflatten(0, (self.groups, -1)).mT
        return product.movedim(0, 1).flatten(1).clamp(-1, 1)

    def _g_and_slope(self, cos: Tensor) -> tuple[Tensor, Tensor]:
        cos = cos.detach().requires_grad_()
        with torch.enable_grad():
            g = self.operator(cos)
            (slope,) = torch.autograd.grad(g.sum(), cos) if g.requires_grad else (torch.ones_like(cos),)
        return g.detach(), slope

    def _residual(self, rows: Rows, prediction: Tensor) -> Tensor:
        """What is missing, and where a ReLU follows, what of it arrives."""
        if not self.rectified:
            return rows.target - prediction
        if rows.added is None:
            return rows.target.relu() - torch.where(rows.target > 0, prediction, prediction.relu())
        wanted, got = rows.target + rows.added, prediction + rows.added
        return wanted.relu() - torch.where(wanted > 0, got, got.relu())

    def _counts(self, rows: Rows, prediction: Tensor) -> Tensor:
        """1 where the residual moves with the prediction."""
        if not self.rectified:
            return torch.ones_like(prediction)
        added = 0 if rows.added is None else rows.added
        return ((rows.target + added > 0) | (prediction + added > 0)).to(prediction.dtype)


class _Solver:
    """The ridge regression, and its inverse for the steps that follow."""

    def __init__(self, moments: _Moments, judge: _Moments | None, copied: Tensor):
        groups = len(moments.mean)
        unit = copied.double().unflatten(0, (groups, -1)).mT  # (groups, fan_in, filters of one)
        seen = moments.covariance @ unit
        scale = (unit * moments.cross).sum(1, keepdim=True) / (unit * seen).sum(1, keepdim=True).clamp_min(1e-12)
        prior = unit * scale
        missing = moments.cross - moments.covariance @ prior
        spread = moments.covariance.diagonal(dim1=1, dim2=2).mean(1)
        size = torch.maximum(spread, 1e-5 * moments.mean.square().mean(1)).clamp_min(1e-12)  # above rounding in fp32
        best = None
        for ridge in RIDGES if judge is not None else RIDGES[:1]:
            factor = _factor(moments.covariance, ridge * size)
            slopes = prior + torch.cholesky_solve(missing, factor)
            error = 0.0
            if judge is not None:
                error = float(((slopes * (judge.covariance @ slopes - 2 * judge.cross)).sum(1)).sum())
            if best is not None and error >= best[0]:
                break  # more pull does not help
            best = error, slopes, factor
        assert best is not None
        self.factor = best[2].to(copied.dtype)  # of steps towards the solution, which need not be exact
        self.mean = moments.mean.to(copied.dtype)
        self.slopes = best[1].mT.flatten(0, 1).to(copied.dtype)

    def solve(self, pull: Tensor) -> Tensor:
        """(groups, fan_in, filters of one) -> (filters, fan_in)"""
        return torch.cholesky_solve(pull, self.factor).mT.flatten(0, 1)


def _factor(covariance: Tensor, ridge: Tensor) -> Tensor:
    """The Cholesky factor of covariance + ridge, with more of it where rounding has made the matrix indefinite."""
    for _ in range(8):
        raised = covariance.clone()
        raised.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed.any():
            break
        ridge = torch.where(failed > 0, ridge * 10, ridge)
    return factor


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(n, filters) -> (groups, n, filters of one)"""
    return values.unflatten(1, (groups, -1)).movedim(1, 0)


def _part(rows: Tensor | None, part: slice) -> Tensor | None:
    return None if rows is None else rows[part]


def _unit(filters: Tensor) -> Tensor:
    return filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-12)
