"""Sampled classes: what is drawn, what it stands for in expectation, and what is never computed."""

import math

import pytest
import torch

from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, as_metric_loss
from sphereify.nn.class_blocks import chunks, sample
from tests.grids import grid
from tests.nn.loss_oracle import build
from tests.nn.oracle import normal

DRAWS = 400


def test_a_sample_holds_the_classes_of_the_targets_and_a_share_of_the_others():
    targets = torch.tensor([7, 3, 7, 90])
    for share, size in [(0.1, 10), (0.025, 5), (0.004, 5), (0.999, 100)]:
        torch.manual_seed(0)
        block = sample(100, share, targets)
        assert len(block.classes) == len(set(block.classes.tolist())) == size, "distinct, and one that is no target's"
        weight = dict(zip(block.classes.tolist(), block.weight.tolist(), strict=True))
        assert {weight.pop(y) for y in (7, 3, 90)} == {1.0}
        assert list(weight.values()) == [pytest.approx(97 / (size - 3))] * (size - 3)


def test_every_other_class_is_drawn_as_often():
    torch.manual_seed(0)
    targets, counts = torch.tensor([0, 5]), torch.zeros(12)
    for _ in range(10 * DRAWS):
        block = sample(12, 0.5, targets)
        counts[block.classes] += block.weight
    assert counts[targets].tolist() == [10 * DRAWS, 10 * DRAWS]
    torch.testing.assert_close(counts / (10 * DRAWS), torch.ones(12), rtol=0, atol=0.05)


