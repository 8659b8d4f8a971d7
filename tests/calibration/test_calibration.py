"""The passes in lockstep, the regression under a ReLU, sums, functional calls, steps, suggestions, and bad inputs."""

import contextlib
import copy
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sphereify import calibrate, sphereify, suggest
from sphereify.calibration.distillation import reconstruct
from sphereify.calibration.lockstep import Pass, current
from sphereify.calibration.regression import Rows, fit
from sphereify.errors import DataError, UsageError
from sphereify.nn import CosineOperator, LearnableSigmoidOperator, LinearOperator


def smooth(number: int = 96, channels: int = 3, size: int = 12) -> Tensor:
    return F.interpolate(torch.randn(number, channels, size // 2, size // 2), size=size, mode="bilinear")


def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Of the outputs, as a share of their variance."""
    with torch.no_grad():
        y, target = model.eval()(x), original.eval()(x)
    return float((y - target).square().mean() / target.var())


# ---------------------------------------------------------------------------------------------------------- the passes


def test_a_pass_runs_only_while_it_is_waited_for():
    trace = []

    def body():
        for number in range(3):
            trace.append(number)
            current().stand_still(number)

    passing = Pass(body, 0)
    assert trace == []
    assert [passing.advance() for _ in range(4)] == [0, 1, 2, None]
    assert trace == [0, 1, 2]


def test_a_pass_that_is_given_up_ends_its_thread():
    ended = []

    def body():
        try:
            current().stand_still("here")
        finally:
            ended.append(True)

    before = threading.active_count()
    passing = Pass(body, 0)
    passing.advance()
    passing.close()
    assert ended == [True]
    assert threading.active_count() == before


def test_what_a_pass_raises_is_raised_where_it_is_waited_for():
    def body():
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        Pass(body, 0).advance()


class Interrupted(nn.Module):
    def __init__(self, at: int):
        super().__init__()
        self.first, self.second, self.at, self.calls = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), at, 0

    def forward(self, x):
        x = self.first(x)
        self.calls += 1
        if self.calls >= self.at:
            raise KeyboardInterrupt
        return F.leaky_relu(self.second(x.relu()), 1.0)


def test_no_thread_and_no_hook_is_left_after_an_interruption():
    original = Interrupted(10**9)
    model = sphereify(original)
    model.at, model.calls = 2, 0
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, original, list(torch.randn(24, 3, 8, 8).split(8)))
    assert threading.active_count() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, original) for m in net.modules())


# --------------------------------------------------------------------------------------------------------- regression


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
    def passed(found):  # the error that a ReLU lets pass, computed anew
        y = operator(unit @ found.filters.t()) * found.beta + found.gamma
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

    def passed(found):  # full errors where something should pass, what passes where nothing should
        y, wanted = unit @ found.filters.t() * found.beta + found.gamma + added, target + added
        return float(torch.where(wanted > 0, y - wanted, y.relu()).square().mean())

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
        found = fit(rows_of(x, noise), CosineOperator(), filters)
    assert found.after < 0.5  # 35 rows for 64 unknowns explain themselves wholly, and others not at all
    assert ((found.filters * filters).sum(1).abs() > 0.5).all()


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


# ------------------------------------------------------------------------------------------------------------ networks


class Residual(nn.Module):
    """Two blocks whose sums pass a ReLU; the second `+=` and an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.na(self.a(x)) + x).relu()
        y = self.nb(self.b(x))
        y += x
        return self.fc(F.relu(y, inplace=True).mean((2, 3)))


def trained_statistics(net: nn.Module) -> nn.Module:
    net.train()
    with torch.no_grad():
        for _ in range(40):
            net(smooth(32))
    return net.eval()


def test_sums_are_followed_in_place_or_not():
    torch.manual_seed(0)
    original = trained_statistics(Residual())
    x = smooth()
    before = copy.deepcopy(original.state_dict())
    model = sphereify(original)
    found = calibrate(model, original, x.split(32))
    assert list(found) == ["stem", "a", "b", "fc"]
    assert min(found.values()) > 0.6
    assert error(model, original, smooth()) < 0.5
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)


def test_each_fit_knows_the_sum_and_the_relu_behind_its_layer(monkeypatch):
    from sphereify.calibration import layer

    torch.manual_seed(0)
    original = trained_statistics(Residual())
    seen = []

    def spy(site, batches):
        seen.append((site.name, batches[0].rectified, batches[0].added is not None))
        x = batches[0].x  # both blocks add what they received, and a ReLU follows
        if batches[0].added is not None:
            torch.testing.assert_close(batches[0].added, x.movedim(1, -1).flatten(0, -2), rtol=0, atol=0)
        return layer.set_layer(site, batches)

    # Not by its dotted path: sphereify.convert has a function of the module's name.
    monkeypatch.setattr(sys.modules[calibrate.__module__], "set_layer", spy)
    calibrate(sphereify(original), original, [smooth(16)])
    assert seen == [("stem", True, False), ("a", True, True), ("b", True, True)]


