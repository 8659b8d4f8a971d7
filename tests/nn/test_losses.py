import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, AngularOutput, MarginAnnealing, as_metric_loss
from tests.grids import grid
from tests.nn.loss_oracle import HEADS, MARGINS, angular_loss, at_angles, build, scores, separation
from tests.nn.oracle import normal

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25])
TARGETS = torch.tensor([0, 3, 2, 2, 1])
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"class_weight": WEIGHT},
    {"ignore_index": 2},
    {"reduction": "none", "class_weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 3},
    {"reduction": "sum", "class_weight": WEIGHT, "label_smoothing": 1.0},
    {"reduction": "mean", "class_weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 2},
]
CASES = [(kind, name, m) for kind, name in HEADS for m in ([1, 1.5, 2, 2.7, 3, 4] if (kind, name) in MARGINS else [1])]
EXACT = {"rtol": 0, "atol": 1e-10}


def fixture(kind, operator, **given):
    """A head, and features whose angles to their targets lie in every turn of ψ."""
    head = build(kind, operator, scale=7, **given)
    return head, at_angles(head.weight, TARGETS.tolist(), [0.1, 0.9, 1.6, 2.4, 3.0])


# ----------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize(
    ("kind", "operator", "margin", "bias"),
    grid(
        [(*case, bias) for case in CASES for bias in (False, True)], lambda *case: case[2:] in [(1, False), (2.7, True)]
    ),
)
def test_loss_is_that_of_the_oracle(kind, operator, margin, bias):
    head, x = fixture(kind, operator, margin=margin, bias=bias)
    for options in OPTIONS:
        loss = AngularLoss(head, **options)
        expected = angular_loss(head, x, TARGETS, **options)
        torch.testing.assert_close(loss(head(x), TARGETS).detach(), expected, **EXACT, msg=str(options))
        plain = AngularLoss(head.eval(), **options)(head(x), TARGETS)
        torch.testing.assert_close(plain, F.cross_entropy(head(x), TARGETS, **to_torch(options)), **EXACT)
        head.train()


def to_torch(options):
    weight = options.get("class_weight")
    return {k: v for k, v in options.items() if k != "class_weight"} | (
        {} if weight is None else {"weight": weight.double()}
    )


@pytest.mark.parametrize("start", grid([0, 0.37, 5.0, 1000.0], lambda start: start == 5))
@pytest.mark.parametrize(("kind", "operator"), MARGINS)
def test_annealed_loss_is_that_of_the_oracle(kind, operator, start):
    head, x = fixture(kind, operator, margin=3, bias=True)
    for options in OPTIONS:
        loss = AngularLoss(head, annealing=MarginAnnealing(start, floor=0), **options)
        expected = angular_loss(head, x, TARGETS, annealing=start, **options)
        # λ is a number in fp32.
        torch.testing.assert_close(
            loss(head(x), TARGETS).detach(), expected, rtol=0, atol=1e-10 if start != 0.37 else 1e-7
        )


@pytest.mark.parametrize(
    ("kind", "operator", "s"),
    grid([(*head, s) for head in HEADS for s in (0, 1, 2, 0.5)], lambda kind, _, s: kind == "ga-softmax" or s == 1),
)
def test_separation_is_the_mean_energy_between_a_samples_class_and_the_others(kind, operator, s):
    head, x = fixture(kind, operator, margin=2)
    head.weight.data *= torch.tensor([[1.0], [100.0], [0.5], [3.0]])  # lengths do not matter
    energy, plain = separation(head.weight, s), AngularLoss(head)(head(x), TARGETS)
    got = AngularLoss(head, separation=0.3, separation_s=s)(head(x), TARGETS)
    mean = sum(energy[y] for y in TARGETS.tolist()) / len(TARGETS)
    torch.testing.assert_close((got - plain).item(), 0.3 * mean, **EXACT)
    for options in OPTIONS:
        loss = AngularLoss(head, separation=0.3, separation_s=s, **options)
        expected = angular_loss(head, x, TARGETS, apart=0.3, s=s, **options)
        torch.testing.assert_close(loss(head(x), TARGETS).detach(), expected, **EXACT, msg=str(options))


