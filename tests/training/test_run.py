"""The training loop: it learns, repeats itself, tells what happens, and stops with a word where it must."""

import math
from collections import namedtuple

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sphereify import sphereify
from sphereify.datasets import Data, load_data
from sphereify.errors import DataError, TrainingError, UsageError
from sphereify.nn import HypersphericalEnergy
from sphereify.training import Epoch, Objective, Result, Settings, Step, Terms, accuracy, finetune
from sphereify.training.loader import Batches

CPU = {"device": "cpu"}


def images(number: int = 26, classes: int = 3, seed: int = 0) -> Data:
    """Noise around one pattern a class: easy to tell apart."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 2, 6, 6, generator=draw)

    def part(number: int) -> TensorDataset:
        targets = torch.arange(number) % classes
        return TensorDataset(patterns[targets] + 0.3 * torch.randn(number, 2, 6, 6, generator=draw), targets)

    return Data("patterns", part(number), part(12), [f"class {i}" for i in range(classes)], (2, 6, 6))


def net(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return sphereify(plain, inplace=True, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def optimizer(monkeypatch):
    """What the loop's optimizer is made of, and the rate at each of its steps."""
    seen: dict = {"rates": []}
    create = timm.optim.create_optimizer_v2

    def watched(*given, **settings):
        made = create(*given, **settings)
        seen["groups"] = made.param_groups
        made.register_step_pre_hook(lambda opt, *_: seen["rates"].append({group["lr"] for group in opt.param_groups}))
        return made

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", watched)
    return seen


# ---------------------------------------------------------------------------------------------------------- learning


def test_a_converted_network_learns_to_read_digits():
    torch.manual_seed(0)
    model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1), skip_shortcuts=True)
    data = load_data("digits", channels=1)
    result = finetune(model, data, Settings(epochs=4, **CPU))
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


class Augmented(Dataset):
    """Random at each access, as an image folder is."""

    def __init__(self, part: TensorDataset):
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.part[index]
        return image + torch.randn(()), target


def test_the_seed_covers_augmentation():
    def trained() -> dict[str, Tensor]:
        model, data = net(), images()
        data = Data(data.name, Augmented(data.train), data.test, data.classes, data.image_size)
        finetune(model, data, Settings(epochs=2, batch_size=8, **CPU))
        return state(model)

    first = trained()
    torch.manual_seed(123)
    assert same(first, trained())


def test_training_images_come_in_another_order_each_epoch_and_test_images_do_not():
    data = images(24)
    seen: dict[str, list[list[int]]] = {"train": [], "test": []}

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            part = data.train if self.training else data.test
            known = part.tensors[0].flatten(1)
            if len(x) > 1:
                seen["train" if self.training else "test"] += [
                    [int((known - row).abs().sum(1).argmin()) for row in x.flatten(1)]
                ]
            return self.fc(x.flatten(1))

    finetune(Watched(), data, Settings(epochs=2, batch_size=24, **CPU))
    first, second = seen["train"]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))
    assert seen["test"] == [list(range(12))] * 2


# ----------------------------------------------------------------------------------------------------- what it tells


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

    finetune(model, data, Settings(epochs=6, batch_size=8, **CPU), on_epoch=check)
    assert len({told for told, _ in heard}) > 1
    for told, measured in heard:
        assert told == pytest.approx(measured)


def test_accuracy_is_the_share_of_right_answers_over_uneven_batches():
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]
    data = TensorDataset(logits, torch.tensor([0, 1, 2, 3, 1, 2, 2]))
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    assert accuracy(model, DataLoader(data, batch_size=3)) == pytest.approx(5 / 7)
    assert not model.training


# ---------------------------------------------------------------------------------------------------- rate and decay


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_along_a_cosine_to_nothing(optimizer):
    finetune(net(), images(24), Settings(epochs=20, batch_size=8, lr=0.02, **CPU))
    assert all(len(rates) == 1 for rates in optimizer["rates"])
    rates = [rate for (rate,) in optimizer["rates"]]
    assert len(rates) == 60
    expected = [
        0.02 * t / 6 if t < 6 else 0.01 * (1 + math.cos(math.pi * t / 60)) for t in (i + 0.5 for i in range(60))
    ]
    assert rates == pytest.approx(expected)  # of the middle of each step
    assert 0 < rates[-1] < 0.02 / 1000


