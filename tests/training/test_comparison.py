"""Comparisons: networks are trained alike, each once, and told apart."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sphereify.datasets import Data
from sphereify.errors import UsageError
from sphereify.training import Terms, Variant, accuracy, compare, train_once, trained, variants
from sphereify.training.run_folder import RunFolder
from tests.training.small import (
    images,
    linear_net,
    usual,
)


def both(**options) -> list[Variant]:
    return [Variant("plain", None), Variant("cosine", options)]


def test_each_seed_begins_with_weights_of_its_own(tmp_path):
    compare(linear_net, images(), both(), usual(epochs=1, lr=1e-12), output=tmp_path, seeds=2)
    first, second = (load_file(tmp_path / f"plain-seed{i}" / "last.safetensors") for i in (0, 1))
    assert (first["1.weight"] - second["1.weight"]).abs().max() > 0.01


def test_runs_of_something_else_are_not_taken_for_finished(tmp_path):
    def compared(build=linear_net, data=None, **settings):
        return compare(build, data or images(), both(), usual(epochs=1, **settings), output=tmp_path)

    before = compared()
    assert compared(workers=1).markdown() == before.markdown()
    with pytest.raises(UsageError, match="holds a run with another model; take another output"):
        compared(build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False)))
    with pytest.raises(UsageError, match="holds a run with another lr;"):
        compared(lr=0.5)
    others = Data("others", images().train, images().test, images().classes, images().image_size)
    with pytest.raises(UsageError, match="holds a run with another data;"):
        compared(data=others)


@pytest.mark.parametrize("variant", both())
def test_a_variant_is_trained_once_and_found_again(tmp_path, variant):
    heard = []
    data, settings = images(), usual(epochs=2)
    results = [
        train_once(linear_net, data, variant, settings, output=tmp_path / "run", on_step=heard.append) for _ in range(2)
    ]
    assert [len(result.epochs) for result in results] == [2, 2]
    assert results[0].accuracy == results[1].accuracy
    assert len(heard) == heard[-1].steps  # of the first time only
    shutil.rmtree(tmp_path / "run" / "best", ignore_errors=True)  # it is the last one that counts
    (tmp_path / "run" / "best.safetensors").unlink(missing_ok=True)
    model = trained(linear_net, variant, tmp_path / "run")
    assert accuracy(model, DataLoader(data.test, 5)) == results[0].accuracy
    assert hasattr(model, "conversion_plan") == (variant.options is not None)


def power(exponent: int):
    return lambda cos: cos**exponent


class Power:
    def __init__(self, exponent: int):
        self.exponent = exponent

    def __call__(self, cos):
        return cos**self.exponent


@pytest.mark.parametrize("made", [power, Power])
def test_an_operator_object_is_known_by_what_it_computes_and_not_by_its_address(tmp_path, made):
    heard, operators = [], [made(3), made(3), made(5)]

    def run(operator):
        variant = Variant("own", {"operator": operator, "overrides": {"1": {"operator": operator}}})
        return train_once(linear_net, images(), variant, usual(epochs=1), output=tmp_path, on_step=heard.append)

    first = run(operators[0])
    steps = len(heard)
    assert repr(operators[0]) != repr(operators[1])
    assert run(operators[1]).epochs == first.epochs
    assert len(heard) == steps
    with pytest.raises(UsageError, match="holds a run with another operator;"):
        run(operators[2])


def grey_images() -> Data:
    """The first channel of `images`, with a normalization, so that they can be corrupted."""
    data = images()
    train, test = (TensorDataset(part.tensors[0][:, :1], part.tensors[1]) for part in (data.train, data.test))
    return Data("grey", train, test, data.classes, (1, 6, 6), mean=(0.0,), std=(1.0,))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("made", [power, Power])
def test_networks_with_operator_objects_are_tested_on_corrupted_images_and_verified(tmp_path, made):
    data = grey_images()
    own = Variant("own", {"operator": made(3), "overrides": {"3": {"operator": made(5)}}})
    tests = {"corruptions": True, "held_out": data}
    compared = compare(two_layers, data, [Variant("plain", None), own], usual(epochs=1), output=tmp_path, **tests)
    assert compared.robustness[0].networks["own"].clean == compared.runs[1].accuracies[0]
    assert set(compared.verification[0]) == {"plain", "own"}
    network = trained(two_layers, own, tmp_path / "own-seed0")
    powers = [layer.operator(torch.tensor(2.0)) for layer in network.modules() if hasattr(layer, "operator")]
    assert powers == [2**3, 2**5]


def test_the_identity_of_options_without_objects_is_their_repr(tmp_path):
    options = {"operator": "sigmoid", "k": 0.3, "overrides": {"1": {"k": 0.5}}}
    train_once(linear_net, images(), Variant("own", options), usual(epochs=1), output=tmp_path)
    identity = json.loads(RunFolder(tmp_path).variant.read_text())
    assert identity["conversion"] == repr(options)
    assert "operator" not in identity


def test_a_run_follows_its_teacher_and_is_no_run_without_one_or_with_another(tmp_path):
    def run(place, teacher=None):
        return train_once(linear_net, images(), both()[1], usual(epochs=1), output=tmp_path / place, teacher=teacher)

    torch.manual_seed(1)
    teacher, another = linear_net().eval(), linear_net().eval()
    assert run("taught", teacher).epochs[0].loss != run("alone").epochs[0].loss
    assert run("taught", teacher).epochs[0].loss == run("taught", teacher).epochs[0].loss
    for other in (another, None):
        with pytest.raises(UsageError, match="holds a run with another teacher;"):
            run("taught", other)
    with pytest.raises(UsageError, match="holds a run with another teacher;"):
        run("alone", teacher)


@pytest.mark.parametrize(
    ("variants", "settings", "reach", "text"),
    [
        (both(operator="cosin"), {}, None, "operator: got 'cosin'"),
        (
            both(head="w-softmax"),
            {"terms": Terms(sampled_classes=0.5)},
            None,
            "sampled_classes=0.5: needs a head with a margin, such as head='cosface'",
        ),
        (both(head="arcface"), {"morph": 0.5}, None, "morph: the head is arcface, whose margin"),
        (both(), {"terms": Terms(mhe=1, mhe_energy="compressive", mhe_dimensions=99)}, None, "mhe_dimensions=99"),
        (both(), {}, 95, "reach: got 95, expected an accuracy above 0 and at most 1"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_trained(tmp_path, variants, settings, reach, text):
    with pytest.raises(UsageError, match=text):
        compare(linear_net, images(), variants, usual(epochs=1, **settings), output=tmp_path, reach=reach)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_classes_are_sampled_where_a_head_has_a_margin_and_the_original_computes_all(tmp_path):
    settings = usual(epochs=1, terms=Terms(sampled_classes=0.5))
    compare(linear_net, images(), both(head="arcface"), settings, output=tmp_path)
    files = {name: tmp_path / f"{name}-seed0" / "variant.json" for name in ("plain", "cosine")}
    sampled = {name: json.loads(file.read_text())["terms"]["sampled_classes"] for name, file in files.items()}
    assert sampled == {"plain": None, "cosine": 0.5}


@pytest.mark.usefixtures("pictures")
def test_the_table_of_a_comparison_is_what_the_runs_gave(tmp_path):
    found = compare(linear_net, images(), both(), usual(epochs=2), output=tmp_path, seeds=2)
    written = json.loads((tmp_path / "comparison.json").read_text())
    for runs in found.runs:
        accuracies = [run[-1]["accuracy"] for run in written["runs"][runs.name]]
        assert runs.mean == pytest.approx(sum(accuracies) / 2)
        assert runs.deviation == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert found.columns() == ["", "test accuracy, %", f"steps to {found.reach:.1%}", "images/s", "ratio"]
    assert (tmp_path / "comparison.md").read_text() == found.markdown()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_variants_of_some_operators_share_their_options():
    first, *others = variants(["Learnable_Sigmoid", "linear"], {"head": "keep", "operator": "cosine"})
    assert (first.name, first.options) == ("original", None)
    assert [variant.name for variant in others] == ["learnable-sigmoid", "linear"]
    assert [variant.options for variant in others] == [
        {"head": "keep", "operator": "learnable-sigmoid"},
        {"head": "keep", "operator": "linear"},
    ]
    assert variants("linear, cosine,") == variants(["linear", "cosine"])
    for nothing in ("", " , ", []):
        with pytest.raises(UsageError, match="operators: got none, expected some of linear, cosine"):
            variants(nothing)