def test_statistics_in_training_and_evaluation_agree_after_a_calibration():
    """A BatchNorm behind an angular layer keeps the statistics that the layer has: training begins where it stands."""
    torch.manual_seed(1)
    original = trained_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(10)))
    x = smooth(256)
    model = sphereify(original, calibration=[x])
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-3)


class Functional(nn.Module):
    """qkv as a call of F.linear, with a bias that is put together."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.qkv = nn.Parameter(torch.randn(24, 8) / 3)
        self.q_bias = nn.Parameter(torch.randn(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = F.linear(x, self.qkv, torch.cat([self.q_bias, torch.zeros(16)])).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.fc((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
def test_functional_calls_are_calibrated(operator):
    torch.manual_seed(2)
    original = Functional().eval()
    x = torch.randn(200, 10, 6) * torch.rand(200, 10, 1).mul(2).exp()
    copied = sphereify(original, operator=operator, attention="convert", head="keep")
    model = sphereify(original, operator=operator, attention="convert", head="keep")
    found = calibrate(model, original, x.split(50))
    assert {"embed", "qkv", "attention.in_proj_weight", "attention.out_proj"} == set(found)
    assert not torch.equal(model.qkv, original.qkv)
    fresh = torch.randn(100, 10, 6) * torch.rand(100, 10, 1).mul(2).exp()
    assert error(model, original, fresh) < error(copied, original, fresh)


def test_computed_and_tied_filters_keep_their_direction():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 8)
            self.normed = weight_norm(nn.Linear(8, 8))
            self.out = nn.Linear(8, 12, bias=False)
            self.out.weight = self.table.weight
            self.last = nn.Linear(12, 3)

        def forward(self, tokens):
            return self.last(self.out(self.normed(self.table(tokens))).mean(1))

    torch.manual_seed(3)
    original = Tied().eval()
    tokens = torch.randint(0, 12, (64, 7))
    model = sphereify(original, example_inputs=tokens)
    found = calibrate(model, original, [tokens])
    assert model.out.weight is model.table.weight
    torch.testing.assert_close(model.table.weight, original.table.weight, rtol=0, atol=0)
    assert "something else uses them" in found.layers["out"].note
    assert found.layers["normed"].after > found.layers["normed"].before


def test_calibrating_twice_gives_the_same_weights():
    torch.manual_seed(4)
    original = trained_statistics(Residual())
    x = smooth()
    first, second = (sphereify(original, calibration=x.split(16), calibration_steps=3) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ steps and suggestions


def test_steps_bring_the_outputs_closer_and_change_nothing_else():
    torch.manual_seed(5)
    original = trained_statistics(Residual())
    x = smooth(128)
    model = sphereify(original, calibration=[x])
    model.stem.weight.requires_grad_(False)
    frozen, statistics = model.stem.weight.clone(), model.na.running_mean.clone()
    heard = []
    before, after = reconstruct(model, original, x.split(64), steps=40, on_step=lambda step, loss: heard.append(step))
    assert after < before
    assert heard == list(range(1, 41))
    assert torch.equal(model.stem.weight, frozen)
    assert torch.equal(model.na.running_mean, statistics)
    assert not model.training
    assert all(p.requires_grad for p in original.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_steps_that_make_it_worse_are_taken_back():
    torch.manual_seed(6)
    original = trained_statistics(Residual())
    x = smooth(64)
    model = sphereify(original, calibration=[x])
    kept = copy.deepcopy(model.state_dict())
    before, after = reconstruct(model, original, [x], steps=5, lr=1e4)
    assert after == before
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


def test_suggestions_exclude_the_least_explained_layers_until_the_networks_agree():
    torch.manual_seed(7)
    original = trained_statistics(Residual())
    x = smooth(256)
    found = suggest(original, x.split(32), loss=0.001)
    assert [layer.after for layer in found.layers] == sorted(layer.after for layer in found.layers)
    assert found.exclude == [layer.name for layer in found.layers][: len(found.exclude)]
    assert found.tried[0] < found.wanted  # all converted is not enough here, or the test shows nothing
    assert found.exclude
    model = sphereify(original, exclude=found.exclude, calibration=x.split(32)[:6])
    with torch.no_grad():
        agreed = (model(x[192:]).argmax(1) == original(x[192:]).argmax(1)).float().mean()
    assert float(agreed) == pytest.approx(found.agreement)


@pytest.mark.parametrize("loss", [0.0, 1.0, -1])
def test_a_share_that_is_none_is_an_error(loss):
    with pytest.raises(UsageError, match="expected a share between 0 and 1"):
        suggest(Residual(), [smooth()], loss=loss)


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_named_before_anything_changes(bad):
    original = Residual()
    model = sphereify(original)
    before = copy.deepcopy(model.state_dict())
    x = smooth(32)
    x[20, 0, 3, 3] = bad
    with pytest.raises(DataError, match="batch 1 holds 1 values that are not finite"):
        calibrate(model, original, x.split(16))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_original_without_finite_outputs_is_named():
    original = Residual()
    with torch.no_grad():
        original.fc.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="original network's output is not finite"):
        calibrate(sphereify(Residual()), original, [smooth(16)])


def test_images_in_another_range_than_the_model_was_trained_on_are_noted():
    original = Residual()
    original.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model = sphereify(original, example_inputs=smooth(2))
    with pytest.warns(UserWarning, match=r"the images lie in \[0.00, 255.00\]"):
        found = calibrate(model, original, [torch.linspace(0, 255, 3 * 144 * 16).view(16, 3, 12, 12)])
    assert "Normalize" in found.notes[0]
    normal = ((torch.rand(16, 3, 12, 12) - 0.45) / 0.225).clamp(-2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(sphereify(original, example_inputs=smooth(2)), original, [normal])


def test_channels_that_are_constant_are_told():
    original = trained_statistics(Residual())
    with torch.no_grad():
        original.a.weight[:3] = 0
    found = calibrate(sphereify(original), original, [smooth(64)])
    assert "3 of 8 channels are constant" in found.layers["a"].note


@pytest.mark.parametrize("steps", [-1, -5])
def test_negative_steps_are_an_error(steps):
    original = Residual()
    with pytest.raises(UsageError, match="expected 0 or more"):
        calibrate(sphereify(original), original, [smooth(8)], steps=steps)


class KeepsState(nn.Module):
    """Hangs a tensor on itself between two layers: two batches side by side would mix it up."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 8))
        self.kept = None

    def forward(self, x):
        self.kept = self.a(x).relu()
        return F.leaky_relu(self.c(torch.cat([self.b(self.kept).relu(), self.kept], 1)), 1.0)