def test_one_single_step_has_a_rate(optimizer):
    finetune(net(), images(8), Settings(epochs=1, batch_size=8, lr=0.5, **CPU))
    ((rate,),) = optimizer["rates"]
    assert rate == pytest.approx(0.25)  # in the middle of a cosine from 0.5 to 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sched": "step", "decay_epochs": 2, "decay_rate": 0.5}, [1] * 6 + [0.5] * 6 + [0.25] * 3),
        # timm's multistep falls one step before the epoch is over
        ({"sched": "multistep", "milestones": (1, 4)}, [1] * 2 + [0.1] * 9 + [0.01] * 4),
    ],
)
def test_the_rate_falls_where_it_is_told_to(optimizer, settings, expected):
    finetune(net(), images(24), Settings(epochs=5, batch_size=8, lr=1.0, warmup_epochs=0, **settings, **CPU))
    assert [rate for (rate,) in optimizer["rates"]] == pytest.approx(expected)


def test_angular_weights_are_not_decayed_and_plain_ones_are(optimizer):
    model = net(exclude="3")
    finetune(model, images(), Settings(epochs=1, weight_decay=0.3, **CPU))
    decayed = {id(p): group["weight_decay"] for group in optimizer["groups"] for p in group["params"]}
    assert decayed[id(model[3].weight)] == 0.3
    assert {name for name, p in model.named_parameters() if decayed[id(p)] == 0} == {
        name for name, _ in model.named_parameters()
    } - {"3.weight"}
    assert len(decayed) == len(list(model.parameters()))


@pytest.mark.parametrize("kept", [None, "3"])
def test_weight_decay_changes_a_network_with_plain_weights_only(kept):
    def trained(decay: float) -> dict[str, Tensor]:
        model = net(exclude=kept)
        finetune(model, images(), Settings(epochs=1, batch_size=8, weight_decay=decay, **CPU))
        return state(model)

    assert same(trained(0.0), trained(5.0)) == (kept is None)


# ------------------------------------------------------------------------------------------------- auxiliary outputs


Outputs = namedtuple("Outputs", "logits aux2 aux1")


class WithAuxiliary(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.aux = nn.Linear(72, 3), nn.Linear(72, 3)
        self.make = make

    def forward(self, x: Tensor):
        x = x.flatten(1)
        return self.make(self.main(x), self.aux(x)) if self.training else self.main(x)


@pytest.mark.parametrize(
    "make",
    [lambda main, aux: (main, aux), lambda main, aux: Outputs(main, aux, None)],
    ids=["tuple", "named, one None"],
)
def test_auxiliary_outputs_count_three_tenths(make):
    model, data, heard = WithAuxiliary(make), images(24), []
    before = state(model)
    x, y = data.train.tensors
    with torch.no_grad():
        main, aux = (F.cross_entropy(layer(x.flatten(1)), y).item() for layer in (model.main, model.aux))
    finetune(model, data, Settings(epochs=1, batch_size=24, **CPU), on_step=lambda step: heard.append(step.loss))
    assert heard == [pytest.approx(main + 0.3 * aux, rel=1e-5)]
    assert not torch.equal(before["aux.weight"], model.aux.weight)


# --------------------------------------------------------------------------------------------------------- bad input


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
    text = rf"the loss is (nan|inf) at step {at}; the first layer .*\. Try a smaller --lr, or --clip-grad 1\."
    with pytest.raises(TrainingError, match=text):
        finetune(
            Broken(value, at), images(24), Settings(epochs=2, batch_size=8, **CPU),
            on_step=lambda step: steps.append(step.number),
        )  # fmt: skip
    assert steps == list(range(1, at))


@pytest.mark.parametrize("classes", [2, 5])
def test_other_classes_than_the_data_has_are_told_before_training(classes):
    model = net()
    before = state(model)
    text = rf"the model has 3 classes, patterns has {classes}: convert it again with --num-classes {classes}"
    with pytest.raises(DataError, match=text):
        finetune(model, images(classes=classes), Settings(epochs=1, **CPU))
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("last", "kind"),
    [(nn.Unflatten(1, (3, 1)), r"Tensor of shape \(1, 3, 1\)"), (nn.LSTM(3, 3), "tuple")],
    ids=["three dimensions", "tuple"],
)
def test_a_model_that_returns_no_logits_is_an_error(last, kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), last)
    with pytest.raises(DataError, match=rf"the model returns {kind}, expected logits of shape \(batch, classes\)"):
        finetune(model, images(), Settings(epochs=1, **CPU))


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
    with pytest.raises(TrainingError, match="cannot train on a single image: take --batch-size 2 or more"):
        finetune(model, images(), Settings(epochs=1, batch_size=1, **CPU))


