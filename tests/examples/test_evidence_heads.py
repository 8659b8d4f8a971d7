"""The comparison of heads: its data, its choice among tries, and the program from end to end."""

import json

import pytest
import torch
from PIL import Image

from examples.evidence import heads, heads_report, heads_runs, work
from examples.evidence.images import whole
from examples.papers.training_images import with_few_images, with_label_noise
from sphereify.class_splits import targets_of
from sphereify.training import Variant
from sphereify.training.variant import build_variant


@pytest.fixture(scope="module")
def digits():
    return whole("digits")


IMAGES = {"train_images": 400, "held_out_images": 200, "share": 0.05}


def test_labels_are_replaced_in_the_share_that_is_asked_for_and_the_same_ones_each_time(digits):
    true = torch.tensor(targets_of(digits.train))
    noisy = with_label_noise(digits, 0.4, seed=3)
    changed = (torch.tensor(targets_of(noisy.train)) != true).float().mean()
    assert changed == pytest.approx(0.4 * 0.9, abs=0.03)  # one of ten keeps its label by chance
    assert targets_of(noisy.train) == targets_of(with_label_noise(digits, 0.4, seed=3).train)
    assert targets_of(noisy.train) != targets_of(with_label_noise(digits, 0.4, seed=4).train)
    assert targets_of(noisy.test) == targets_of(digits.test)
    image, label = noisy.train[5]
    assert torch.equal(image, digits.train[5][0])
    assert label == targets_of(noisy.train)[5]


def test_few_images_are_kept_of_the_classes_that_are_named(digits):
    before = torch.tensor(targets_of(digits.train)).bincount()
    after = torch.tensor(targets_of(with_few_images(digits, ["7", "2"], 0.05).train)).bincount()
    expected = before.clone()
    expected[[7, 2]] = (before[[7, 2]] * 0.05).round().long()
    assert torch.equal(after, expected)
    assert with_few_images(digits, ["7"], 0.0).train[-1] is not None
    assert torch.tensor(targets_of(with_few_images(digits, ["7"], 0.0).train)).bincount()[7] == 1


def test_a_try_of_a_verification_swaps_the_halves(digits):
    (train, held_out), (other, other_held_out) = (
        heads_runs.halves(digits, IMAGES, seed=0, tried=tried) for tried in (False, True)
    )
    assert train.classes == other_held_out.classes == list("01234")
    assert held_out.classes == other.classes == list("56789")
    assert (len(train.train), len(held_out.test)) == (400, 200)


@pytest.mark.parametrize("kind", ["few images", "label noise"])
def test_a_try_is_measured_on_training_images_that_no_run_uses(digits, kind):
    (run, tests), (tried, validation) = (
        heads_runs.SPLITS[kind](digits, IMAGES, seed=0, tried=tried) for tried in (False, True)
    )
    assert len(tests.test) == len(digits.test)
    assert len(validation.test) == 200
    pixels = {image.numpy().tobytes() for image, _ in validation.test}
    trained = {image.numpy().tobytes() for data in (run, tried) for image, _ in data.train}
    assert not pixels & trained
    # What is hard is another thing than in the runs.
    assert targets_of(run.train) != targets_of(tried.train)


