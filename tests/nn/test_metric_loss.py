"""An angular head as a loss of metric learning: what a miner found, and weights of samples."""

import inspect
import typing

import pytest
import pytorch_metric_learning.losses as metric_learning
import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner

from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, as_metric_loss
from sphereify.nn.metric_loss import LossKeywords

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # pytorch-metric-learning's


def batch():
    torch.manual_seed(0)
    head = AngularHead(8, 5, kind="s-softmax", scale=4, dtype=torch.float64)
    return head, torch.randn(32, 8, dtype=torch.float64, requires_grad=True), torch.arange(32) % 5


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(), TripletMarginMiner(type_of_triplets="hard")])
def test_mined_pairs_and_triplets_weigh_as_in_pytorch_metric_learning(miner):
    head, x, y = batch()
    theirs = metric_learning.NormalizedSoftmaxLoss(5, 8, temperature=1 / 4)
    theirs.W.data = head.weight.detach().t().clone()
    mined = miner(x.detach().float(), y)
    ours = as_metric_loss(head)
    torch.testing.assert_close(ours(x, y, mined), theirs(x, y, mined), rtol=1e-9, atol=1e-9)
    assert ours(x, y, mined) != ours(x, y)


@pytest.mark.parametrize("kind", ["w-softmax", "a-softmax"])
def test_mined_pairs_count_with_and_without_a_margin(kind):
    head, x, y = AngularHead(8, 5, kind=kind, dtype=torch.float64), *batch()[1:]
    pair = (torch.tensor([3]), torch.tensor([7]))
    each = as_metric_loss(head, reduction="none")(x, y)
    torch.testing.assert_close(as_metric_loss(head)(x, y, pair), (each[3] + each[7]) / 32)


def test_where_no_pair_was_mined_all_samples_count():
    head, x, y = batch()
    nothing = (torch.tensor([], dtype=torch.int64),) * 4
    torch.testing.assert_close(as_metric_loss(head)(x, y, nothing), as_metric_loss(head)(x, y))


@pytest.mark.parametrize("targets", ["hard", "mixed", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_samples_multiply_their_losses(targets, reduction):
    head, x, y = batch()
    logits, weight = head.logits(x).detach(), torch.linspace(0, 2, 32)
    y = {"hard": y, "mixed": (y, y.flip(0), 0.3), "soft": torch.full((32, 5), 0.2, dtype=torch.float64)}[targets]
    each = AngularLoss(head, reduction="none")(logits, y)
    expected = {"mean": (each * weight).mean(), "sum": (each * weight).sum(), "none": each * weight}[reduction]
    torch.testing.assert_close(AngularLoss(head, reduction=reduction)(logits, y, weight), expected)


def test_weights_of_samples_leave_the_divisor_of_class_weights():
    head, x, y = batch()
    logits, weight, classes = head.logits(x).detach(), torch.linspace(0, 2, 32), torch.arange(1.0, 6)
    each = AngularLoss(head, class_weight=classes, reduction="none")(logits, y)
    expected = (each * weight).sum() / classes[y].sum()
    torch.testing.assert_close(AngularLoss(head, class_weight=classes)(logits, y, weight), expected)


def test_weights_of_another_number_of_samples_are_refused():
    head, x, y = batch()
    with pytest.raises(UsageError, match=r"sample_weight: got shape \(3,\), expected \(32,\)"):
        AngularLoss(head)(head.logits(x), y, torch.ones(3))
    with pytest.raises(TypeError, match="sample_weight: got list, expected a tensor"):
        AngularLoss(head)(head.logits(x), y, [1.0] * 32)


def test_mined_samples_outside_the_batch_are_refused():
    head, x, y = batch()
    mined = tuple(torch.tensor([number]) for number in (0, 1, 40))
    with pytest.raises(UsageError, match="indices_tuple: names sample 40 of a batch of 32"):
        as_metric_loss(head)(x, y, mined)


def test_the_keywords_for_type_checkers_are_those_of_the_loss():
    of_model, *parameters = inspect.signature(AngularLoss).parameters.values()
    assert of_model.name == "model_or_head"
    assert list(LossKeywords.__annotations__) == [parameter.name for parameter in parameters]
    assert typing.get_type_hints(LossKeywords) == {p.name: p.annotation for p in parameters}
    assert not LossKeywords.__required_keys__
