"""Runs: they learn, repeat themselves, report what happens, and stop with a reason where they must."""

import json
import math

import pytest
import timm
import timm.data
import torch
from torch import Tensor, nn

from sphereify import load, sphereify
from sphereify.datasets import load_data
from sphereify.errors import TrainingError
from sphereify.training import Epoch, Result, Settings, Step, finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint
from tests.training.small import (
    CPU,
    dropout_net,
    images,
    linear_net,
    net,
    plain_dropout_net,
    same,
    state,
    usual,
)


def test_a_converted_network_learns_to_read_digits():
    torch.manual_seed(0)
    model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1), skip_shortcuts=True)
    data = load_data("digits", channels=1, img_size=16)
    result = finetune(model, data, Settings(epochs=4, lr=3e-3, **CPU))
    assert result.accuracy > 0.9
    assert result.epochs[-1].loss < result.epochs[0].loss
    x, y = data.test.tensors
    assert float((model(x).argmax(1) == y).float().mean()) == pytest.approx(result.accuracy)


def test_the_model_is_trained_in_place_and_ends_in_eval_mode():
    model = net().train()
    before = state(model)
    finetune(model, images(), Settings(epochs=1, batch_size=8, **CPU))
    after = state(model)
    assert not any(torch.equal(before[name], after[name]) for name, _ in model.named_parameters())
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not any(module.training for module in model.modules())


def test_batchnorm_statistics_move_in_training_only():
    """Neither the first check of the model nor the test images leave a trace in them."""
    model = net()
    finetune(model, images(24), Settings(epochs=2, batch_size=8, **CPU))
    assert model[1].num_batches_tracked == 6


def test_frozen_parameters_stay():
    model = net()
    model[0].weight.requires_grad_(False)
    before = state(model)
    finetune(model, images(), Settings(epochs=1, **CPU))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_what_is_frozen_is_frozen_for_one_run():
    model = dropout_net()
    finetune(model, images(), usual(epochs=1, freeze="0"))
    before = state(model)
    finetune(model, images(), usual(epochs=1))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_without_new_parameters_all_train_from_the_beginning():
    model = linear_net()
    before = state(model)
    finetune(model, images(), usual(epochs=1, warmup_head_epochs=1))
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(workers):
    def trained(seed: int, before: int = 0) -> dict[str, Tensor]:
        model = net()
        torch.manual_seed(before)
        finetune(model, images(), Settings(epochs=2, batch_size=8, seed=seed, workers=workers, **CPU))
        return state(model)

    first = trained(5)
    assert same(first, trained(5, before=1))
    if not workers:
        assert not same(first, trained(6))


