import math

import pytest
import pytorch_metric_learning.losses as metric_learning
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, MarginAnnealing, as_metric_loss
from sphereify.nn.operators import CosineOperator
from tests.grids import grid
from tests.nn import loss_oracle, oracle
from tests.nn.loss_oracle import HEADS, MARGINS, at_angles, build
from tests.nn.oracle import normal

K = 0.3
STEEPEST = {"linear": 2 / math.pi, "cosine": 1.0} | dict.fromkeys(
    ("sigmoid", "learnable-sigmoid"), 1 / (2 * K * math.tanh(math.pi / (4 * K)))
)  # the greatest |dg/dθ|
LENGTH = 1e3  # of feature and weight: ε = 1e-12 then is below the digits of float64, and poles are poles
POLE = 1e-7  # what rounding of cos θ does to θ next to a pole, √(2·1e-16) and a few times that

angles = st.floats(0, math.pi)
margins = st.one_of(st.floats(1, 40), st.integers(1, 8).map(float))


def curve(operator, margin, theta, kind="ga-softmax"):
    """ψ(θ) in float64, as the head has it."""
    head = AngularHead(2, 3, kind=kind, operator=operator, margin=margin, dtype=torch.float64)
    if operator == "learnable-sigmoid":
        head.operator.p.data.fill_(K - 0.05)
    head.weight.data = LENGTH * torch.tensor([[1.0, 0.0], [0.3, 0.4], [-1.0, 2.0]], dtype=torch.float64)
    theta = torch.as_tensor(theta, dtype=torch.float64)
    x = LENGTH * torch.stack([theta.cos(), theta.sin()], -1)
    return head.target_logit(x, torch.zeros(len(x), dtype=torch.int64)).detach() / LENGTH


# ------------------------------------------------------------------------------------------------------- the curve


@pytest.mark.parametrize(
    ("operator", "golden"),
    [
        ("linear", 0.3633802276),
        ("cosine", 0.5403023059),
        ("sigmoid", 0.7483054729),
        ("learnable-sigmoid", 0.7483054729),
    ],
)
def test_double_margin_at_half_a_radian_has_the_golden_value(operator, golden):
    assert curve(operator, 2, [0.5]).item() == pytest.approx(golden, abs=6e-11)


