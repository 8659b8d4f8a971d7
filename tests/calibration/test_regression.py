"""The regression of one layer, on rows made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.calibration.moments import Rows
from sphereify.calibration.regression import fit
from sphereify.nn import CosineOperator, LearnableSigmoidOperator, LinearOperator


def rows_of(x: Tensor, target: Tensor, added: Tensor | None = None):
    unit = F.normalize(x, dim=1).unsqueeze(0)
    return lambda: iter([Rows(unit, target, torch.ones(len(x), 1, dtype=x.dtype), added)])


@pytest.mark.parametrize("operator", [CosineOperator(), LinearOperator(), LearnableSigmoidOperator(1, k=0.3).double()])
def test_a_fit_under_a_relu_is_better_there_than_a_fit_of_all_values(operator):
    torch.manual_seed(0)
    x = torch.randn(4000, 12, dtype=torch.float64) * torch.rand(4000, 1, dtype=torch.float64).mul(3).exp()
    target = x @ torch.randn(12, 5, dtype=torch.float64) - 2
    filters = torch.randn(5, 12, dtype=torch.float64)
    unit = F.normalize(x, dim=1)

    @torch.no_grad()
    def passed(solution):  # the error that a ReLU lets pass, computed anew
        y = operator(unit @ solution.filters.t()) * solution.beta + solution.gamma
        return float((y.relu() - target.relu()).square().mean())

    with torch.no_grad():
        plain, rectified = (fit(rows_of(x, target), operator, filters, rectified=r) for r in (False, True))
    assert passed(rectified) < passed(plain)


def test_what_is_added_before_the_relu_is_seen():
    torch.manual_seed(1)
    x, added = torch.randn(3000, 8), torch.randn(3000, 4) * 3
    target = x @ torch.randn(8, 4) * x.norm(dim=1, keepdim=True)
    filters = torch.randn(4, 8)
    unit = F.normalize(x, dim=1)

    def passed(solution):  # full errors where something should pass, what passes where nothing should
        y, total = unit @ solution.filters.t() * solution.beta + solution.gamma + added, target + added
        return float(torch.where(total > 0, y - total, y.relu()).square().mean())

    with torch.no_grad():
        blind = fit(rows_of(x, target), CosineOperator(), filters, rectified=True)
        seeing = fit(rows_of(x, target, added), CosineOperator(), filters, rectified=True)
    assert passed(seeing) < passed(blind)


def test_few_rows_leave_the_filters_near_the_copied_ones_and_are_judged_on_others():
    torch.manual_seed(2)
    filters = F.normalize(torch.randn(3, 64), dim=1)
    x = torch.randn(40, 64)
    noise = torch.randn(40, 3) * 20
    with torch.no_grad():
        solution = fit(rows_of(x, noise), CosineOperator(), filters)
    assert solution.after < 0.5  # 35 rows for 64 unknowns explain themselves wholly, and others not at all
    assert ((solution.filters * filters).sum(1).abs() > 0.5).all()


def test_the_k_that_made_the_targets_is_found_for_each_filter():
    torch.manual_seed(3)
    x = torch.randn(5000, 6)
    true = LearnableSigmoidOperator(2, k=0.5)
    with torch.no_grad():
        true.p.copy_(torch.tensor([0.1, 0.8]) - 0.05)
        filters = F.normalize(torch.randn(2, 6), dim=1)
        target = true(F.normalize(x, dim=1) @ filters.t())
        operator = LearnableSigmoidOperator(2, k=0.5)
        fit(rows_of(x, target), operator, filters, solve_filters=False, tune_k=True)
    torch.testing.assert_close(operator.k.detach(), torch.tensor([0.1, 0.8]))
