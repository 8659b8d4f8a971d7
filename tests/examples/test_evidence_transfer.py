"""Fine-tuning of networks that came trained: the classes and images of the tasks, and the program from end to end."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.plain_networks import ResNet20
from examples.evidence import transfer, transfer_runs
from examples.evidence.images import whole
from sphereify.class_splits import targets_of
from tests.examples.colours import write_pictures

IMAGES = {"images": 50, "tried_images": 40, "test_images": 60}


def test_a_task_has_other_classes_than_those_before_or_all_of_them():
    data = whole("digits")
    assert transfer_runs.classes_of(transfer.OTHER, data, before=True) == list("01234")
    other, same = (
        transfer_runs.task_data("digits", task=task, seed=0, tried=False, **IMAGES) for task in transfer.TASKS
    )
    assert (other.classes, same.classes) == (list("56789"), list("0123456789"))
    assert (len(other.train), len(other.test)) == (50, 60)
    assert set(targets_of(other.train)) == set(range(5))


def test_rates_are_tried_on_other_test_images_and_seeds_draw_other_training_images():
    def images(part):
        return {image.numpy().tobytes() for image, _ in part}

    tries, first, second = (
        transfer_runs.task_data("digits", task=transfer.SAME, seed=seed, tried=tried, **IMAGES)
        for seed, tried in ((1_000, True), (0, False), (1, False))
    )
    assert not images(tries.test) & images(first.test)
    assert images(first.test) == images(second.test)
    assert images(first.train) != images(second.train)
    assert first.name != second.name != tries.name


def test_a_network_for_other_classes_keeps_all_but_its_classifier(tmp_path):
    torch.manual_seed(0)
    known = ResNet20(3)
    torch.save(known.state_dict(), tmp_path / "known.pt")
    other = transfer_runs._starting(tmp_path / "known.pt", 3, 3, new_classifier=True)
    same = transfer_runs._starting(tmp_path / "known.pt", 3, 3, new_classifier=False)
    for name, value in known.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
        assert torch.equal(other.state_dict()[name], value) != name.startswith("fc.")


def test_the_best_rate_is_chosen_when_all_have_been_tried():
    found = [({"accuracies": [0.9, 0.5]}, 0.01), ({"accuracies": [0.1, 0.6]}, 0.03), ({"accuracies": [0.6]}, 0.1)]
    assert transfer.best(found) == 0.03
    assert transfer.best([*found, (None, 0.3)]) is None
    assert transfer.best([({"failure": "nan"}, 0.1), found[0]]) == 0.01
    assert transfer.best([({"failure": "nan"}, 0.1)]) is None


def test_runs_that_are_missing_are_told_apart_from_those_that_failed():
    scale = transfer.replace(transfer.CPU, points=(1, 2))
    runs = {0: {"accuracies": [0.5, 0.6]}, 1: {"failure": "nan"}}
    row = {"task": transfer.SAME, "variant": transfer.ORIGINAL, "rate": 0.01, "seeds": runs}
    told = transfer._table([row], scale, 1.0)
    assert f"| {transfer.SAME} | original (2 of 3 seeds) (1 not converged) | 0.01 | 50.0 | 60.0 |" in told


@pytest.mark.papers
def test_networks_are_transferred_once_and_reported_without_training(tmp_path, monkeypatch):
    photos, output = write_pictures(tmp_path / "photos"), tmp_path / "out"
    given = ["--quick", "--data", str(photos), "-o", str(output)]
    transfer.main([*given, "--report"])
    assert "No result yet." in (output / "table.md").read_text()
    followed = []
    once = transfer_runs.train_once

    def train_once(*args, teacher=None, **options):
        followed.append(teacher)
        return once(*args, teacher=teacher, **options)

    monkeypatch.setattr(transfer_runs, "train_once", train_once)
    transfer.main(given)
    teachers = [teacher for teacher in followed if teacher is not None]
    assert len(teachers) == sum(map(len, transfer.QUICK.rates.values())) + 2 * transfer.QUICK.seeds
    assert {teacher.fc.out_features for teacher in teachers} == {2, 4}
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [(row["task"], row["variant"]) for row in rows] == [
        (task, variant)
        for task in transfer.TASKS
        for variant in (transfer.ORIGINAL, transfer.CONVERTED, transfer.TAUGHT)
    ]
    assert all(len(row["seeds"]["0"]["accuracies"]) == transfer.QUICK.epochs for row in rows)
    with Image.open(output / "figure.png") as image:
        assert image.width > 500
    table = (output / "table.md").read_text()
    monkeypatch.setattr(transfer_runs, "train_once", None)
    transfer.main(given)
    transfer.main([*given, "--report"])
    assert (output / "table.md").read_text() == table