def test_nearest_means_are_those_of_the_training_images(digits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    found = heads_runs.nearest_means(model, digits, heads_runs.Network(2, 2, 8, 1, 1e-3, None).settings(0, 0))
    pool = torch.nn.functional.adaptive_avg_pool2d
    known, asked = (
        torch.stack([pool(image, 8).flatten() / pool(image, 8).norm() for image, _ in part])
        for part in (digits.train, digits.test)
    )
    labels, true = (torch.tensor(targets_of(part)) for part in (digits.train, digits.test))
    means = [known[labels == one].mean(0) for one in range(10)]
    cosines = torch.stack([torch.cosine_similarity(asked, mean[None], dim=1) for mean in means], 1)
    for one, share in enumerate(found):
        assert share == pytest.approx((cosines.argmax(1) == one)[true == one].double().mean().item())


def test_the_best_try_is_chosen_when_all_have_finished():
    first, second, third = ({"lr": rate} for rate in (1e-3, 3e-3, 1e-2))
    found = {"goal": 0.5}
    assert heads.choose([(found, first), ({"goal": 0.7}, second), ({"goal": 0.7}, third)]) is second
    assert heads.choose([({"failure": "nan"}, first), (found, second)]) is second
    assert heads.choose([(found, first), (None, second)]) is None
    assert heads.choose([({"failure": "nan"}, first)]) is None


def test_each_head_has_the_same_number_of_tries():
    assert {len(tries) for tries in heads.TRIES.values()} == {heads.CPU.tries}


@pytest.mark.papers
@pytest.mark.parametrize("network", [heads.ALONE, heads.WHOLE])
@pytest.mark.parametrize("head", heads.TRIES)
def test_what_is_angular_is_the_head_alone_or_the_whole_network(network, head):
    numbers = heads.TRIES[head][-1]
    options = heads.options_of(network, head, numbers)
    settings = heads_runs.Network(2, 2, 8, 1, 1e-3, options).settings(0, 0)
    model = build_variant(lambda: heads_runs.small(10, 1, 2), Variant("", options), settings)
    angular = [d.name for d in model.conversion_plan.converted] if options else []
    assert len(angular) == {heads.ALONE: 0, heads.WHOLE: 6}[network] + (head != heads.SOFTMAX)
    assert all(getattr(model.classifier, name) == value for name, value in numbers.items() if name != "lr")


def test_the_gain_is_that_of_equal_seeds_and_positive_where_a_head_is_better():
    def row(head, shares):
        found = {seed: {"EER": eer, "goal": -eer} for seed, eer in enumerate(shares)}
        return {"network": "head alone", "head": head, "numbers": {"lr": 1e-3}, "seeds": found}

    rows = [row("softmax", [0.3, 0.4]), row("cosface", [0.28, 0.36])]
    told = heads_report.tables({"verification": {"rows": rows}}, 2, 1.0).splitlines()
    assert told[-2] == "| nothing | softmax | lr 0.001 | 35.0 ± 7.1 |  |"
    assert told[-1] == "| head alone | cosface | lr 0.001 | 32.0 ± 5.7 | +3.0 ± 1.4 |"


def test_what_was_asked_for_otherwise_is_done_again(tmp_path, capsys):
    args = type("Args", (), {"data": "digits", "output": tmp_path, "jobs": 1, "report": False})()

    def once(number):
        piece = work.Piece("a / b", _counted, {"number": number})
        return work.complete([piece], args)

    _counted.calls = 0
    assert once(1) == once(1) == {"a / b": {"number": 1}}
    assert _counted.calls == 1
    args.report = True
    assert once(2) == {}
    args.report = False
    assert once(2) == {"a / b": {"number": 2}}
    args.data = "others"
    once(2)
    assert _counted.calls == 3


def _counted(data, folder, number):
    _counted.calls += 1
    return {"number": number}


@pytest.mark.papers
def test_heads_are_compared_once_and_reported_without_training(tmp_path, monkeypatch):
    given = ["--quick", "--data", "digits", "-o", str(tmp_path)]
    heads.main([*given, "--report"])
    assert (tmp_path / "table.md").read_text().count("No result yet.") == 3
    heads.main([*given, "--panels", "verification"])
    heads.main([*given, "--jobs", "2"])
    table = (tmp_path / "table.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("###")] == [
        "### verification", "### few images", "### label noise 0.4",
    ]  # fmt: skip
    panels = json.loads((tmp_path / "results.json").read_text())["panels"]
    for panel in panels.values():
        assert [(row["network"], row["head"]) for row in panel["rows"]] == [
            ("head alone", "softmax"), ("head alone", "cosface"), ("whole network", "w-softmax"),
        ]  # fmt: skip
        assert len(panel["tries"]) == 3 * heads.QUICK.tries
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 500
    monkeypatch.setattr(heads_runs, "train_once", None)
    heads.main(given)
    heads.main([*given, "--report"])
    assert (tmp_path / "table.md").read_text() == table