def test_callbacks_hear_of_each_step_and_each_epoch():
    steps: list[Step] = []
    epochs: list[Epoch] = []
    result = finetune(
        net(), images(26), Settings(epochs=3, batch_size=8, **CPU), on_step=steps.append, on_epoch=epochs.append
    )
    # the last of four batches has 2 of 26 images, and is left out
    assert [(step.number, step.steps, step.epoch) for step in steps] == [(i, 9, (i + 2) // 3) for i in range(1, 10)]
    assert all(step.images_per_second > 0 for step in steps)
    assert epochs == result.epochs
    assert [(epoch.number, epoch.step, epoch.skipped) for epoch in epochs] == [(1, 3, 0), (2, 6, 0), (3, 9, 0)]
    for i, epoch in enumerate(epochs):
        heard = steps[3 * i : 3 * i + 3]
        assert all(isinstance(step.loss, float) for step in heard)
        assert epoch.loss == pytest.approx(sum(step.loss for step in heard) / 3)
        assert epoch.lr == heard[-1].lr


def test_the_best_epoch_is_the_first_of_the_highest_accuracy():
    epochs = [Epoch(i + 1, 1.0, accuracy) for i, accuracy in enumerate((0.2, 0.7, 0.5, 0.7))]
    result = Result(epochs, None)
    assert result.best is epochs[1]
    assert result.accuracy == 0.7
    assert Result(epochs[:3], None).accuracy == 0.5


def test_the_accuracy_told_is_that_of_the_held_out_part_after_the_epoch():
    model, data, heard = net(), images(), []
    x, y = data.test.tensors

    def check(epoch: Epoch) -> None:
        heard.append((epoch.accuracy, float((model.eval()(x).argmax(1) == y).float().mean())))

    finetune(model, data, Settings(epochs=6, batch_size=8, lr=0.004, **CPU), on_epoch=check)
    assert len({told for told, _ in heard}) > 1
    for told, measured in heard:
        assert told == pytest.approx(measured)


class Broken(nn.Module):
    """Gives a number that is none at one of its training steps."""

    def __init__(self, value: float, at: int) -> None:
        super().__init__()
        self.fc = nn.Linear(72, 3)
        self.value, self.at, self.steps = value, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return self.fc(x.flatten(1)) * (self.value if self.steps == self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_loss_that_is_not_finite_ends_the_training_with_its_step_and_a_remedy(value, at):
    steps: list[int] = []
    text = rf"the loss is (nan|inf) at step {at}; the first layer .*\. Try a smaller lr, or clip_grad=1\."
    with pytest.raises(TrainingError, match=text):
        finetune(
            Broken(value, at),
            images(24),
            Settings(epochs=2, batch_size=8, **CPU),
            on_step=lambda step: steps.append(step.number),
        )
    assert steps == list(range(1, at))


class Unsteady(nn.Module):
    """Its loss is finite, and the gradient of one of its weights is not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.root = nn.Linear(72, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.fc(x.flatten(1)) + self.root.sqrt()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"fc\.weight|root: a value is not finite after step 1\. The checkpoint of "
        r"step 0 is kept",
    ):
        finetune(Unsteady(), images(24), Settings(epochs=1, batch_size=24, device="cpu"), output=tmp_path)
    (kept,) = checkpoints(tmp_path / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(kept)["model"].values())
    assert not (tmp_path / "last.safetensors").exists()


def test_a_last_batch_of_one_image_is_no_obstacle():
    """BatchNorm over 1×1 features cannot train on a single image. The loss told is still the mean of those heard."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    heard: list[float] = []
    settings = Settings(epochs=1, batch_size=8, **CPU)
    result = finetune(model, images(25), settings, on_step=lambda step: heard.append(step.loss))
    assert len(heard) == 3
    assert result.epochs[-1].loss == pytest.approx(sum(heard) / 3)


def test_batches_of_one_image_are_refused_where_a_batch_is_normalized():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(TrainingError, match="cannot train on a single image: take batch_size=2 or more"):
        finetune(model, images(), Settings(epochs=1, batch_size=1, **CPU))


def test_fewer_images_than_a_batch_are_trained_on_all_the_same():
    heard: list[Step] = []
    finetune(net(), images(5), Settings(epochs=2, batch_size=8, **CPU), on_step=heard.append)
    assert len(heard) == 2


def test_the_last_group_of_batches_weighs_as_much_as_it_has_batches():
    """One batch in place of two makes the step that it makes alone."""
    networks = []
    for accumulate in (1, 2):
        model = net()
        finetune(model, images(8), Settings(epochs=2, batch_size=8, opt="sgd", lr=0.1, accumulate=accumulate, **CPU))
        networks.append(state(model))
    torch.testing.assert_close(networks[0], networks[1], rtol=0, atol=0)


def test_without_an_output_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(dropout_net(), images(), usual(epochs=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_runs_on_a_gpu_and_leaves_the_model_there():
    model = net()
    result = finetune(model, images(), Settings(epochs=3, batch_size=8, lr=1e-2))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert result.epochs[-1].loss < result.epochs[0].loss


def test_a_learned_radius_moves_in_the_first_epoch_already_and_is_recorded(tmp_path):
    model = dropout_net(radius=2.0, learn_radius=True)
    weight = model[0].weight.detach().clone()
    result = finetune(model, images(), usual(epochs=1, warmup_head_epochs=1, lr=0.05), output=tmp_path)
    (epoch,) = result.epochs
    assert epoch.radius == {"0": model[0].radius_value, "4": model[4].radius_value}
    assert all(abs(radius - 2) > 1e-3 for radius in epoch.radius.values())
    assert torch.equal(model[0].weight, weight)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["radius"] == epoch.radius
    assert load(tmp_path / "last", factory=plain_dropout_net)[0].radius_value == epoch.radius["0"]


def test_a_fixed_radius_is_no_measurement():
    assert finetune(dropout_net(radius=2.0), images(), usual(epochs=1)).epochs[0].radius == {}


def test_measurements_of_layers_go_to_tensorboard_under_their_names(tmp_path, monkeypatch):
    written = {}

    class Board:
        def __init__(self, folder):
            pass

        def add_scalar(self, tag, value, step):
            written[tag] = value

        def flush(self):
            pass

        close = flush

    monkeypatch.setattr("sphereify.training.record._tensorboard", Board)
    options = {"operator": "learnable-sigmoid", "radius": 2.0, "learn_radius": True}
    (epoch,) = finetune(dropout_net(**options), images(), usual(epochs=1), output=tmp_path).epochs
    assert {"loss", "accuracy", "k/0", "k/4", "k/7", "radius/0", "radius/4", "energy/0"} <= written.keys()
    assert written["radius/4"] == epoch.radius["4"]
    assert written["loss"] == epoch.loss


@pytest.mark.usefixtures("pictures")
def test_the_curves_of_a_run_have_a_panel_for_the_learned_radii(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, title, **style: titles.append(title))
    finetune(dropout_net(radius=2.0, learn_radius=True), images(), usual(epochs=1), output=tmp_path)
    assert titles[:2] == ["training loss", "test accuracy, %"]
    assert titles[2] == "learned radius ρ\ndark: 0, bright: 4"
