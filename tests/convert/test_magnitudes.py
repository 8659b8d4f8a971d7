"""Magnitudes in conversions: options, plans, start values, artifacts and folding."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import ConversionOptions, ConversionPlan, apply_plan, fold, load, plan_conversion, save, sphereify
from sphereify.cli.options import parse_override
from sphereify.errors import UsageError
from sphereify.nn import Magnitude
from tests.deployment.networks import assert_same, scrambled


class Net(nn.Module):
    """Convolutions with and without a normalization, in groups, a functional call, and a linear map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mix = nn.Parameter(torch.randn(6, 8))
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.grouped(x)).mean((2, 3))
        x = F.relu(F.linear(x, self.mix))
        return self.head(F.relu(self.hidden(x)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def network() -> Net:
    torch.manual_seed(1)
    net = Net()
    for _ in range(3):
        net(3 * X)
    return net.eval()


def test_weighted_linear_cosine_is_the_original_to_the_last_digit_in_both_modes():
    net = network()
    model = sphereify(net, magnitude="linear", weighted=True, operator="cosine", head="keep")
    assert len(model.conversion_plan.converted) == 4
    assert not any(decision.rescale for decision in model.conversion_plan.converted)
    assert torch.equal(model(X), net(X))
    assert torch.equal(model.train()(X), net.train()(X))
    assert torch.equal(model.norm.running_var, net.norm.running_var)


def test_a_fresh_network_stays_itself_as_well():
    torch.manual_seed(0)
    net = Net().eval()
    model = sphereify(net, magnitude="linear", weighted=True, head="keep")
    assert torch.equal(model(X), net(X))


def test_a_plan_says_it_and_goes_to_json_and_back():
    plan = plan_conversion(
        network(),
        magnitude="tanh",
        magnitude_radius=2.0,
        learn_magnitude_radius=True,
        overrides={"grouped": {"magnitude": "segment", "magnitude_beta": 0.1}, "stem": {"weighted": True}},
    )
    by_name = {decision.name: decision for decision in plan.converted}
    assert by_name["stem"].magnitude == Magnitude("tanh", weighted=True, radius=2.0, learned=True)
    assert by_name["grouped"].magnitude == Magnitude("segment", beta=0.1)
    for name in ("mix", "hidden"):
        assert by_name[name].magnitude == Magnitude("tanh", radius=2.0, learned=True, mean="data")
        assert "ρ of its magnitude is relative to the data" in by_name[name].reason
    assert by_name["head"].magnitude is None
    assert ConversionPlan.from_json(plan.to_json()) == plan
    assert "weighted tanh ρ=2 learned" in str(plan)
    model = apply_plan(network(), plan)
    assert model.stem.magnitude == by_name["stem"].magnitude
    assert model.stem.log_magnitude_radius.shape == (8,)
    assert model(X).isfinite().all()


def test_the_papers_layers_leave_plans_and_states_as_they_were():
    plan = plan_conversion(network())
    assert '"magnitude"' not in plan.to_json()
    assert all(decision.magnitude is None for decision in plan.decisions)
    assert not any("magnitude" in name or "mean_norm" in name for name in sphereify(network()).state_dict())


def test_causal_convolutions_do_not_look_ahead():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3)

        def forward(self, x):
            x = F.relu(self.first(F.pad(x, (2, 0))))
            return F.relu(self.second(F.pad(x, (2, 0))))

    model = sphereify(Causal(), magnitude="tanh", example_inputs=torch.randn(2, 2, 12)).eval()
    assert all(d.magnitude.mean == "data" for d in model.conversion_plan.converted)
    model.train()(torch.randn(2, 2, 12))
    x = torch.randn(1, 2, 12)
    later = x.clone()
    later[..., 8:] = 0
    torch.testing.assert_close(model.eval()(x)[..., :8], model(later)[..., :8])


@pytest.mark.parametrize("form", ["ball", "tanh", "linear", "segment", "log", "mix"])
@pytest.mark.parametrize("weighted", [False, True])
def test_copied_weights_start_near_the_scale_of_the_original(form, weighted):
    net = network()
    model = sphereify(net, magnitude=form, weighted=weighted, head="keep")
    seen, expected = [], []
    for one, outputs in ((model, seen), (net, expected)):
        hook = one.norm.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
        one(X)
        hook.remove()
    assert 0.2 < float((seen[0].std() / expected[0].std()).detach()) < 5


@pytest.mark.parametrize(
    ("form", "weighted", "folds"),
    [
        ("sphere", True, True),
        ("linear", False, True),
        ("linear", True, True),
        ("tanh", False, False),
        ("segment", True, False),
    ],
)
def test_it_is_folded_where_it_is_a_constant_and_left_with_the_reason_where_not(form, weighted, folds):
    model = scrambled(sphereify(network(), magnitude=form, weighted=weighted))
    folded = fold(model, X)
    assert_same(folded, model, X)
    assert ("stem" in folded.folding.layers) is folds
    if not folds:
        assert folded.folding.left["stem"] == f"its magnitude ({form}) depends on the length of each patch"
        assert "norm" not in folded.folding.layers.values()
    if form == "linear":
        assert folded.stem.curve == "plain"


def test_an_artifact_keeps_it(tmp_path):
    model = sphereify(network(), magnitude="log", magnitude_radius=1.0, magnitude_mean="data", weighted=True)
    model.train()(X)
    model = scrambled(model)
    save(model, tmp_path / "artifact")
    read = load(tmp_path / "artifact", factory=Net)
    assert torch.equal(read(X), model(X))
    assert read.conversion_plan == model.conversion_plan
    save(fold(model), tmp_path / "folded")
    torch.testing.assert_close(load(tmp_path / "folded", factory=Net)(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("form", ["ball", "tanh", "linear", "segment", "log", "mix"])
def test_it_is_exported(form, tmp_path):
    from sphereify import export

    model = scrambled(sphereify(network(), magnitude=form, weighted=True, operator="linear"))
    export(model, tmp_path / "model.onnx", X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magnitude": "bal"}, "magnitude: got 'bal', expected one of sphere, ball"),
        ({"magnitude": "tanh", "magnitude_radius": 0}, "magnitude_radius: got 0, expected a number above 0"),
        ({"magnitude": "linear", "magnitude_radius": 1}, "magnitude='linear' has no ρ"),
        ({"magnitude": "tanh", "magnitude_beta": 1}, "magnitude_beta: tanh has no β"),
        ({"learn_magnitude_radius": True}, "learn_magnitude_radius: magnitude='sphere' has no ρ"),
        ({"overrides": {"stem": {"magnitude": "bal"}}}, r"overrides\['stem'\]: magnitude: got 'bal'"),
        ({"overrides": {"stem": {"magnitude_radius": -1.0}}}, r"overrides\['stem'\]: magnitude_radius: got -1.0"),
        ({"overrides": {"stem": {"weighted": "yes"}}}, r"overrides\['stem'\]: weighted: got 'yes'"),
        ({"overrides": {"stem": {"magnitude_radius": 1.0}}}, "overrides: stem: magnitude_radius: magnitude='sphere'"),
    ],
)
def test_bad_input_is_one_clear_error(options, message):
    with pytest.raises(UsageError, match=message):
        plan_conversion(network(), **options)


def test_options_go_to_json_and_overrides_come_from_the_command_line():
    pattern, setting = parse_override("stem=magnitude:tanh,weighted:true,magnitude_radius:0.5,magnitude_beta:1")
    assert (pattern, setting) == (
        "stem",
        {"magnitude": "tanh", "weighted": True, "magnitude_radius": 0.5, "magnitude_beta": 1.0},
    )
    with pytest.raises(UsageError, match="--override: weighted: got 'maybe', expected true or false"):
        parse_override("stem=weighted:maybe")
    options = ConversionOptions(magnitude="Tanh", magnitude_mean="DATA", weighted=True)
    assert json.loads(options.to_json())["magnitude"] == "tanh"
    assert ConversionOptions.from_json(options.to_json()) == options
    assert copy.deepcopy(options) == options


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_networks_of_timm_stay_themselves_to_the_last_digit(name):
    torch.manual_seed(0)
    net, x = timm.create_model(name).eval(), torch.randn(2, 3, 160, 160)
    model = sphereify(net, magnitude="linear", weighted=True, head="keep").eval()
    assert len(model.conversion_plan.converted) > 10
    with torch.no_grad():
        assert torch.equal(model(x), net(x))
