"""ArcFace, CosFace and SphereFace2 against loops written from their papers, and against another library."""

import itertools
import math

import pytest
import pytorch_metric_learning.losses as metric_learning
import torch
import torch.nn.functional as F
from torch import nn

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, AngularOutput, MarginAnnealing, as_metric_loss
from sphereify.nn.sphereface2 import balanced_bias
from tests.grids import grid
from tests.nn.face_oracle import KINDS, MARGINS, SOFTMAX, angles, binary, face_loss, plain
from tests.nn.loss_oracle import at_angles, build
from tests.nn.oracle import normal

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25])
TARGETS = torch.tensor([0, 3, 2, 2, 1])
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"class_weight": WEIGHT},
    {"reduction": "none", "class_weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 3},
    {"reduction": "sum", "class_weight": WEIGHT, "label_smoothing": 1.0},
    {"label_smoothing": 0.3, "class_weight": WEIGHT, "ignore_index": 2},
]
EXACT = {"rtol": 0, "atol": 1e-10}
PAIRS = list(itertools.product(KINDS, OPERATORS))


def fixture(kind, operator="cosine", scale=7.0, **given):
    """A head, and features whose angles to their targets lie in all of [0, π]."""
    head = build(kind, operator, scale=scale, **given)
    return head, at_angles(head.weight, TARGETS.tolist(), [0.1, 0.9, 1.6, 2.4, 3.0])


# --------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "operator"), PAIRS)
def test_logits_without_a_margin_are_those_of_the_loop(kind, operator, bias):
    head, x = fixture(kind, operator, bias=bias)
    expected = torch.tensor(plain(head, x), dtype=torch.float64)
    output = head(x)
    assert isinstance(output, AngularOutput)
    torch.testing.assert_close(output.logits.detach(), expected, **EXACT)
    torch.testing.assert_close(head.eval()(x).detach(), expected, **EXACT)
    torch.testing.assert_close(head.logits(x, torch.tensor([2, 0])).detach(), expected[:, [2, 0]], **EXACT)


@pytest.mark.parametrize(
    ("kind", "operator", "margin", "bias"),
    grid(
        [(*pair, m, bias) for pair in PAIRS for m in MARGINS[pair[0]] for bias in (False, True)],
        lambda kind, operator, margin, bias: margin == MARGINS[kind][2] and bias == (operator == "cosine"),
    ),
)
def test_loss_is_that_of_the_papers(kind, operator, margin, bias):
    head, x = fixture(kind, operator, margin=margin, bias=bias)
    for options, chunk_size in itertools.product(OPTIONS, (None, 1, 3)):
        got = AngularLoss(head, chunk_size=chunk_size, **options)(head(x), TARGETS)
        torch.testing.assert_close(got.detach(), face_loss(head, x, TARGETS, **options), **EXACT, msg=str(options))
    for options in OPTIONS:
        got = AngularLoss(head.eval(), **options)(head(x), TARGETS)
        expected = face_loss(head, x, TARGETS, **options, has_margin=False)
        torch.testing.assert_close(got.detach(), expected, **EXACT, msg=str(options))


@pytest.mark.parametrize("kind", KINDS)
def test_annealed_loss_is_that_of_the_papers(kind):
    head, x = fixture(kind, bias=True)
    loss = AngularLoss(head, annealing=MarginAnnealing(5.0, floor=0))
    torch.testing.assert_close(loss(head(x), TARGETS).detach(), face_loss(head, x, TARGETS, annealing=5.0), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_mixup_is_the_mixture_of_two_losses(kind):
    head, x = fixture(kind)
    other, share = TARGETS.roll(2), torch.tensor([0.1, 0.5, 1.0, 0.0, 0.7], dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.1}):
        a, b = (face_loss(head, x, y, reduction="none", **options) for y in (TARGETS, other))
        got = AngularLoss(head, **options)(head(x), (TARGETS, other, share))
        torch.testing.assert_close(got.detach(), (share * a + (1 - share) * b).mean(), **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "class_weight": WEIGHT}, {"reduction": "none"}])
def test_probabilities_for_sphereface2_are_the_mean_over_classes_by_probability(options, chunk_size):
    head, x = fixture("sphereface2")
    shares = normal(5, 4).softmax(1)
    each = {k: v for k, v in options.items() if k != "reduction"} | {"reduction": "none"}
    losses = torch.stack([face_loss(head, x, torch.full((5,), j), **each) for j in range(4)], 1)
    expected = (shares * losses).sum(1)
    expected = expected if options.get("reduction") == "none" else expected.mean()
    got = AngularLoss(head, chunk_size=chunk_size, **options)(head(x), shares)
    torch.testing.assert_close(got.detach(), expected, **EXACT)