@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 16, 8]])
def test_a_network_that_keeps_a_state_is_calibrated_as_on_one_batch(sizes):
    torch.manual_seed(8)
    original = KeepsState()
    x = smooth(sum(sizes))
    parts = sphereify(original, calibration=x.split(sizes))
    whole = sphereify(original, calibration=[x])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_network_that_writes_to_its_input_gets_its_own_each_time():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.leaky_relu(self.conv(input=x.mul_(2).sub_(1)), 1.0)

    torch.manual_seed(9)
    original, x = Writes(), torch.rand(32, 3, 8, 8)
    before = x.clone()
    model = sphereify(original)
    found = calibrate(model, original, x.split(16), steps=2)
    assert torch.equal(x, before)
    assert found["conv"] > 0.5


def test_a_pass_that_catches_everything_still_ends():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            with contextlib.suppress(BaseException):  # as much existing code does
                x = self.a(x)
            return F.leaky_relu(self.b(x), 1.0)

    def stop(name, explained):
        raise KeyboardInterrupt

    original = Stubborn()
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(sphereify(original), original, smooth(16).split(8), on_layer=stop)
    assert threading.active_count() == before


def test_after_an_error_half_way_the_model_is_what_it_was():
    original = Residual()
    model = sphereify(original)
    before = copy.deepcopy(model.state_dict())

    def stop(name, explained):
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        calibrate(model, original, [smooth(16)], on_layer=stop)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_k_of_the_whole_network_stays():
    original = Residual()
    model = sphereify(original, operator="learnable-sigmoid", share_k="network")
    before = model.a.operator.p.clone()
    calibrate(model, original, [smooth(32)])
    assert torch.equal(model.a.operator.p, before)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([torch.zeros(0, 3, 12, 12)], "batch 0 is empty"),
        ([(torch.randn(4, 3, 12, 12), torch.zeros(4))], "Leave labels out"),
        (None, "expected batches"),
    ],
)
def test_batches_that_are_none_are_told(batches, told):
    original = Residual()
    with pytest.raises((UsageError, DataError), match=told):
        calibrate(sphereify(original), original, batches)


def test_what_can_have_no_effect_is_an_error():
    original = Residual()
    with pytest.raises(UsageError, match="without calibration"):
        sphereify(original, calibration_steps=5)
    model = sphereify(original).requires_grad_(False)
    with pytest.raises(UsageError, match="requires a gradient"):
        reconstruct(model, original, [smooth(8)], steps=2)
    with pytest.raises(UsageError, match="one network"):
        calibrate(model, model, [smooth(8)])


def test_a_norm_that_serves_two_layers_is_kept_and_this_is_said():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.two(self.norm(self.one(x)).relu()))

    torch.manual_seed(0)
    network = Twice().eval()
    converted = sphereify(network)
    found = calibrate(converted, network, [torch.randn(8, 3, 12, 12)])
    assert all("serves other layers" in found.layers[name].note for name in ("one", "two"))
    assert torch.equal(converted.norm.weight, network.norm.weight)


def test_autocast_around_a_calibration_changes_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inputs = [torch.randn(8, 3, 12, 12)]
    plain, cast = sphereify(network), sphereify(network)
    calibrate(plain, network, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(cast, network, inputs)
    for one, other in zip(plain.parameters(), cast.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_steps_ask_the_original_again_where_its_outputs_are_too_many_to_keep(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inputs = [torch.randn(8, 3, 12, 12)]
    kept, asked = sphereify(network), sphereify(network)
    first = reconstruct(kept, network, inputs, steps=3)
    monkeypatch.setattr("sphereify.calibration.distillation.KEPT_BYTES", 0)
    assert reconstruct(asked, network, inputs, steps=3) == first
