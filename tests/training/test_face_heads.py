"""Runs with margins that are sums, binary tasks, sampled classes and mixed images."""

import itertools

import pytest
import timm
import torch
from torch import nn

from sphereify import load, sphereify
from sphereify.choices import MARGIN_HEADS
from sphereify.errors import UsageError
from sphereify.nn import AngularLoss, HypersphericalEnergy
from sphereify.training import Objective, Terms, evaluate, finetune
from sphereify.training.distributed import Processes
from sphereify.training.state import RunState
from sphereify.training.step import TrainingStep
from tests.grids import grid
from tests.training.small import IMAGES, dropout_net, images, net, plain_net, same, state, usual

FACE_HEADS = ("arcface", "cosface", "sphereface2")


@pytest.mark.parametrize(
    ("kind", "gradient"),
    grid(
        [(kind, g) for kind in FACE_HEADS for g in ("true", "detached")],
        lambda kind, g: (kind, g) in (("arcface", "true"), ("sphereface2", "detached")),
    ),
)
def test_a_run_learns_to_tell_patterns_apart(kind, gradient):
    model, data = net(head=kind, margin_gradient=gradient), images(60)
    result = finetune(model, data, usual(epochs=4))
    # What is left is that of the margin: SphereFace2's least loss is far from 0.
    assert result.epochs[-1].loss < (0.9 if kind == "sphereface2" else 0.5) * result.epochs[0].loss
    assert evaluate(model, data).top1 > 0.9
    assert isinstance(model.eval()(torch.zeros(1, 2, 6, 6)), torch.Tensor)


def test_what_was_trained_with_sampled_classes_is_loaded_by_its_name_as_any_other(tmp_path):
    torch.manual_seed(0)
    model = sphereify(timm.create_model("test_resnet", num_classes=3, in_chans=2), head="arcface")
    finetune(model, images(8), usual(epochs=1, terms=Terms(sampled_classes=0.5)), output=tmp_path / "run")
    loaded = load(tmp_path / "run" / "last")
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.exhaustive
def test_only_margins_that_multiply_the_angle_come_in_step_by_step():
    annealed = {kind for kind in MARGIN_HEADS if Objective(net(head=kind), Terms()).loss.annealing is not None}
    assert annealed == {"ga-softmax", "a-softmax"}


@pytest.mark.parametrize(
    ("mixing", "kind"),
    grid(
        itertools.product(({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}), MARGIN_HEADS),
        lambda mixing, kind: len(mixing) == 1 + (kind in ("a-softmax", "cosface")),
    ),
)
def test_mixed_images_have_the_mixture_of_the_losses_of_their_two_classes(kind, mixing):
    model, data = net(head=kind), images(12)
    settings = usual(batch_size=6, **mixing)
    torch.manual_seed(0)
    step = TrainingStep(RunState(model, data, settings, Processes(0, 1, torch.device("cpu")), None), None, [])
    x, y = data.train[:6]
    mixed, (first, second, share) = step._mixed(x.clone(), y)
    assert torch.equal(first, y)
    assert torch.equal(second, y.flip(0))
    assert ((share >= 0) & (share <= 1)).all()
    if "cutmix" not in mixing:  # the patterns are mixed as the shares say
        other = x.flip(0)
        lam = ((mixed - other).flatten(1) * (x - other).flatten(1)).sum(1) / (x - other).flatten(1).square().sum(1)
        distinct = first != second
        torch.testing.assert_close(share[distinct], lam[distinct], rtol=1e-4, atol=1e-4)
    loss = AngularLoss(model, reduction="none")
    a, b = (loss(model(mixed), targets) for targets in (first, second))
    torch.testing.assert_close(loss(model(mixed), (first, second, share)), share * a + (1 - share) * b)


def test_mixed_images_of_a_head_without_a_margin_have_shares_of_classes():
    model, data = net(head="w-softmax"), images(12)
    step = TrainingStep(RunState(model, data, usual(mixup=0.4), Processes(0, 1, torch.device("cpu")), None), None, [])
    _, shares = step._mixed(*data.train[:6])
    assert shares.shape == (6, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))


def test_a_run_with_mixed_images_and_a_margin_learns():
    model, data = net(head="cosface"), images(60)
    finetune(model, data, usual(epochs=5, batch_size=6, mixup=0.2, terms=Terms(label_smoothing=0.05)))
    assert evaluate(model, data).top1 > 0.9


@pytest.mark.parametrize("kind", grid(["a-softmax", "arcface", "sphereface2"], lambda kind: kind == "sphereface2"))
def test_a_run_on_sampled_classes_learns_all_and_leaves_the_head_as_it_was(kind):
    data = images(240, classes=20)
    torch.manual_seed(0)
    model = sphereify_with(20, kind)
    finetune(model, data, usual(epochs=6, batch_size=6, terms=Terms(sampled_classes=0.5)))
    assert evaluate(model, data).top1 > 0.6, "chance is 0.05"
    assert model[-1].training_logits
    assert model.train()(data.train[:2][0]).logits.shape == (2, 20)


def sphereify_with(classes, kind):
    plain = plain_net()
    plain[-1] = nn.Linear(16, classes)
    return sphereify(plain, inplace=True, example_inputs=IMAGES, head=kind)


def test_a_run_on_sampled_classes_goes_on_bit_for_bit(tmp_path):
    settings = {"terms": Terms(sampled_classes=0.5), "batch_size": 2}
    whole, parts = dropout_net(head="cosface"), dropout_net(head="cosface")
    finetune(whole, images(), usual(epochs=2, **settings))

    class Stop(Exception):
        pass

    def stop(step):
        if step.number == 5:
            raise Stop

    with pytest.raises(Stop):
        finetune(parts, images(), usual(epochs=2, **settings), output=tmp_path, on_step=stop)
    assert parts[-1].training_logits, "a run that stops leaves the head as it was, too"
    again = dropout_net(head="cosface")
    finetune(again, images(), usual(epochs=2, **settings), output=tmp_path, resume=True)
    assert same(state(again), state(whole))


def test_what_sampled_classes_do_not_go_with_is_told_before_training():
    settings = usual(epochs=1, terms=Terms(sampled_classes=0.5))
    for head in ("w-softmax", "keep"):
        with pytest.raises(UsageError, match=r"sampled_classes=0.5: needs a head with a margin, such as"):
            finetune(net(head=head), images(), settings)
    model = net(head="cosface")
    with pytest.raises(UsageError, match=r"sampled_classes=0.5: does not go with teacher, which is followed"):
        finetune(model, images(), settings, teacher=net(head="keep"))
    assert model[-1].training_logits
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match=f"sampled_classes: got {share}, expected a number above 0 and below 1"):
            Terms(sampled_classes=share)


@pytest.mark.parametrize(
    ("energy", "head"),
    grid(
        itertools.product(("compressive", "separation", "determinant"), ("keep", "arcface")),
        lambda energy, head: head == "arcface" if energy == "separation" else head == "keep",
    ),
)
def test_a_run_with_another_energy_spreads_the_filters(energy, head):
    spread = HypersphericalEnergy(energy="separation" if energy == "separation" else "mhe")
    plain, spreading = net(head=head), net(head=head)
    finetune(plain, images(24), usual(epochs=3))
    finetune(spreading, images(24), usual(epochs=3, terms=Terms(mhe=1.0, mhe_energy=energy)))
    assert spread(spreading) < spread(plain)