@pytest.mark.parametrize("margin", [1, 1.5, 2, 2.7, 3, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_curve_is_1_minus_2j_at_jpi_over_m(operator, margin):
    turns = range(math.floor(margin) + 1)
    got = curve(operator, margin, [j * math.pi / margin for j in turns])
    torch.testing.assert_close(got.tolist(), [1.0 - 2 * j for j in turns], rtol=0, atol=POLE * margin)


@pytest.mark.parametrize("operator", OPERATORS)
def test_curve_ends_at_1_minus_2m(operator):
    # Between the halves only the linear operator ends there: g itself is not a line.
    for margin in [1, 1.5, 2, 2.5, 3, 4, 7] + ([2.7, math.e] if operator == "linear" else []):
        assert curve(operator, margin, [math.pi]).item() == pytest.approx(1 - 2 * margin, abs=POLE * margin)


@given(theta=angles, margin=margins)
@settings(max_examples=100, deadline=None)
def test_linear_curve_is_a_line_whatever_the_margin(theta, margin):
    assert curve("linear", margin, [theta]).item() == pytest.approx(1 - 2 * margin * theta / math.pi, abs=POLE * margin)


@pytest.mark.parametrize("operator", OPERATORS)
@given(theta=st.lists(angles, min_size=2, max_size=20), margin=margins)
@settings(max_examples=60, deadline=None)
def test_curve_is_that_of_the_definition_and_falls_without_a_jump(operator, theta, margin):
    theta = sorted(theta)
    got, steepest = curve(operator, margin, theta), margin * STEEPEST[operator]
    expected = torch.tensor([loss_oracle.psi(operator, t, margin, K) for t in theta], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=2 * POLE * steepest)
    falls = -got.diff()
    steps = torch.tensor(theta, dtype=torch.float64).diff()
    assert (falls >= -POLE * steepest).all()
    assert (falls <= steepest * (steps + POLE)).all()


@pytest.mark.parametrize("operator", OPERATORS)
@given(margin=st.floats(1.01, 20), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_curve_falls_by_2_with_each_pi_over_m(operator, margin, share):
    theta = share * (math.pi - math.pi / margin)
    here, there = curve(operator, margin, [theta, theta + math.pi / margin])
    assert (here - there).item() == pytest.approx(2, abs=POLE * margin * STEEPEST[operator])


def test_operator_of_the_users_own_has_a_margin_too():
    theta = [0.0, 0.3, 1.0, 1.1, 2.0, math.pi]
    got = curve(lambda cos: cos**3, 3, theta)
    expected = []
    for t in theta:
        turns = math.floor(3 * t / math.pi)
        expected.append(math.cos(3 * t - turns * math.pi) ** 3 - 2 * turns)
    torch.testing.assert_close(got.tolist(), expected, rtol=0, atol=3 * POLE)


def test_subclass_of_the_learnable_sigmoid_keeps_one_k_per_class():
    builtin = build("ga-softmax", "learnable-sigmoid", margin=2)

    class Mine(type(builtin.operator)):
        pass

    mine = build("ga-softmax", Mine(4), margin=2)
    mine.load_state_dict(builtin.state_dict())
    x, y = normal(4, 6), torch.tensor([3, 3, 0, 1])
    torch.testing.assert_close(mine.target_logit(x, y), builtin.target_logit(x, y), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- what it is the same as


def loss_of(head, x, y, **options):
    return as_metric_loss(head, **options)(x, y)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bias", [False, True])
def test_margin_of_1_is_w_softmax(operator, bias):
    x, y = normal(8, 6), torch.arange(8) % 4
    ga, w = (build(kind, operator, bias=bias, margin=1) for kind in ("ga-softmax", "w-softmax"))
    torch.testing.assert_close(loss_of(ga, x, y), F.cross_entropy(w(x), y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "operator"), MARGINS)
def test_infinite_annealing_is_the_loss_without_a_margin(kind, operator):
    head, x, y = build(kind, operator, margin=4), normal(8, 6), torch.arange(8) % 4
    annealed = loss_of(head, x, y, annealing=MarginAnnealing(start=1e14))
    torch.testing.assert_close(annealed, F.cross_entropy(head.logits(x), y), rtol=0, atol=1e-11)
    assert (loss_of(head, x, y) - annealed).abs() > 0.1


@pytest.mark.parametrize("margin", [1, 1.5, 3, 4])
def test_a_softmax_is_ga_softmax_with_cosine_in_value_and_gradient(margin):
    x, y, results = normal(8, 6).requires_grad_(), torch.arange(8) % 4, []
    for head in (build("a-softmax", "cosine", margin=margin), build("ga-softmax", CosineOperator(), margin=margin)):
        loss = loss_of(head, x, y)
        results.append((loss, *torch.autograd.grad(loss, [x, head.weight])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # theirs, with scipy
@pytest.mark.parametrize("margin", [1, 2, 3, 4])
def test_a_softmax_has_the_value_of_sphere_face_in_pytorch_metric_learning(margin):
    head = build("a-softmax", "cosine", margin=margin, sizes=(8, 5))
    theirs = metric_learning.SphereFaceLoss(5, 8, margin=margin, scale=1)
    theirs.W.data = head.weight.detach().t().clone()
    x, y = 4 * normal(64, 8), torch.arange(64) % 5
    torch.testing.assert_close(as_metric_loss(head)(x, y), theirs(x, y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(as_metric_loss(head).get_logits(x), theirs.get_logits(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_s_softmax_has_value_and_gradient_of_normalized_softmax_in_pytorch_metric_learning(scale):
    head = build("s-softmax", "cosine", scale=scale, sizes=(8, 5))
    theirs = metric_learning.NormalizedSoftmaxLoss(5, 8, temperature=1 / scale)
    theirs.W.data = head.weight.detach().t().clone()
    x, y, ours = 4 * normal(64, 8).requires_grad_(), torch.arange(64) % 5, as_metric_loss(head)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x), rtol=1e-9, atol=1e-9)
    (mine,) = torch.autograd.grad(ours(x, y), head.weight)
    (other,) = torch.autograd.grad(theirs(x, y), theirs.W)
    torch.testing.assert_close(mine, other.t(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_s_softmax_on_a_simplex_has_the_minimum_of_the_theory_at_any_length_of_the_feature(chunk_size):
    simplex = torch.eye(10, dtype=torch.float64) - 0.1
    head = AngularHead(10, 10, kind="s-softmax", scale=1, dtype=torch.float64)
    head.weight.data = 30 * simplex
    for length in (1, 7, 1e4):
        loss = loss_of(head, length * simplex, torch.arange(10), chunk_size=chunk_size).item()
        assert loss == pytest.approx(1.3769349204501935, rel=3e-13)  # ε takes 1e-12 off each cosine


# --------------------------------------------------------------------------------------------------- its gradient

GRADCHECKS = [(kind, name, m) for kind, name in HEADS for m in ([1, 1.5, 2, 3, 4] if (kind, name) in MARGINS else [1])]


@pytest.mark.parametrize(
    ("kind", "operator", "margin", "chunk_size"),
    grid(
        [(*case, chunk_size) for case in GRADCHECKS for chunk_size in (None, 2)],
        lambda kind, operator, margin, chunk_size: (margin in (1, 1.5)) == (chunk_size is None),
    ),
)
def test_gradcheck_by_features_weight_bias_and_k(kind, operator, margin, chunk_size):
    head = build(kind, operator, margin=margin, scale=3, bias=True, sizes=(3, 3))
    loss = as_metric_loss(head, label_smoothing=0.1, chunk_size=chunk_size)
    y = [0, 2, 1]
    x = at_angles(head.weight, y, [0.4, 1.7, 2.8], length=1.5).requires_grad_()
    # The parameters are read off the head, which gradcheck changes in place.
    assert torch.autograd.gradcheck(lambda x, *_: loss(x, torch.tensor(y)), (x, *head.parameters()))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("operator", grid(OPERATORS, lambda operator: operator == "learnable-sigmoid"))
def test_gradcheck_with_every_option(operator, chunk_size):
    head = build("ga-softmax", operator, margin=3, bias=True, sizes=(3, 4))
    options = {"annealing": MarginAnnealing(start=2), "class_weight": torch.tensor([1.0, 0.5, 2.0, 3.0])}
    loss = as_metric_loss(head, label_smoothing=0.2, separation=0.7, chunk_size=chunk_size, **options).eval()
    x, y = normal(3, 3).requires_grad_(), torch.tensor([0, -100, 3])
    mixed = (torch.tensor([0, 1, 3]), torch.tensor([2, 1, 0]), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    for targets in (y, mixed):
        assert torch.autograd.gradcheck(lambda x, *_, t=targets: loss(x, t), (x, *head.parameters()))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_poles_zeros_and_long_features_are_finite_in_value_and_gradient(kind, operator, dtype, chunk_size):
    for margin in (1, 2.7, 4):
        head = build(kind, operator, dtype=dtype, bias=True, margin=margin, sizes=(6, 5))
        head.weight.data[4] = 0
        w = head.weight[0].detach()
        x = torch.stack([w, -w, 0 * w, 1e4 * w, -1e4 * w, 1e4 * normal(6, dtype=dtype), 1e-4 * w, w])
        x.requires_grad_()
        loss = as_metric_loss(head, chunk_size=chunk_size, label_smoothing=0.1)(
            x, torch.tensor([0, 0, 0, 0, 0, 1, 0, 4])
        )
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(t.grad.isfinite().all() for t in [x, *head.parameters()])


def turning(head, away):
    """What turns features in fp32 at small angles from w_0, or from -w_0 where they are negative: got and true, (B,).

    It is the part of ∂(‖x‖·ψ)/∂x across x, and truly ψ'(θ) of the rounded feature, whatever ‖x‖.
    """
    theta = [t if t > 0 else math.pi + t for t in away]
    x = at_angles(head.weight, [0] * len(away), theta, length=2).float().requires_grad_()
    (grad,) = torch.autograd.grad(head.target_logit(x, torch.zeros(len(away), dtype=torch.int64)).sum(), x)
    ahead, w = F.normalize(x.detach().double(), dim=1), head.weight[0].detach().double()
    toward = F.normalize(w - (w * ahead).sum(1, keepdim=True) * ahead, dim=1)
    true = []
    for t in oracle.linear_angles(x, head.weight, 0)[:, 0].tolist():
        inner = head.margin * t - math.floor(head.margin * t / math.pi) * math.pi
        true.append(-head.margin * oracle.slope(head.operator.name, inner, K))
    return (grad.double() * toward).sum(1), torch.tensor(true, dtype=torch.float64)


def near_a_pole(kind, operator, margin):
    head = build(kind, operator, dtype=torch.float32, margin=margin, sizes=(3, 3))
    if operator == "learnable-sigmoid":
        head.operator.p.data.fill_(K - 0.05)
    return head


@pytest.mark.parametrize("margin", [1, 1.5, 2, 2.7, 4])
@pytest.mark.parametrize(("kind", "operator"), MARGINS)
def test_gradient_in_fp32_is_the_true_one_outside_the_band(kind, operator, margin):
    # The band |cos θ| > 1 - 1e-6 ends at 1.5e-3. fp32 holds cos θ to 1e-7, so θ to 1e-7/θ: 1% of it at 3e-3.
    away = [3e-3, 5e-3, 0.01, 0.03, 0.1, 0.5, -0.5, -0.1, -0.03, -0.01, -5e-3, -3e-3]
    got, true = turning(near_a_pole(kind, operator, margin), away)
    torch.testing.assert_close(got, true, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize("margin", [1, 1.5, 2, 2.7, 4])
@pytest.mark.parametrize(("kind", "operator"), MARGINS)
def test_gradient_in_fp32_inside_the_band_is_near_the_true_one_for_cosine_and_never_beyond_it(kind, operator, margin):
    got, true = turning(near_a_pole(kind, operator, margin), [2e-4, 5e-4, 1e-3, -1e-3, -5e-4, -2e-4])
    assert (got < 1.1 * true + 2e-3).all()
    assert (got > -2e-3).all()
    # Where ψ' itself is not 0 at the pole it falls to 0 with sin θ: so it does at π for a margin that is no integer.
    smooth = slice(None) if margin % 1 == 0 else slice(3)
    if operator == "cosine":
        torch.testing.assert_close(got[smooth], true[smooth], rtol=0.1, atol=5e-4)


@pytest.mark.parametrize("margin", [0.99, 0, -2, math.nan, math.inf])
def test_margin_below_1_is_refused(margin):
    with pytest.raises(UsageError, match=f"margin: got {margin!r}, expected a number of at least 1; the default is 4"):
        AngularHead(6, 4, kind="ga-softmax", margin=margin)


def test_a_softmax_of_another_operator_is_refused():
    with pytest.raises(UsageError, match="a-softmax: got the operator 'linear', expected cosine; ga-softmax takes any"):
        AngularHead(6, 4, kind="a-softmax", operator="linear")


def test_loss_of_an_evaluated_margin_head_has_no_margin():
    head, x, y = build("ga-softmax", "linear", margin=3).eval(), normal(5, 6), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(AngularLoss(head)(head(x), y), F.cross_entropy(head.logits(x), y), rtol=0, atol=1e-12)