def test_separation_of_probabilities_is_that_of_the_classes_in_their_shares():
    head, x = fixture("w-softmax", "cosine")
    ones, others = (F.one_hot(classes, head.num_classes).to(x.dtype) for classes in (TARGETS, TARGETS.roll(1)))

    def apart(targets):
        return AngularLoss(head, separation=0.3)(head(x), targets) - AngularLoss(head)(head(x), targets)

    torch.testing.assert_close(apart(ones), apart(TARGETS), **EXACT)
    mixed = 0.7 * apart(TARGETS) + 0.3 * apart(TARGETS.roll(1))
    assert mixed > 0.01
    torch.testing.assert_close(apart(0.7 * ones + 0.3 * others), mixed, **EXACT)


@pytest.mark.parametrize("share", grid([0.25, 0, 1, "of each sample"], lambda share: isinstance(share, str)))
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_mixup_is_the_mixture_of_two_losses(kind, operator, share):
    head, x = fixture(kind, operator, margin=2)
    other = TARGETS.roll(2)
    given = torch.tensor([0.1, 0.5, 1.0, 0.0, 0.7], dtype=torch.float64) if isinstance(share, str) else share
    for options in [{}, {"label_smoothing": 0.1, "separation": 0.2}, {"class_weight": WEIGHT, "ignore_index": 2}]:
        plain = {k: v for k, v in options.items() if k != "separation"} | {"apart": options.get("separation", 0)}
        a, b = (angular_loss(head, x, y, reduction="none", **plain) for y in (TARGETS, other))
        expected = given * a + (1 - given) * b
        for reduction in ["none", "sum", "mean"] if "class_weight" not in options else ["none", "sum"]:
            got = AngularLoss(head, reduction=reduction, **options)(head(x), (TARGETS, other, given)).detach()
            reduced = expected if reduction == "none" else getattr(expected, reduction)()
            torch.testing.assert_close(got, reduced, **EXACT, msg=f"{options} {reduction}")


def test_share_that_is_a_number_has_the_digits_of_the_loss():
    head, x = fixture("ga-softmax", "linear", margin=2)
    exact = torch.tensor(0.3, dtype=torch.float64)
    got, expected = (AngularLoss(head)(head(x), (TARGETS, TARGETS.flip(0), share)) for share in (0.3, exact))
    torch.testing.assert_close(got, expected, **EXACT)


def test_mixup_of_a_weighted_mean_is_the_mixture_of_the_two_means():
    head, x = fixture("ga-softmax", "linear", margin=2)
    for options in ({"class_weight": WEIGHT}, {"ignore_index": 2}):
        loss, other = AngularLoss(head, **options), torch.tensor([1, 1, 0, 3, 3])
        expected = 0.25 * loss(head(x), TARGETS) + 0.75 * loss(head(x), other)
        torch.testing.assert_close(loss(head(x), (TARGETS, other, 0.25)), expected, **EXACT, msg=str(options))


@pytest.mark.parametrize("kind", ["w-softmax", "s-softmax"])
@pytest.mark.parametrize("operator", ["linear", "learnable-sigmoid"])
def test_soft_targets_of_a_plain_head_are_the_mean_over_classes_by_probability(kind, operator):
    head, x = fixture(kind, operator, bias=True)
    soft = normal(5, 4, seed=9).softmax(1)
    for smoothing, weight in [(0.0, None), (0.2, None), (0.2, WEIGHT)]:
        weights = [1.0] * 4 if weight is None else weight.tolist()
        losses = []
        for row, shares in zip(scores(head, x), soft.tolist(), strict=True):
            total = math.log(sum(math.exp(z) for z in row))
            shares = [(1 - smoothing) * p + smoothing / 4 for p in shares]
            losses.append(sum(p * w * (total - z) for p, w, z in zip(shares, weights, row, strict=True)))
        given = {"label_smoothing": smoothing, "class_weight": None if weight is None else weight.double()}
        for loss in (AngularLoss(head, **given), AngularLoss(nn.Linear(1, 1), **given)):
            torch.testing.assert_close(loss(head(x), soft).item(), sum(losses) / 5, **EXACT)