def test_of_few_classes_all_are_taken():
    block = sample(3, 0.1, torch.tensor([0, 1, 1, 2]))
    assert sorted(block.classes.tolist()) == [0, 1, 2]
    assert block.weight.tolist() == [1, 1, 1]
    assert [block.classes for block in chunks(5, 2)] == [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.mark.parametrize("gradient", ["true", pytest.param("detached", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("smoothing", [pytest.param(0, marks=pytest.mark.exhaustive), 0.2])
def test_loss_and_gradient_of_sphereface2_are_those_of_all_classes_in_expectation(smoothing, gradient):
    head = build("sphereface2", "cosine", scale=4, sizes=(6, 20), bias=True, margin_gradient=gradient)
    x, y = normal(4, 6).requires_grad_(), torch.tensor([3, 0, 3, 19])
    weight = torch.linspace(0.5, 2, 20)
    options = {"label_smoothing": smoothing, "class_weight": weight}
    whole = as_metric_loss(head, **options)(x, y)
    sampled = as_metric_loss(head, sampled_classes=0.5, **options)
    torch.manual_seed(0)
    losses = torch.stack([sampled(x, y) for _ in range(DRAWS)])
    error = losses.std().item() / math.sqrt(len(losses))
    assert losses.std() > 0
    assert losses.mean().item() == pytest.approx(whole.item(), abs=4 * error)
    got, expected = (torch.autograd.grad(value, [x, head.weight]) for value in (losses.mean(), whole))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    "kind", grid(["ga-softmax", "arcface", "cosface", "w-softmax"], lambda kind: kind == "arcface")
)
def test_the_sum_of_a_softmax_is_that_of_all_classes_in_expectation(kind):
    scale = {} if kind in ("ga-softmax", "w-softmax") else {"scale": 3}
    head = build(kind, "linear", sizes=(6, 20), **scale)
    x, y = normal(4, 6), torch.tensor([3, 0, 3, 19])
    plain = torch.stack([head.logits(x)[i, c] for i, c in enumerate(y.tolist())])
    target = head.target_logit(x, y) if kind != "w-softmax" else plain
    whole = as_metric_loss(head, reduction="none")(x, y)
    sampled = as_metric_loss(head, reduction="none", sampled_classes=0.5)
    torch.manual_seed(0)
    sums = torch.stack([(sampled(x, y) + target).exp() for _ in range(DRAWS)]).detach()
    expected, error = (whole + target).exp().detach(), sums.std(0) / math.sqrt(DRAWS)
    assert (sums.std(0) > 0).all()
    assert ((sums.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("kind", ["a-softmax", "arcface", "cosface", "sphereface2"])
def test_in_eval_mode_and_where_all_classes_are_targets_nothing_is_drawn(kind):
    head, x = build(kind, "cosine", sizes=(6, 4)), normal(5, 6)
    y = torch.tensor([0, 1, 2, 3, 0])
    expected = as_metric_loss(head, label_smoothing=0.1)(x, y)
    head.training_logits = False
    sampled = AngularLoss(head, 0.1, sampled_classes=0.01)
    torch.testing.assert_close(sampled(head(x), y), expected, rtol=0, atol=1e-12)
    many, few = build(kind, "cosine", sizes=(6, 60)), torch.zeros(5, dtype=torch.int64)
    many.training_logits = False
    sampled = AngularLoss(many, 0.1, sampled_classes=0.1)
    expected = as_metric_loss(many, label_smoothing=0.1)(x, few)
    torch.manual_seed(0)
    assert not torch.allclose(sampled(many(x), few), expected)
    torch.testing.assert_close(sampled.eval()(many(x), few), expected, rtol=0, atol=1e-12)


def test_mixup_and_ignored_samples_go_with_a_sample():
    head, x = build("cosface", "cosine", sizes=(6, 50)), normal(4, 6)
    y = torch.tensor([3, -100, 0, 9])
    loss = as_metric_loss(head, sampled_classes=0.2, reduction="none")
    assert loss(x, y)[1] == 0
    mixed = loss(x, (torch.tensor([3, 1, 0, 9]), torch.tensor([1, 3, 4, 0]), 0.4))
    assert mixed.isfinite().all()
    assert as_metric_loss(head, sampled_classes=0.2)(x, y).isfinite()


def test_scores_of_other_classes_are_not_computed_and_have_no_gradient():
    head = AngularHead(6, 1000, kind="arcface")
    head.training_logits = False
    loss, x, y = AngularLoss(head, sampled_classes=0.05), torch.randn(8, 6), torch.arange(8)
    output = head(x)
    assert output.logits is None
    loss(output, y).backward()
    touched = (head.weight.grad != 0).any(1)
    assert touched.sum() == 50
    assert touched[:8].all()


@pytest.mark.parametrize("kind", ["arcface", "sphereface2"])
def test_training_on_samples_learns_all_classes(kind):
    torch.manual_seed(0)
    centres = torch.randn(40, 16)
    x, y = centres.repeat(4, 1) + 0.3 * torch.randn(160, 16), torch.arange(40).repeat(4)
    head = AngularHead(16, 40, kind=kind, scale=16)
    head.training_logits = False
    loss, optimizer = AngularLoss(head, sampled_classes=0.5), torch.optim.Adam(head.parameters(), 0.03)
    for _ in range(60):
        part = torch.randint(160, (12,))
        optimizer.zero_grad()
        loss(head(x[part]), y[part]).backward()
        optimizer.step()
    assert (head.eval()(x).argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, math.nan, "0.5"])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match=r"sampled_classes: got .*, expected a number above 0 and below 1"):
        AngularLoss(AngularHead(6, 4, kind="cosface"), sampled_classes=share)


def test_what_samples_do_not_go_with_is_told():
    head, x = AngularHead(6, 4, kind="sphereface2"), torch.randn(3, 6)
    with pytest.raises(UsageError, match="sampled_classes: does not go with chunk_size; take one of them"):
        AngularLoss(head, sampled_classes=0.5, chunk_size=2)
    with pytest.raises(UsageError, match=r"Linear has no AngularHead.*and sampled_classes too"):
        AngularLoss(torch.nn.Linear(6, 4), sampled_classes=0.5)
    with pytest.raises(UsageError, match="got probabilities, but sampled_classes draws the classes that are no target"):
        AngularLoss(head, sampled_classes=0.5)(head(x), torch.full((3, 4), 0.25))
    plain = AngularHead(6, 4)
    with pytest.raises(UsageError, match="sampled_classes needs the features: take a margin head, or as_metric_loss"):
        AngularLoss(plain, sampled_classes=0.5)(plain(x), torch.tensor([0, 1, 2]))
