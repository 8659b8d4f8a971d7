"""What a plain network has learned is kept where a training begins: by a calibration on plain training images."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sphereify import save, sphereify
from sphereify.convert.options import ConversionOptions
from sphereify.datasets import load_data
from sphereify.errors import DataError, NoEffectError, UsageError
from sphereify.models import SourceOptions, open_model
from sphereify.nn import AngularHead
from sphereify.training import DataOptions, Variant, compare
from sphereify.training.knowledge import ALL, FEATURES, NOTHING, keep_knowledge, open_plain, with_radius
from sphereify.training.recipe import GENTLE_RADIUS
from sphereify.training.start import start
from tests.training.small import usual

HERE = "tests.training.test_knowledge"
EIGHT = {"img_size": 8}


def small(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """A network whose features vary enough to tell a calibration from copied weights."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, num_classes),
    )


@pytest.fixture
def weights(tmp_path: Path):
    """Writes the checkpoint of a network with statistics of its own, for a number of classes; returns the network."""

    def write(classes: int = 10) -> tuple[Path, nn.Module]:
        torch.manual_seed(7)
        model = small(classes)
        model.train()(load_data("digits", channels=1, **EIGHT).train.tensors[0][:200])
        nn.init.normal_(model[6].weight, std=0.5)
        torch.save(model.state_dict(), tmp_path / f"{classes}.pt")
        return tmp_path / f"{classes}.pt", model.eval()

    return write


def begin(file: Path | None, count: int = 1024, **conversion):
    source = SourceOptions(weights=file, in_chans=1)
    options = ConversionOptions(**conversion)
    return start(f"{HERE}:small", DataOptions("digits", **EIGHT), source=source, conversion=options,
                 calibration_images=count)  # fmt: skip


def explained(features: Tensor, original: Tensor) -> float:
    return float(1 - (features - original).square().sum() / (original - original.mean(0)).square().sum())


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_a_network_with_trained_weights_begins_with_what_it_knows(weights, radius):
    file, original = weights()
    kept, copied = begin(file, radius=radius), begin(file, count=0, radius=radius)
    images, _ = kept.data.test.tensors
    with torch.no_grad():
        answers, *others = (model.eval()(images).argmax(1) for model in (original, kept.model, copied.model))
        agreements = [float((answers == answer).float().mean()) for answer in others]
        features = original[:5](images)
        assert explained(kept.model[:5](images), features) > 0.8
    assert agreements[0] > max(0.8, agreements[1])
    assert kept.model[0].radius == radius
    assert kept.kept.startswith("kept what was learned, on 1,024 training images without labels: 3 layers calibrated")
    assert "classifier is new" not in kept.kept
    assert copied.kept is None
    assert torch.equal(copied.model[0].weight, original[0].weight)


def test_features_are_kept_where_the_classes_are_new_and_the_head_stays_new(weights):
    file, original = weights(classes=4)
    kept, copied = begin(file), begin(file, count=0)
    images = kept.data.test.tensors[0]
    assert isinstance(kept.model[6], AngularHead)
    assert torch.equal(kept.model[6].weight, copied.model[6].weight)
    with torch.no_grad():
        features = original[:5](images)
        assert explained(kept.model[:5].eval()(images), features) > 0.8
        assert explained(copied.model[:5].eval()(images), features) < 0.5
    assert kept.kept.endswith("; the classifier is new")
    assert "2 layers calibrated" in kept.kept


def test_a_network_without_trained_weights_is_converted_as_it_is():
    begun = begin(None)
    assert begun.kept is None
    torch.manual_seed(0)
    assert torch.equal(begun.model[0].weight, small()[0].weight)


def test_how_much_was_trained_is_told_from_the_source_of_the_weights(weights, monkeypatch):
    assert open_plain(f"{HERE}:small", SourceOptions(), 10)[1] == NOTHING
    assert open_plain(f"{HERE}:small", SourceOptions(weights=weights(10)[0]), 10)[1] == ALL
    four = SourceOptions(weights=weights(4)[0], num_classes=10)
    model, learned = open_plain(f"{HERE}:small", four, 10)
    assert learned == FEATURES
    torch.manual_seed(0)
    assert torch.equal(model[6].weight, open_model(f"{HERE}:small", SourceOptions(num_classes=10))[6].weight)
    assert torch.equal(model[0].weight, weights(4)[1][0].weight)

    def pretrained(spec, options):
        model = small()
        model.pretrained_cfg = {"num_classes": 10}
        return model

    monkeypatch.setattr("sphereify.training.knowledge.open_model", pretrained)
    for classes, expected in ((10, ALL), (4, FEATURES)):
        assert open_plain("any", SourceOptions(pretrained=True), classes)[1] == expected