@pytest.mark.parametrize("model", [nn.Linear(6, 4), AngularHead(6, 4)], ids=["no head", "w-softmax"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_of_plain_logits_has_value_and_gradient_of_torch(options, model):
    logits = (3 * normal(5, 4)).requires_grad_()
    loss, expected = (
        AngularLoss(model, **options)(logits, TARGETS),
        F.cross_entropy(logits, TARGETS, **to_torch(options)),
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    got, true = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    torch.testing.assert_close(got, true, rtol=0, atol=1e-12)


def test_logits_far_apart_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3e4]], requires_grad=True)
    for y in (torch.tensor([0, 1]), torch.tensor([1, 2])):
        loss, expected = AngularLoss(nn.Linear(1, 1))(logits, y), F.cross_entropy(logits, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


# ----------------------------------------------------------------------------------------------- in chunks of classes


@pytest.mark.parametrize(
    ("kind", "operator", "chunk_size"),
    grid(
        [(*head, size) for head in HEADS for size in range(1, 7)],
        lambda kind, operator, size: size == 2 or (kind, operator) == ("ga-softmax", "learnable-sigmoid"),
    ),
)
def test_chunks_of_any_size_change_neither_loss_nor_gradients(kind, operator, chunk_size):
    head = build(kind, operator, bias=True, sizes=(6, 5))
    x, y = normal(7, 6).requires_grad_(), torch.tensor([0, 3, 2, 2, 1, 4, 4])
    weight = torch.tensor([1.0, 0.5, 2.0, 0.25, 3.0])
    margin = {"annealing": MarginAnnealing(3)} if head.has_margin else {}
    for targets in (y, (y, y.flip(0), torch.linspace(0, 1, 7).double())):
        for options in ({}, {"label_smoothing": 0.2, "class_weight": weight, "ignore_index": 2, **margin}):
            results = []
            for size in (None, chunk_size):
                loss = as_metric_loss(head, chunk_size=size, **options).eval()(x, targets)
                results.append((loss, *torch.autograd.grad(loss, [x, *head.parameters()])))
            torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ga-softmax", "a-softmax"])
def test_head_without_training_logits_needs_chunks_and_has_the_same_loss(kind):
    head, x = fixture(kind, "cosine")
    expected = AngularLoss(head)(head(x), TARGETS)
    head.training_logits = False
    assert head(x).logits is None
    torch.testing.assert_close(AngularLoss(head, chunk_size=3)(head(x), TARGETS), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(as_metric_loss(head)(x, TARGETS), expected, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="AngularLoss: the head has training_logits off, so chunk_size is needed"):
        AngularLoss(head)(head(x), TARGETS)
    assert head.eval()(x).shape == (5, 4)


@pytest.mark.parametrize("kind", ["w-softmax", "ga-softmax"])
def test_metric_loss_holds_the_class_weights_and_gives_logits_without_a_margin(kind):
    head, x = fixture(kind, "cosine")
    loss = as_metric_loss(head, label_smoothing=0.1)
    assert {id(p) for p in loss.parameters()} == {id(head.weight)}
    torch.testing.assert_close(loss.get_logits(x), head.logits(x), rtol=0, atol=0)
    torch.testing.assert_close(loss(x, TARGETS), AngularLoss(head, 0.1)(head(x), TARGETS), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- the edges

EDGES = [{}, {"chunk_size": 2}, {"label_smoothing": 0.1}, {"separation": 1.0}, {"class_weight": WEIGHT}]


@pytest.mark.parametrize("options", [*EDGES, {"reduction": "sum"}, {"annealing": True}], ids=str)
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_batch_of_ignored_samples_has_loss_and_gradient_0(kind, operator, options):
    head, x = build(kind, operator, bias=True), normal(3, 6).requires_grad_()
    if "annealing" in options:
        options = {"annealing": MarginAnnealing() if head.has_margin else None}
    loss = as_metric_loss(head, **options)(x, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(t.grad.abs().sum() == 0 for t in [x, *head.parameters()])


@pytest.mark.parametrize("options", [*EDGES, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("kind", ["w-softmax", "ga-softmax", "s-softmax"])
def test_empty_batch_is_0(kind, options):
    head, x = build(kind, "linear", bias=True), torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    loss = as_metric_loss(head, **options)(x, torch.zeros(0, dtype=torch.int64))
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert loss.shape == ((0,) if options.get("reduction") == "none" else ())
    assert x.grad.shape == (0, 6)
    assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("options", EDGES, ids=str)
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_batch_of_one_class_is_finite(kind, operator, options):
    head, x = build(kind, operator), normal(3, 6).requires_grad_()
    loss = as_metric_loss(head, **options)(x, torch.tensor([2, 2, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(t.grad.isfinite().all() for t in [x, head.weight])


@pytest.mark.parametrize("options", [*EDGES[:4], {"chunk_size": 1, "label_smoothing": 0.5}], ids=str)
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_head_of_one_class_has_loss_0_and_a_finite_gradient(kind, operator, options):
    head, x = build(kind, operator, bias=True, sizes=(6, 1)), normal(3, 6).requires_grad_()
    loss = as_metric_loss(head, **options)(x, torch.tensor([0, 0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all(t.grad.isfinite().all() for t in [x, *head.parameters()])


def test_duplicate_and_opposite_class_weights_are_finite_under_separation():
    for s in (0, 1, 2):
        head = build("ga-softmax", "cosine", dtype=torch.float32)
        head.weight.data[1], head.weight.data[2], head.weight.data[3] = head.weight[0], -head.weight[0], 0
        x = normal(5, 6, dtype=torch.float32)
        loss = AngularLoss(head, separation=1, separation_s=s)(head(x), TARGETS)
        loss.backward()
        assert loss.isfinite()
        assert head.weight.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------- bad input


class Two(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b = AngularHead(6, 4, kind=kind), AngularHead(6, 4, kind=kind)


def head_of(kind):
    return AngularHead(6, 4, kind=kind)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: AngularLoss(head_of("ga-softmax"), 1.5),
            "label_smoothing: got 1.5, expected a number of at least 0 and",
        ),
        (lambda: AngularLoss(head_of("ga-softmax"), -0.1), "label_smoothing: got -0.1"),
        (lambda: AngularLoss(head_of("ga-softmax"), math.nan), "label_smoothing: got nan"),
        (
            lambda: AngularLoss(head_of("s-softmax"), reduction="avg"),
            "reduction: got 'avg', expected one of mean, sum, none",
        ),
        (lambda: AngularLoss(head_of("s-softmax"), separation=-1), "separation: got -1, expected a number ≥ 0"),
        (lambda: AngularLoss(head_of("s-softmax"), separation_s=-2), "separation_s: got -2, expected a number ≥ 0"),
        (lambda: AngularLoss(head_of("s-softmax"), separation=math.inf), "separation: got inf"),
        (
            lambda: AngularLoss(head_of("s-softmax"), chunk_size=0),
            "chunk_size: got 0, expected at least 1 class, or None",
        ),
        (
            lambda: AngularLoss(nn.Linear(6, 4), separation=1),
            "Linear has no AngularHead, which annealing, separation and",
        ),
        (lambda: AngularLoss(nn.Linear(6, 4), chunk_size=2), r"Linear has no AngularHead.*head='w-softmax'"),
        (lambda: AngularLoss(nn.Linear(6, 4), annealing=MarginAnnealing()), "Linear has no AngularHead"),
        (
            lambda: AngularLoss(head_of("w-softmax"), annealing=MarginAnnealing()),
            "annealing: the head is a w-softmax, which has no margin",
        ),
        (
            lambda: AngularLoss(head_of("w-softmax"), class_weight=torch.ones(3)),
            r"class_weight: got shape \(3,\), expected \(4,\)",
        ),
        (lambda: AngularLoss(Two("a-softmax")), "Two has 2 angular heads; make one AngularLoss for each head"),
        (lambda: MarginAnnealing(start=-1), "annealing: start: got -1, expected a number ≥ 0"),
        (lambda: MarginAnnealing(floor=-5.0), "annealing: floor: got -5.0, expected a number ≥ 0"),
        (lambda: MarginAnnealing(rate=math.nan), "annealing: rate: got nan"),
        (lambda: MarginAnnealing(power=0), "annealing: got power=0, every=1, expected power > 0 and every ≥ 1"),
        (lambda: MarginAnnealing(every=0), "annealing: got power=1.0, every=0"),
    ],
)
def test_wrong_option_is_refused_with_what_arrived_and_what_was_expected(make, text):
    with pytest.raises(UsageError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AngularLoss(torch.ones(2)), "AngularLoss: got Tensor, expected a model or an AngularHead"),
        (lambda: AngularLoss(head_of("a-softmax"), annealing=5.0), "annealing: got float, expected a MarginAnnealing"),
        (lambda: as_metric_loss(nn.Linear(6, 4)), "as_metric_loss: got Linear, expected an AngularHead"),
        (
            lambda: AngularLoss(head_of("a-softmax"))((torch.zeros(2, 4), torch.zeros(2, 6)), torch.tensor([0, 1])),
            "AngularLoss: got tuple, expected an AngularOutput or logits",
        ),
    ],
)
def test_an_argument_of_the_wrong_type_is_a_type_error(make, text):
    with pytest.raises(TypeError, match=text):
        make()


INDICES = "expected class indices"


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (torch.tensor([0, 1, 4]), "targets: got class 4, expected 0 to 3"),
        (torch.tensor([0, -1, 2]), "targets: got class -1, expected 0 to 3"),
        (torch.tensor([0, 1]), r"targets: got shape \(2,\), expected \(3,\), one class a sample"),
        (torch.tensor([[0], [1], [2]]), r"targets: got shape \(3, 1\), expected \(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), rf"targets: got torch.float32 of shape \(3,\), {INDICES}"),
        (torch.tensor([True, False, True]), f"targets: got torch.bool, {INDICES}"),
        ((torch.tensor([0, 1, 2]),) * 2, r"targets: got a tuple of 2, expected \(y_a, y_b, share\)"),
        ((*[torch.tensor([0, 1, 2])] * 2, 1.5), r"the share of \(y_a, y_b, share\) must lie in \[0, 1\]"),
        ((*[torch.tensor([0, 1, 2])] * 2, math.nan), r"the share of \(y_a, y_b, share\) must lie in \[0, 1\]"),
        ((*[torch.tensor([0, 1, 2])] * 2, torch.full((3, 1), 0.5)), r"share.*\(3, 1\)"),
        ((torch.tensor([0, 1, 2]), torch.tensor([0, 1, 5]), 0.5), "targets: got class 5"),
        ((torch.tensor([0.0, 1, 2]), torch.tensor([0, 1, 2]), 0.5), f"targets: got torch.float32, {INDICES}"),
    ],
)
@pytest.mark.parametrize(("kind", "chunk_size"), [("ga-softmax", None), ("ga-softmax", 3), ("w-softmax", None)])
def test_wrong_targets_are_refused(kind, chunk_size, targets, text):
    head = build(kind, "linear")
    with pytest.raises(UsageError, match=text):
        AngularLoss(head, chunk_size=chunk_size)(head(normal(3, 6)), targets)


def test_probabilities_are_refused_for_a_margin_and_for_other_sizes():
    margin, plain, x = build("ga-softmax", "linear"), build("w-softmax", "linear"), normal(3, 6)
    with pytest.raises(UsageError, match=r"got probabilities, but a margin belongs to one target class.*mixup"):
        AngularLoss(margin)(margin(x), torch.full((3, 4), 0.25))
    with pytest.raises(UsageError, match=r"targets: got probabilities \(3, 5\), expected \(3, 4\)"):
        AngularLoss(plain)(plain(x), torch.full((3, 5), 0.2))


def test_wrong_output_is_refused():
    margin, plain, y = AngularLoss(head_of("ga-softmax")), AngularLoss(nn.Linear(6, 4)), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="got an AngularOutput, but was made from a model without an AngularHead"):
        plain(margin.head(torch.randn(2, 6)), y)
    with pytest.raises(UsageError, match=r"AngularLoss: got logits of shape \(2, 3, 4\), expected \(batch, classes\)"):
        plain(torch.zeros(2, 3, 4), y)
    with pytest.raises(UsageError, match="chunk_size needs the features"):
        AngularLoss(head_of("w-softmax"), chunk_size=2)(torch.zeros(2, 4), y)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_features_of_a_sequence_are_refused_as_logits_are(chunk_size):
    head = head_of("ga-softmax")
    with pytest.raises(UsageError, match=r"\(2, 2, [46]\)"):
        AngularLoss(head, chunk_size=chunk_size)(head(torch.randn(2, 2, 6)), torch.tensor([0, 1]))


def test_class_weight_of_wrong_length_is_refused_for_plain_logits():
    for length in (3, 7):
        with pytest.raises(UsageError, match=rf"class_weight: got shape \({length},\), expected \(4,\)"):
            AngularLoss(nn.Linear(6, 4), class_weight=torch.ones(length))(torch.zeros(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(2, 5), (6,), (2, 3, 6)])
def test_embeddings_of_wrong_shape_are_refused(shape):
    loss = as_metric_loss(head_of("a-softmax"))
    for call in (lambda x: loss(x, torch.tensor([0, 1])), loss.get_logits):
        with pytest.raises(UsageError, match=r"embeddings: got shape \(.*\), expected \(batch, 6\)"):
            call(torch.zeros(shape))


def test_margin_output_tells_what_to_do_where_a_tensor_was_expected():
    output, y = head_of("a-softmax")(torch.randn(2, 6)), torch.tensor([0, 1])
    for name, call in {
        "cross_entropy": lambda: F.cross_entropy(output, y),
        "softmax": lambda: torch.softmax(output, 1),
        "log_softmax": lambda: F.log_softmax(output, 1),
        "mul": lambda: torch.ones(()) * output,
    }.items():
        with pytest.raises(
            UsageError, match=rf"{name}: got an AngularOutput.*loss = AngularLoss\(model\).*output\.logits"
        ):
            call()
    for name in ("argmax", "shape", "softmax", "float", "backward"):
        with pytest.raises(
            AttributeError, match=rf"no tensor and has no '{name}'.*output\.logits.*AngularLoss\(model\)"
        ):
            getattr(output, name)
    with pytest.raises(AttributeError, match="'AngularOutput' object has no attribute 'scores'"):
        output.scores  # noqa: B018
    assert not hasattr(output, "__array__")
    assert isinstance(output, AngularOutput)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_may_be_any_integers(dtype):
    head = AngularHead(6, 5, kind="a-softmax")
    features, classes = torch.randn(4, 6), torch.tensor([0, 1, 4, 2])
    loss = AngularLoss(head)
    torch.testing.assert_close(loss(head(features), classes.to(dtype)), loss(head(features), classes), rtol=0, atol=0)


@pytest.mark.parametrize("targets", [[0, 1], "ab", None])
def test_targets_that_are_no_tensor_are_a_type_error(targets):
    with pytest.raises(TypeError, match=r"targets: got .*, expected a tensor, or \(y_a, y_b, share\) for mixup"):
        AngularLoss(nn.Linear(2, 2))(torch.zeros(2, 2), targets)


def test_mixup_may_come_as_a_list():
    logits, (a, b) = torch.randn(4, 3), torch.randint(3, (2, 4))
    loss = AngularLoss(nn.Linear(3, 3))
    torch.testing.assert_close(loss(logits, [a, b, 0.3]), loss(logits, (a, b, 0.3)), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_of_an_empty_batch_cost_nothing(reduction):
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = AngularLoss(nn.Linear(3, 3), reduction=reduction)(logits, torch.zeros(0, 3))
    assert loss.sum() == 0
    loss.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["w-softmax", "a-softmax"])
def test_a_class_out_of_range_makes_a_compiled_loss_no_number(kind):
    head = AngularHead(6, 5, kind=kind)
    loss = torch.compile(AngularLoss(head), backend="eager")
    features = torch.randn(3, 6)
    assert loss(head(features), torch.tensor([0, 1, 4])).isfinite()
    assert loss(head(features), torch.tensor([0, 1, 7])).isnan()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chunk_size": 2.5}, "chunk_size: got 2.5, expected at least 1 class"),
        ({"ignore_index": None}, "ignore_index: got None, expected a class index"),
    ],
)
def test_options_of_another_type_are_told(options, text):
    with pytest.raises(UsageError, match=text):
        AngularLoss(AngularHead(6, 5, kind="a-softmax"), **options)