@pytest.mark.parametrize("kind", SOFTMAX)
def test_probabilities_are_refused_for_the_margin_of_a_softmax(kind):
    head, x = fixture(kind)
    with pytest.raises(UsageError, match=r"got probabilities, but a margin belongs to one target class.*mixup"):
        AngularLoss(head)(head(x), torch.full((5, 4), 0.25))


def test_arcface_falls_without_a_jump_and_is_the_paper_up_to_pi_less_the_margin():
    head = AngularHead(2, 3, kind="arcface", scale=1, dtype=torch.float64)
    head.weight.data = torch.tensor([[1e3, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    theta = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    x = 1e3 * torch.stack([theta.cos(), theta.sin()], 1)
    got = head.target_logit(x, torch.zeros(400, dtype=torch.int64)).detach()
    assert (got.diff() < 1e-7).all()
    assert (got.diff() > -0.01).all()
    inside = theta < math.pi - 0.5
    torch.testing.assert_close(got[inside], (theta[inside] + 0.5).cos(), rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # theirs, with scipy
@pytest.mark.parametrize("margin", [0.1, 0.35])
@pytest.mark.parametrize("kind", SOFTMAX)
def test_value_and_gradient_are_those_of_pytorch_metric_learning(kind, margin):
    head = build(kind, "cosine", margin=margin, scale=16, sizes=(8, 5))
    if kind == "arcface":
        theirs = metric_learning.ArcFaceLoss(5, 8, margin=math.degrees(margin), scale=16)
    else:
        theirs = metric_learning.CosFaceLoss(5, 8, margin=margin, scale=16)
    theirs.W.data = head.weight.detach().t().clone()
    x, y, ours = 4 * normal(64, 8).requires_grad_(), torch.arange(64) % 5, as_metric_loss(head)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x), rtol=1e-9, atol=1e-9)
    for mine, other in ((head.weight, theirs.W), (x, x)):
        (got,), (expected,) = torch.autograd.grad(ours(x, y), mine), torch.autograd.grad(theirs(x, y), other)
        torch.testing.assert_close(got, expected if other is x else expected.t(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", SOFTMAX)
def test_margin_of_0_is_s_softmax(kind):
    x, y = normal(8, 6), torch.arange(8) % 4
    none, plain_head = build(kind, "linear", margin=0, scale=9), build("s-softmax", "linear", scale=9)
    torch.testing.assert_close(as_metric_loss(none)(x, y), F.cross_entropy(plain_head(x), y), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------- the solved bias


@pytest.mark.parametrize(
    ("classes", "scale", "margin", "power", "share"),
    [(2, 40, 0.4, 3, 0.7), (10, 40, 0.4, 3, 0.7), (1000, 30, 0.2, 2, 0.6), (100000, 64, 1.0, 3, 0.9), (2, 8, 0, 1, 0.5),
     (4, 800, 1.0, 3, 0.75)],
)  # fmt: skip
def test_the_bias_makes_the_initial_loss_least_and_balances_its_gradient(classes, scale, margin, power, share):
    b = balanced_bias(classes, scale, margin, power, share)
    right_angle = 2 * 0.5**power - 1
    p, n = scale * (right_angle - margin), scale * (right_angle + margin)

    def sigmoid(z):
        return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))

    positive, negatives = share * sigmoid(-p - b), (1 - share) * (classes - 1) * sigmoid(n + b)
    assert positive == pytest.approx(negatives, rel=1e-9)

    def loss(b):
        zs = torch.tensor([-p - b, n + b], dtype=torch.float64)
        return float(F.softplus(zs) @ torch.tensor([share, (1 - share) * (classes - 1)], dtype=torch.float64))

    assert loss(b) <= min(loss(b - 0.1), loss(b + 0.1))


def test_a_head_starts_with_the_solved_bias_and_learns_it():
    head = AngularHead(8, 10, kind="sphereface2")
    assert head.common_bias.shape == (1,)
    assert head.common_bias.item() == pytest.approx(balanced_bias(10, 40, 0.4, 3, 0.7), rel=1e-6)
    features = torch.zeros(16, 8)  # at right angles to every class
    loss = as_metric_loss(head)(features, torch.arange(16) % 10)
    assert torch.autograd.grad(loss, head.common_bias)[0].item() == pytest.approx(0, abs=1e-6)
    assert set(head.state_dict()) == {"weight", "common_bias"}
    assert set(AngularHead(8, 10, kind="cosface").state_dict()) == {"weight"}


def test_one_class_has_no_negatives_and_is_refused():
    with pytest.raises(UsageError, match="sphereface2: got 1 class, expected two or more"):
        AngularHead(8, 1, kind="sphereface2")


# -------------------------------------------------------------------------------------------------------- its gradient


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("kind", "operator"), grid(PAIRS, lambda kind, operator: operator in ("cosine", "learnable-sigmoid"))
)
def test_gradcheck_by_features_and_every_parameter(kind, operator, chunk_size):
    head = build(kind, operator, scale=3, bias=True, sizes=(3, 3))
    loss = as_metric_loss(head, label_smoothing=0.1, chunk_size=chunk_size)
    y = [0, 2, 1]
    x = at_angles(head.weight, y, [0.4, 1.7, 2.3], length=1.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: loss(x, torch.tensor(y)), (x, *head.parameters()))


def by_hand(head, x, y):
    """The loss with the margin as a constant that is added to cos θ, or taken from it, by plain torch."""
    cos = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    target, m = F.one_hot(y, head.num_classes).double(), head.margin
    theta = cos.detach().acos()
    if head.kind in ("ga-softmax", "a-softmax"):
        turns = (m * theta / math.pi).floor()
        constant = target * ((m * theta - turns * math.pi).cos() - 2 * turns - cos.detach())
        return F.cross_entropy(x.norm(dim=1, keepdim=True) * (cos + constant), y)
    if head.kind == "arcface":
        turns = ((theta + m) / math.pi).floor()
        constant = target * ((theta + m - turns * math.pi).cos() - 2 * turns - cos.detach())
        return F.cross_entropy(head.scale * (cos + constant), y)
    if head.kind == "cosface":
        return F.cross_entropy(head.scale * (cos - m * target), y)
    constant = 2 * ((cos.detach() + 1) / 2) ** head.similarity_power - 1 - cos.detach() - m * (2 * target - 1)
    logits = head.scale * (cos + constant) + head.common_bias
    weight = head.positive_weight * target + (1 - head.positive_weight) * (1 - target)
    total = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum")
    return total / head.scale / len(x)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("kind", ["ga-softmax", "a-softmax", *KINDS])
def test_detached_margin_has_the_value_of_the_true_one_and_the_gradient_of_a_constant(kind, chunk_size):
    margin = {"margin": 3} if kind in ("ga-softmax", "a-softmax") else {}
    head = build(kind, "cosine", scale=5, margin_gradient="detached", **margin)
    true = build(kind, "cosine", scale=5, **margin)
    x, y = 2 * normal(9, 6).requires_grad_(), torch.arange(9) % 4
    loss = as_metric_loss(head, chunk_size=chunk_size)(x, y)
    torch.testing.assert_close(loss, as_metric_loss(true)(x, y), rtol=0, atol=1e-12)
    leaves = [x, *head.parameters()]
    got, expected = (torch.autograd.grad(value, leaves) for value in (loss, by_hand(head, x, y)))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    others = torch.autograd.grad(as_metric_loss(true)(x, y), [x, *true.parameters()])
    assert (kind == "cosface") == torch.allclose(got[0], others[0])


def test_logits_of_a_detached_head_have_their_true_gradient():
    x, results = normal(3, 6).requires_grad_(), []
    for gradient in ("true", "detached"):
        head = build("sphereface2", "cosine", margin_gradient=gradient)
        results.append(torch.autograd.grad(head(x).logits.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ["true", "detached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "operator"), PAIRS)
def test_poles_zeros_and_long_features_are_finite_in_value_and_gradient(kind, operator, dtype, gradient):
    head = build(kind, operator, dtype=dtype, bias=True, margin_gradient=gradient, sizes=(6, 5))
    head.weight.data[4] = 0
    w = head.weight[0].detach()
    x = torch.stack([w, -w, 0 * w, 1e4 * w, -1e4 * w, 1e4 * normal(6, dtype=dtype), 1e-4 * w, w]).requires_grad_()
    for chunk_size in (None, 3):
        loss = as_metric_loss(head, chunk_size=chunk_size, label_smoothing=0.1)(
            x, torch.tensor([0, 0, 0, 0, 0, 1, 0, 4])
        )
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(t.grad.isfinite().all() for t in [x, *head.parameters()])


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_loss(kind, amp):
    head, x = fixture(kind)
    head, x = head.float(), x.float()
    expected = AngularLoss(head)(head(x), TARGETS)
    with torch.autocast("cpu", amp):
        torch.testing.assert_close(AngularLoss(head)(head(x), TARGETS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_and_compiled_losses_are_those_of_the_loss(kind):
    head, x = fixture(kind)
    loss = AngularLoss(head)
    parameters = dict(head.named_parameters())

    def one(parameters, x, y):
        return loss(torch.func.functional_call(head, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, TARGETS)
    expected = torch.autograd.grad(loss(head(x), TARGETS), list(parameters.values()))
    for got, gradient in zip(each.values(), expected, strict=True):
        torch.testing.assert_close(got.mean(0), gradient, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("gradient", ["true", "detached"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_tells_classes_apart(kind, gradient):
    torch.manual_seed(0)
    centres = torch.randn(5, 12)
    x, y = centres.repeat(20, 1) + 0.7 * torch.randn(100, 12), torch.arange(5).repeat(20)
    head = AngularHead(12, 5, kind=kind, margin_gradient=gradient)
    body = nn.Linear(12, 12)
    model = nn.Sequential(body, head)
    loss, optimizer = AngularLoss(model), torch.optim.Adam(model.parameters(), 0.01)
    first = loss(model(x), y).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    assert loss(model(x), y).item() < 0.4 * first
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.97


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"kind": "arcface", "margin": -0.1},
            "margin: got -0.1, expected a number of at least 0 and at most 1.5; ",
        ),
        ({"kind": "arcface", "margin": 4.0}, "margin: got 4.0, expected .* at most 1.5; the default is 0.5"),
        ({"kind": "cosface", "margin": 2}, "margin: got 2, expected .* at most 1; the default is 0.35"),
        ({"kind": "sphereface2", "margin": math.nan}, "margin: got nan, expected .* at most 1; the default is 0.4"),
        ({"kind": "cosface", "scale": 0}, "scale: got 0, expected a positive number; the default is 64"),
        (
            {"kind": "sphereface2", "similarity_power": 0.5},
            "similarity_power: got 0.5, .* 1; the default is 3",
        ),
        (
            {"kind": "sphereface2", "positive_weight": 1},
            "positive_weight: got 1, .* above 0 and below 1; the",
        ),
        ({"kind": "arcface", "margin_gradient": "none"}, "margin_gradient: got 'none', expected one of true, detached"),
        ({"kind": "arc-face"}, "head: got 'arc-face', expected one of .* Did you mean 'arcface'"),
    ],
)
def test_wrong_argument_is_refused_by_constructor_and_from_linear(given, text):
    with pytest.raises(UsageError, match=text):
        AngularHead(6, 4, **given)
    with pytest.raises(UsageError, match=text):
        AngularHead.from_linear(nn.Linear(6, 4), **given)


def test_heads_print_what_they_are():
    head = AngularHead(6, 4, kind="arcface", margin_gradient="detached")
    assert "kind=arcface, margin=0.5, margin_gradient=detached, scale=64, bias=False" in repr(head)
    assert "kind=s-softmax, scale=30" in repr(AngularHead(6, 4, kind="s-softmax"))
    assert math.isclose(AngularHead(6, 4, kind="ga-softmax").margin, 4)


def test_oracle_is_the_papers_equation_in_one_number():
    head = build("sphereface2", "cosine", scale=2.0, margin=0.1, sizes=(2, 2))
    x = at_angles(head.weight, [0], [1.0])
    (row,), ((theta, other),) = plain(head, x), angles(head, x)
    b = head.common_bias.item()
    spread = [2 * ((math.cos(t) + 1) / 2) ** 3 - 1 for t in (theta, other)]
    expected = 0.7 / 2 * math.log(1 + math.exp(-2 * (spread[0] - 0.1) - b)) + 0.3 / 2 * math.log(
        1 + math.exp(2 * (spread[1] + 0.1) + b)
    )
    assert binary(head, row, 0, 0.1) == pytest.approx(expected, abs=1e-12)