def test_fewer_images_than_a_batch_are_trained_on_all_the_same():
    heard: list[Step] = []
    finetune(net(), images(5), Settings(epochs=2, batch_size=8, **CPU), on_step=heard.append)
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("epochs", 0, "--epochs: got 0, expected at least 1"),
        ("epochs", -2, "--epochs: got -2, expected at least 1"),
        ("batch_size", 0, "--batch-size: got 0, expected at least 1"),
        ("workers", -1, "--workers: got -1, expected at least 0"),
        ("weight_decay", -0.1, "--weight-decay: got -0.1, expected at least 0"),
        ("lr", 0.0, "--lr: got 0.0, expected a number above 0; a usual value is 1e-3"),
        ("lr", -1.0, "--lr: got -1.0, expected a number above 0"),
        ("sched", "plateau", "--sched: plateau cannot be continued after a stop"),
        ("sched", "multistep", "--milestones: none given, expected the epochs after which multistep falls"),
        ("decay_epochs", 0.0, "--decay-epochs: got 0.0, expected a number above 0"),
        ("decay_rate", 0.0, "--decay-rate: got 0.0, expected a number above 0 and at most 1"),
        ("epoch_batches", 0, "--epoch-batches: got 0, expected at least 1"),
        ("lr", math.nan, "--lr: got nan, expected a number above 0"),
    ],
)
def test_a_setting_out_of_range_is_told_with_its_option(setting, value, text):
    with pytest.raises(UsageError, match=text):
        Settings(**{setting: value})


@pytest.mark.parametrize(
    "setting", [{"mhe_s": 2.0}, {"mhe_half_space": True}, {"mhe_distance": "angular"}, {"mhe_output": 10.0}]
)
def test_a_kind_of_energy_without_its_weight_is_told(setting):
    option = next(iter(setting)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option}: no effect without --mhe"):
        Terms(**setting)


def test_an_unknown_distance_of_filters_is_told():
    with pytest.raises(UsageError, match="--mhe-distance"):
        Terms(mhe=1.0, mhe_distance="manhattan")


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"mhe_s": 2.0, "mhe_distance": "angular"}, {"s": 2.0, "distance": "angular"}),
        ({"mhe_hidden": 0.0, "mhe_output": 3.0}, {"hidden_weight": 0.0, "output_weight": 3.0}),
        ({"mhe_half_space": True}, {"half_space": True}),
    ],
)
def test_the_energy_of_the_objective_is_the_one_asked_for(terms, options):
    model, output, targets = net(head="keep"), torch.randn(4, 3), torch.arange(4) % 3
    plain = Objective(model, Terms())(output, targets)
    total = Objective(model, Terms(mhe=0.25, **terms))(output, targets)
    torch.testing.assert_close(total - plain, 0.25 * HypersphericalEnergy(**options)(model))


# ------------------------------------------------------------------------------------------------ epochs in iterations


@pytest.mark.parametrize("epoch_batches", [1, 3, 4, 11])
def test_epochs_of_some_batches_see_the_same_images_as_whole_passes(epoch_batches):
    def seen(epoch_batches: int | None, epochs: int) -> list[list[tuple[int, int]]]:
        batches = Batches(13, 3, seed=5, epoch_batches=epoch_batches)
        found = []
        for batches.epoch in range(epochs):
            assert len(list(batches)) == len(batches)
            found += list(batches)
        return found

    in_passes = seen(None, 11)  # 4 batches each, the thirteenth image left out
    assert all(len({index for batch in in_passes[at : at + 4] for _, index in batch}) == 12 for at in range(0, 44, 4))
    assert seen(epoch_batches, 4) == in_passes[: 4 * epoch_batches]


def test_a_run_counted_in_iterations_has_as_many_steps_tests_and_falls_of_the_rate_as_asked(optimizer):
    told = []
    settings = Settings(epochs=4, epoch_batches=5, batch_size=4, lr=1.0, sched="multistep", milestones=(2, 3),
                        warmup_epochs=0, **CPU)  # fmt: skip
    result = finetune(net(), images(26), settings, on_step=told.append)
    assert [epoch.step for epoch in result.epochs] == [5, 10, 15, 20]
    assert len(told) == 20
    rates = [rate for rates in optimizer["rates"] for rate in rates]
    assert rates == pytest.approx([1.0] * 9 + [0.1] * 5 + [0.01] * 6)  # timm falls with the last step of an epoch


def test_settings_at_their_limits_are_fine():
    finetune(net(), images(4), Settings(epochs=1, batch_size=2, weight_decay=0, workers=0, **CPU))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device: got '{device}', but torch sees no CUDA device.*take 'cpu'"):
        Settings(device=device)


def test_a_device_that_torch_does_not_know_is_an_error():
    with pytest.raises(UsageError, match="--device: got 'gpu'"):
        _ = Settings(device="gpu").chosen_device


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_cuda_is_taken_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert Settings().chosen_device == torch.device(device)
    assert Settings(device="cpu").chosen_device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_runs_on_a_gpu_and_leaves_the_model_there():
    model = net()
    result = finetune(model, images(), Settings(epochs=3, batch_size=8, lr=1e-2))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert result.epochs[-1].loss < result.epochs[0].loss