def test_an_original_with_a_new_classifier_is_no_teacher_and_is_refused_before_the_calibration(weights, monkeypatch):
    monkeypatch.setattr("sphereify.training.start.keep_knowledge", pytest.fail)
    source = SourceOptions(weights=weights(4)[0], in_chans=1)
    with pytest.raises(
        UsageError, match=r"teacher='original': .*4\.pt has other classes than the data, so its classif"
    ):
        start(f"{HERE}:small", DataOptions("digits", **EIGHT), source=source, teacher="original")
    source = SourceOptions(weights=weights(4)[0], in_chans=1, num_classes=4)
    with pytest.raises(DataError, match="the model has 4 classes, digits has 10"):
        start(f"{HERE}:small", DataOptions("digits", **EIGHT), source=source)


def test_a_number_of_images_below_zero_is_refused(weights):
    with pytest.raises(UsageError, match="calibration_images: got -1, expected a number of at least 0"):
        begin(weights()[0], count=-1)


def trained_small() -> nn.Module:
    model = small()
    model.load_state_dict(torch.load("10.pt", weights_only=True))
    return model


@pytest.mark.exhaustive
def test_a_comparison_calibrates_its_conversions_once_and_leaves_the_original(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, original = weights()
    data, lines, calls = load_data("digits", channels=1, train_images=64, test_images=40, **EIGHT), [], []

    def counted(model, plain, *others, **options):
        calls.append(options["images"])
        torch.testing.assert_close(plain.state_dict(), original.state_dict())
        assert isinstance(model[6], AngularHead)
        return keep_knowledge(model, plain, *others, **options)

    monkeypatch.setattr("sphereify.training.variant_runs.keep_knowledge", counted)
    networks = [Variant("original", None), Variant("cosine", {})]

    def compared(**options):
        return compare(trained_small, data, networks, usual(epochs=1, lr=1e-9, batch_size=32), output="runs",
                       on_calibration=lines.append, **options)  # fmt: skip

    compared(learned="all", calibration_images=50)
    assert calls == [50]
    assert len(lines) == 1
    compared(learned="all", calibration_images=50)
    assert calls == [50]
    with pytest.raises(UsageError, match="holds a run with another calibration_images"):
        compared(learned="all", calibration_images=40)
    with pytest.raises(UsageError, match="learned: got 'some', expected"):
        compared(learned="some")


@pytest.mark.exhaustive
def test_a_comparison_under_corruptions_has_the_rival_of_the_original(tmp_path):
    data = load_data("digits", channels=1, train_images=64, test_images=30, **EIGHT)
    networks = [Variant("original", None), Variant("cosine", {})]
    found = compare(small, data, networks, usual(epochs=1, batch_size=32), output=tmp_path, seeds=2, corruptions=True)
    rival = "original, contrast standardised"
    assert [list(one.networks) for one in found.robustness] == 2 * [["original", "cosine", rival]]
    assert found.columns()[:3] == ["", "test accuracy, %", "under corruptions, %"]
    assert [row[0] for row in found.rows()] == ["original", rival, "cosine"]
    assert all(len(row) == len(found.columns()) for row in found.rows())
    for row in found.rows():
        assert float(row[2].split(" ± ")[0]) == pytest.approx(
            50 * sum(one.networks[row[0]].mean for one in found.robustness), abs=0.005
        )
    assert found.runs[1].accuracies == [one.networks["cosine"].clean for one in found.robustness]
    assert "robustness" in (tmp_path / "comparison.json").read_text()


def test_an_artifact_that_was_calibrated_or_trained_is_trained_gently(weights, tmp_path):
    begun = begin(weights()[0])
    assert begun.trained
    assert {d.radius for d in begun.model.conversion_plan.converted if d.kind == "conv2d"} == {GENTLE_RADIUS}
    for folder, model, record in (
        ("calibrated", begun.model, None),
        ("copied", sphereify(small()), None),
        ("trained", sphereify(small()), {"data": "digits"}),
    ):
        saved = save(model, tmp_path / folder, training=record)
        options = SourceOptions(factory=f"{HERE}:small")
        assert start(str(saved), DataOptions("digits", **EIGHT), source=options).trained is (folder != "copied")


def test_a_trained_network_gets_a_radius_where_a_convolution_may_pool():
    pooling = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    assert with_radius(pooling, {"operator": "linear"}) == {"operator": "linear", "radius": GENTLE_RADIUS}
    assert with_radius(pooling, {"radius": 0.0}) == {"radius": 0.0}
    linear = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert with_radius(linear, {"radius": None}) == {"radius": None}


def test_another_option_without_effect_is_not_taken_for_the_radius():
    pooling = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 2))
    with pytest.raises(NoEffectError, match="margin: has no effect on head='w-softmax'"):
        with_radius(pooling, {"head": "w-softmax", "margin": 3.0})
