"""A training that starts as the original and ends as the conversion."""

import copy

import pytest
import torch
from torch import nn

from sphereify import fold, save, sphereify
from sphereify.convert.names import submodule
from sphereify.datasets import Data
from sphereify.errors import NoEffectError, UsageError
from sphereify.training import Settings, compare, finetune, variants
from sphereify.training.data_options import DataOptions
from sphereify.training.morph import Morph, check_morph, start_as_original
from sphereify.training.results import Epoch, Result
from sphereify.training.start import start
from tests.grids import grid
from tests.training.small import CPU, Crash, crash_at, images, plain_net, same, state

CONVERSIONS = [
    {"radius": 4.0},
    {"radius": 1.0, "learn_radius": True, "operator": "linear", "head": "s-softmax"},
    {"magnitude": "tanh", "operator": "learnable-sigmoid", "learn_magnitude_radius": True, "head": "keep"},
    {"magnitude": "segment", "weighted": True, "magnitude_mean": "data", "rescale": "always"},
    {"magnitude": "log", "weighted": True, "operator": "sigmoid"},
]


def pair(**conversion):
    """A network with statistics of its own, its conversion, and inputs."""
    torch.manual_seed(0)
    net, x = plain_net(), torch.randn(32, 2, 6, 6)
    for _ in range(10):
        net(x)
    net.eval()
    return net, sphereify(net, example_inputs=x, **conversion).eval(), x


@pytest.mark.parametrize("conversion", grid(CONVERSIONS, lambda conversion: "learn" in str(conversion)))
def test_it_starts_as_the_original_and_ends_as_the_conversion_without_a_jump(conversion):
    net, model, x = pair(**conversion)
    untouched = copy.deepcopy(model)
    start_as_original(model, net, [x])
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-5)  # with gradients: the form in between
    with torch.no_grad():
        assert torch.equal(submodule(model, "0")(x), submodule(net, "0")(x))  # without: the plain layer itself
    way, last, steps = Morph([model], 200), net(x).detach(), []
    for step in range(1, 201):
        way.advance(step)
        now = model(x).detach()
        steps.append(float((now - last).norm() / last.norm()))
        last = now
    assert max(steps) < 0.05
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(model(x), untouched(x))
    assert {name: set(vars(m)) for name, m in model.named_modules()} == {
        name: set(vars(m)) for name, m in untouched.named_modules()
    }


def test_statistics_behind_a_layer_follow_its_scale():
    net, model, x = pair(radius=2.0)
    start_as_original(model, net, [x])
    way = Morph([model], 50)
    before = model[1].running_var.clone()
    for step in range(1, 51):
        way.advance(step)
    model[1].running_var, at_end = before.clone(), model[1].running_var.clone()
    inside = model[0](x).var((0, 2, 3))
    assert (at_end / inside).log().abs().max() < 1
    assert (before / inside).log().abs().min() > 1


def test_all_parameters_have_a_gradient_from_the_first_step_on():
    for conversion in CONVERSIONS:
        net, model, x = pair(**conversion)
        start_as_original(model, net, [x])
        model.train()(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_network_without_a_normalization_keeps_its_scale():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = 5 * torch.randn(64, 2, 6, 6)
    model = sphereify(net, magnitude="tanh", head="keep").eval()
    start_as_original(model, net.eval(), [x])
    way = Morph([model], 1)
    way.at(1)
    assert 0.5 < float((model[2](model[1](model[0](x))).std() / net[:3](x).std()).detach()) < 2


def settings(**given) -> Settings:
    return Settings(**{"epochs": 4, "batch_size": 8, "morph": 0.5, "opt": "sgd", "lr": 0.01, **CPU, **given})


def test_training_arrives_and_keeps_no_model_of_the_way(tmp_path):
    net, model, x = pair(radius=1.0)
    start_as_original(model, net, [x])
    seen = []

    def look(epoch):
        seen.append(((tmp_path / "run/last").exists(), epoch.morph))

    result = finetune(model, images(), settings(), output=tmp_path / "run", on_epoch=look)
    assert seen == [(False, 0.5), (True, 1.0), (True, 1.0), (True, 1.0)]
    assert result.best.morph == 1
    assert not any("morph" in vars(module) for module in model.modules())
    fold(model)


def test_the_best_epoch_is_one_of_the_conversion():
    epochs = [Epoch(1, 0.1, 0.99, morph=0.5), Epoch(2, 0.1, 0.9), Epoch(3, 0.1, 0.95), Epoch(4, 0.1, 0.95)]
    assert Result(epochs, None).best.number == 3


@pytest.mark.parametrize("ema", [None, pytest.param(0.8, marks=pytest.mark.exhaustive)])
def test_a_run_that_crashed_on_the_way_goes_on_bit_by_bit(tmp_path, ema):
    runs = []
    for at in (None, 5):
        net, model, x = pair(radius=1.0, operator="sigmoid")
        start_as_original(model, net, [x])
        chosen, folder = settings(ema=ema, checkpoint_minutes=0), tmp_path / str(at)
        if at is not None:
            with pytest.raises(Crash):
                finetune(model, images(), chosen, output=folder, on_step=crash_at(at))
            net, model, x = pair(radius=1.0, operator="sigmoid")
            start_as_original(model, net, [x])
        finetune(model, images(), chosen, output=folder, resume=at is not None)
        runs.append(state(model))
    assert same(*runs)


def test_a_model_on_its_way_is_neither_saved_nor_folded(tmp_path):
    net, model, x = pair(radius=1.0)
    start_as_original(model, net, [x])
    Morph([model], 4).at(1)
    for act in (lambda: save(model, tmp_path / "artifact"), lambda: fold(model)):
        with pytest.raises(
            UsageError, match=r"0 is still between the original and its own function .25% of the way.; tr"
        ):
            act()


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        ({"head": "a-softmax"}, "morph: the head is a-softmax, whose margin the original does not have"),
        ({"norm": "replace"}, "morph: the original normalizes by 1, which norm='replace' drops"),
    ],
)
def test_what_has_no_form_in_between_is_refused_before_training(conversion, message):
    _, model, _ = pair(**conversion)
    with pytest.raises(UsageError, match=message):
        finetune(model, images(), settings())


def test_plain_networks_and_settings_that_do_not_go_together_are_refused():
    with pytest.raises(NoEffectError, match="morph: has no effect, since nothing in Sequential is angular"):
        check_morph(plain_net())
    with pytest.raises(UsageError, match="morph: does not go with compile"):
        Settings(morph=0.5, compile=True)
    with pytest.raises(UsageError, match="fsdp: does not go with morph"):
        Settings(morph=0.5, fsdp=True)
    with pytest.raises(UsageError, match=r"morph: got 1.5, expected a number of at least 0 and at most 1. Usual: 0.6"):
        Settings(morph=1.5)


def test_a_start_by_name_is_the_original_and_an_artifact_is_refused(tmp_path, monkeypatch):
    _, model, _ = pair(radius=1.0)
    monkeypatch.setattr(DataOptions, "open", lambda self, model, **_: images())
    monkeypatch.setattr(DataOptions, "class_count", lambda self, **_: 3)
    begun = start("tests.training.small:plain_net", DataOptions(data="patterns"), morph=True)
    assert begun.kept is None
    assert begun.model[0].morph == 0
    save(model, tmp_path / "artifact")
    with pytest.raises(UsageError, match=r"morph: starts from the original network, and the artifact .* is converted"):
        start(str(tmp_path / "artifact"), DataOptions(data="patterns"), morph=True)


def test_a_comparison_moves_the_conversions_and_leaves_the_original(tmp_path):
    data: Data = images()
    found = compare(
        plain_net,
        data,
        variants("cosine", {"radius": 1.0}),
        settings(epochs=2),
        output=tmp_path,
    )
    assert [[epoch.morph for epoch in runs.results[0].epochs] for runs in found.runs] == [[1.0, 1.0], [1.0, 1.0]]
