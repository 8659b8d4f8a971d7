"""The programs on evidence run, finish what was begun, report what there is, and say what they found."""

import itertools
import json
import os
import pickle
import signal
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import plain_networks
from benchmarks.plain_networks import ResNet20
from examples.evidence import all as every
from examples.evidence import contrast, depth, networks, work
from examples.papers import all as programs
from examples.papers import cells, plain_cnn, results
from examples.papers.results import Outcome
from sphereify import plots
from sphereify.datasets import load_data
from sphereify.training import Objective
from sphereify.training.corruptions import CORRUPTIONS
from sphereify.training.variant import build_variant
from tests.examples.test_papers import photos, table  # noqa: F401  a fixture

PROGRAMS = ("contrast", "small_batches", "depth", "operators", "energy")


def cells_of(program, scale, tmp_path=Path("nowhere")):
    further = {"plain": tmp_path} if program is contrast else {}
    return program.cells(scale, **further)


@pytest.mark.papers
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_each_network_once_and_reports_it(tmp_path, photos, name, monkeypatch, capsys):  # noqa: F811
    program = import_module(f"examples.evidence.{name}")
    given = ["--quick", "--data", str(photos), "-o", str(tmp_path)]
    if program is contrast:
        torch.manual_seed(0)
        torch.save(ResNet20().state_dict(), tmp_path / "resnet20.pt")
        given += ["--plain", str(tmp_path)]
    program.main(given)
    results = json.loads((tmp_path / "results.json").read_text())["cells"]
    found = cells_of(program, program.EXPERIMENT.quick, tmp_path)
    assert list(results) == [cell.name for cell in found]
    for outcomes in results.values():
        assert [outcome["seed"] for outcome in outcomes] == [0]
        assert [point["step"] for point in outcomes[0]["curve"]] == [1, 2]
    rows = table(tmp_path / "table.md")
    assert len(rows) == (len(depth.NETWORKS) if program is depth else len(found))
    pictures = ["figure.png", *(["second.png", "third.png"] if program is contrast else [])]
    for picture in pictures:
        with Image.open(tmp_path / picture) as image:
            assert image.width > 500
    assert f"table.md, {', '.join(pictures)}, results.json" in capsys.readouterr().err
    monkeypatch.setattr(cells, "train_once", None)  # what has finished is neither trained nor tested again
    monkeypatch.setattr(cells, "evaluate", None)
    for more in ([], ["--report"]):
        program.main([*given, *more])
        assert json.loads((tmp_path / "results.json").read_text())["cells"] == results
        assert table(tmp_path / "table.md") == rows


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_report_of_nothing_says_so_and_draws_nothing(tmp_path, name, capsys):
    program = import_module(f"examples.evidence.{name}")
    further = ["--plain", str(tmp_path)] if program is contrast else []
    program.main(["--quick", "--report", "--data", "photos", "-o", str(tmp_path), *further])
    told = capsys.readouterr()
    assert told.out == (tmp_path / "table.md").read_text() == "No result yet.\n"
    assert told.err.endswith(f"written: {tmp_path}/table.md, results.json\n")
    assert told.err.count("\n") == 1 + (program is contrast)
    assert {file.name for file in tmp_path.iterdir()} == {"table.md", "results.json"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_networks_have_names_of_their_own_at_every_scale(name, tmp_path):
    program = import_module(f"examples.evidence.{name}")
    for scale in (program.EXPERIMENT.full, program.EXPERIMENT.cpu, program.EXPERIMENT.quick):
        found = cells_of(program, scale, tmp_path)
        names = [cell.name for cell in found]
        assert len(set(names)) == len(names) > 0
        assert all(scale.settings(cell, 0, 0).epochs == min(scale.tests, scale.iterations) for cell in found)


@pytest.mark.papers
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_kind_of_network_has_a_loss_with_a_gradient(name):
    program = import_module(f"examples.evidence.{name}")
    scale = replace(program.EXPERIMENT.full, width=1 / 32)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    for cell in {repr((cell.options, cell.terms)): cell for cell in cells_of(program, scale)}.values():
        settings = scale.settings(cell, 0, 0)
        network = build_variant(cells.Builder(cell, 10), cell.variant, settings).train()
        Objective(network, settings.terms)(network(images), targets).backward()
        assert all(p.grad.isfinite().all() for p in network.parameters()), cell.name


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_trains_in_another_process_can_be_pickled(name, tmp_path):
    program = import_module(f"examples.evidence.{name}")
    (tmp_path / "resnet20.pt").touch()
    found = cells_of(program, program.EXPERIMENT.cpu, tmp_path)
    assert [cell.name for cell in pickle.loads(pickle.dumps(found))] == [cell.name for cell in found]


# ---------------------------------------------------------------------------------------------- rates, seeds, reports


class Stub(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes


def outcome(seed: int, accuracy: float | None, last: float = 0.0) -> Outcome:
    curve = [{"step": 1, "accuracy": 0.9, "loss": 1.0}, {"step": 2, "accuracy": last, "loss": 1.0}]
    return Outcome(seed, accuracy, [accuracy or 0.0] * 10, curve if accuracy is not None else [])


def run_with(monkeypatch, experiment, folder, accuracy, *more):
    """Run an experiment whose networks are not trained; returns what would have been, in order."""
    asked = []

    def train(cell, seed, scale, *where):
        asked.append((cell.name, scale.settings(cell, seed, 0).lr, seed))
        return replace(accuracy(cell, seed), seed=seed)

    monkeypatch.setattr(cells, "_train", train)
    monkeypatch.setattr(cells, "plot_panels", lambda *_: None)
    cells.run(experiment, ["--quick", "--data", "photos", "-o", str(folder), *more])
    return asked


def test_the_best_rate_of_the_first_seed_is_that_of_all_seeds(tmp_path, monkeypatch):
    cell = cells.Cell("one", "net", Stub, None, rates=(1e-4, 1e-3, 1e-2))
    fixed = cells.Cell("one", "fixed", Stub, None, settings={"lr": 0.5})
    quick = replace(cells.QUICK, seeds=3, goals=())
    experiment = cells.Experiment("test", "", lambda scale: [cell, fixed], quick=quick)
    # The best accuracy after the training does not decide, nor does the best during the training: the last test does.
    last = {1e-4: 0.3, 1e-3: 0.5, 1e-2: 0.4}

    def accuracy(one, seed):
        rate = one.settings["lr"]
        return replace(outcome(seed, 1 - last.get(rate, 0), last.get(rate, 0)), lr=rate)

    asked = run_with(monkeypatch, experiment, tmp_path, accuracy)
    trials = [(f"one: net, rate {rate:g}", rate, 0) for rate in cell.rates]
    chosen = [("one: net, rate 0.001", 1e-3, seed) for seed in range(3)]
    others = [("one: fixed", 0.5, seed) for seed in range(3)]
    assert asked == [*trials, *itertools.chain(*zip(chosen, others, strict=True))]
    rows = table(tmp_path / "table.md")
    assert rows == {"one: net": ["0.001", "50.00 ± 0.00"], "one: fixed": ["0.5", "100.00 ± 0.00"]}


def test_only_the_networks_that_are_named_are_trained(tmp_path, monkeypatch, capsys):
    three = [cells.Cell("one", name, Stub, None) for name in ("net", "net, wider", "other")]
    experiment = cells.Experiment("test", "", lambda scale: three, quick=replace(cells.QUICK, goals=()))
    found = lambda one, seed: replace(outcome(seed, 0.5), lr=1e-3)  # noqa: E731
    asked = run_with(monkeypatch, experiment, tmp_path, found, "--only", "one: net", "one: other")
    assert [name for name, *_ in asked] == ["one: net", "one: other"]
    assert list(table(tmp_path / "table.md")) == ["one: net", "one: other"]
    for more in ([], ["--report"]):
        with pytest.raises(SystemExit) as ended:
            run_with(monkeypatch, experiment, tmp_path, found, "--only", "one: nets", *more)
        assert ended.value.code == 2
        told = "only: there is no 'one: nets'; there are one: net; one: net, wider; one: other"
        assert told in capsys.readouterr().err


def test_a_name_without_a_rate_is_that_of_the_networks_with_any_rate(tmp_path, monkeypatch):
    rates = [cells.Cell("one", f"{name}{cells.RATE}{rate}", Stub, None) for rate in (1, 2) for name in ("net", "other")]
    experiment = cells.Experiment("test", "", lambda scale: rates, quick=replace(cells.QUICK, goals=()))
    for asked_for, names in {
        "one: net": ["one: net, rate 1", "one: net, rate 2"],
        "one: other, rate 2": ["one: other, rate 2"],
    }.items():
        asked = run_with(monkeypatch, experiment, tmp_path, lambda one, seed: outcome(seed, 0.5), "--only", asked_for)
        assert [name for name, *_ in asked] == names


def test_the_picture_of_all_networks_is_drawn_when_all_have_converged(tmp_path, monkeypatch):
    drawn = []
    two = [cells.Cell("one", name, Stub, None) for name in ("net", "other")]
    draw = lambda network_of, path: drawn.append(path.name)  # noqa: E731
    experiment = cells.Experiment("test", "", lambda scale: two, quick=replace(cells.QUICK, goals=()), draw=draw)
    for accuracy, more, pictures in ((0.5, ["--only", "one: net"], []), (None, [], []), (0.5, [], ["second.png"])):
        run_with(monkeypatch, experiment, tmp_path, lambda one, seed, a=accuracy: outcome(seed, a), *more)
        assert drawn == pictures
        assert (tmp_path / "table.md").is_file()


def test_what_has_finished_is_reported_whatever_is_trained(tmp_path, monkeypatch):
    two = [cells.Cell("one", name, Stub, None) for name in ("net", "other")]
    experiment = cells.Experiment("test", "", lambda scale: two, quick=replace(cells.QUICK, goals=()))
    monkeypatch.setattr(cells, "_finished", lambda cell, *_: outcome(0, 0.3) if cell.label == "other" else None)
    asked = run_with(monkeypatch, experiment, tmp_path, lambda one, seed: outcome(seed, 0.5), "--only", "one: net")
    assert [name for name, *_ in asked] == ["one: net"]
    assert table(tmp_path / "table.md") == {"one: net": ["50.00"], "one: other": ["30.00"]}


def test_an_outcome_is_that_of_the_weights_with_which_it_began(tmp_path):
    files, folders = [tmp_path / f"{name}.pt" for name in ("one", "other", "same")], []
    for file, value in zip(files, (1, 2, 1), strict=True):
        torch.save({"weight": torch.full((2,), value)}, file)
        folders += [cells.folder_of(tmp_path, cells.Cell("one", "net", Stub, None, weights=file))]
    assert folders[0] == folders[2] != folders[1]
    assert folders[0].name.startswith("one-net-")
    torch.save(ResNet20().state_dict(), tmp_path / "resnet20.pt")
    for cell in contrast.cells(cells.CPU, plain=tmp_path):
        assert (cell.weights is not None) == (cell.panel == contrast.TRAINED)


def test_work_with_other_weights_is_done_again_and_neither_is_lost(tmp_path):
    done, args = [], Namespace(data="photos", output=tmp_path, jobs=1, report=False)

    def do(data, folder, value):
        done.append(value)
        return {"accuracy": value}

    for value in (1, 2, 1):
        file = tmp_path / f"{len(done)}.pt"
        torch.save({"weight": torch.full((2,), value)}, file)
        piece = work.Piece("one", partial(do, value=value), {}, file)
        assert work.complete([piece], args) == {"one": {"accuracy": value}}
    assert done == [1, 2]


@pytest.mark.papers
def test_a_network_that_came_with_other_weights_is_trained_anew_beside_the_first(tmp_path, photos):  # noqa: F811
    name = f"{contrast.TRAINED}: original"
    given = ["--quick", "--data", str(photos), "-o", str(tmp_path), "--plain", str(tmp_path), "--only", name]
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.save(ResNet20().state_dict(), tmp_path / "resnet20.pt")
        contrast.main(given)
        found += [json.loads((tmp_path / "results.json").read_text())["cells"][name]]
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def _end(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.processes
def test_a_process_that_is_killed_is_told():
    with pytest.raises(SystemExit, match=r"error: signal 9 ended a process, .*; out of memory"):
        cells.in_processes([(signal.SIGKILL,)], 2, _end)


def test_a_report_tells_what_has_finished_and_how_many_seeds(tmp_path, monkeypatch):
    two = [cells.Cell("one", name, Stub, None) for name in ("first", "second")]
    experiment = cells.Experiment("test", "", lambda scale: two, quick=replace(cells.QUICK, seeds=2, goals=()))
    settings = experiment.quick.settings(two[0], 0, workers=3)  # the number of workers changes no result
    place = cells.folder_of(tmp_path / "runs", two[0])
    place.mkdir(parents=True)
    finished = {"asked": cells._asked(two[0], settings, experiment.quick, "photos"), "outcome": asdict(outcome(0, 0.3))}
    (place / cells.KNOWN).write_text(json.dumps(finished))
    monkeypatch.setattr(cells, "plot_panels", lambda *_: None)
    given = ["--quick", "--data", "photos", "-o", str(tmp_path), "--report"]
    cells.run(experiment, given)
    assert table(tmp_path / "table.md") == {"one: first": ["30.00 (1 of 2 seeds)"]}
    cells.run(experiment, [*given, "--iterations", "4"])  # another question, which has no answer yet
    assert table(tmp_path / "table.md") == {}


def test_the_loss_is_drawn_below_the_accuracy_in_the_same_colours(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    run = [{"step": 1, "accuracy": 0.5, "loss": 2.0}, {"step": 2, "accuracy": 0.6, "loss": 1.5}]
    plots.plot_panels(
        {"a": {"net": [run], "other": [run]}, "b": {"other": [run]}}, tmp_path, values=("accuracy", "loss")
    )
    axes = drawn[0].axes
    assert [one.get_title() for one in axes] == ["a", "b", "a", "b"]
    assert [one.get_ylabel() for one in axes] == ["test accuracy, %"] * 2 + ["training loss"] * 2
    means = [{line.get_label(): line for line in one.lines} for one in axes]
    assert [list(one["other"].get_ydata()) for one in means] == [[50, 60]] * 2 + [[2.0, 1.5]] * 2
    assert len({one["other"].get_color() for one in means}) == 1
    assert means[0]["net"].get_color() != means[0]["other"].get_color()


@pytest.mark.parametrize("kind", [{"shift": False}, {"shift": True, "color_jitter": 0.8}])
def test_images_are_decoded_once_for_all_their_augmentations(photos, kind):  # noqa: F811
    images = cells._images(str(photos), kind["shift"], kind.get("color_jitter"), 20, 10)
    asked = load_data(str(photos), img_size=32, train_images=20, test_images=10, in_memory=True, **kind)
    assert str(images.train.transform) == str(asked.train.transform)
    assert str(images.test.transform) == str(asked.test.transform)
    assert (images.train.pixels == asked.train.pixels).all()
    assert images.train.targets == asked.train.targets
    assert images.train.pixels is cells._images(str(photos), False, 0.3, 20, 10).train.pixels


# ------------------------------------------------------------------------------------------------------- the questions


def test_a_run_has_converged_if_it_is_twice_as_good_as_guessing_with_every_seed():
    sweep = {
        1e-4: [outcome(0, 0.2), outcome(1, 0.3)],
        1e-3: [outcome(0, 0.5), outcome(1, 0.6)],
        1e-2: [outcome(0, 0.7), outcome(1, 0.19)],
        1e-1: [outcome(0, None), outcome(1, 0.9)],
        1.0: [outcome(0, 0.9)],
    }
    rates = list(sweep)
    assert depth.largest_rate(sweep, rates, 2) == "0.001 or more"  # of the largest one a seed is missing
    assert depth.largest_rate(sweep, rates[:-1], 2) == "0.001"
    assert depth.largest_rate({1e-2: sweep[1e-2]}, [1e-2], 2) == "none"
    assert depth.largest_rate({1e-2: sweep[1e-2]}, [1e-3, 1e-2], 2) == "not decided"
    assert depth.largest_rate({1e-2: [outcome(0, 0.1)]}, [1e-2], 2) == "none"  # one that failed is enough
    told = ["2 of 2, 25.0 ± 7.1 %", "2 of 2, 55.0 ± 7.1 %", "1 of 2, 70.0 %", "1 of 2, 90.0 %", "1 of 1, 90.0 %"]
    assert [depth._told(runs) for runs in sweep.values()] == told


def test_depths_are_in_order_and_rates_without_an_outcome_are_blank():
    found = depth.cells(depth.EXPERIMENT.cpu)
    outcomes = {cell.name: [] for cell in found}
    outcomes["CNN-69: plain, rate 0.001"] = [outcome(0, None)]
    outcomes["CNN-18: plain, rate 0.003"] = [outcome(seed, 0.4) for seed in range(3)]
    text = depth.table(depth.EXPERIMENT, found, outcomes, depth.EXPERIMENT.cpu)
    assert text.splitlines()[2:] == [
        "| CNN-18: plain |  |  | 3 of 3, 40.0 ± 0.0 % |  | 0.003 or more |",
        "| CNN-69: plain |  | 0 of 1 |  |  | not decided |",
    ]


def test_accuracies_under_corruptions_are_means_over_strengths_and_seeds():
    def measured(shift: float) -> Outcome:
        corrupted = {name: [0.1 + shift] * 4 + [0.6 + shift] for name in CORRUPTIONS}
        return replace(outcome(0, 0.8), measured={"clean": 0.8 + shift, "corrupted": corrupted})

    assert contrast.under(measured(0), "fog") == pytest.approx(0.2)
    assert contrast.under_all(measured(0.1)) == pytest.approx(0.3)
    mean = contrast.mean([measured(0), measured(0.1)])
    assert mean["clean"] == pytest.approx(0.85)
    assert mean["corrupted"]["noise"] == pytest.approx([0.15] * 4 + [0.65])


def test_what_takes_the_place_of_batch_norm_looks_at_one_image_alone():
    cnn, images = partial(plain_cnn.cnn, filters=(4, 6, 8), features=16), torch.randn(3, 3, 32, 32).double()
    for build, norm in itertools.product((cnn, ResNet20), networks.NORMS):
        network = networks.normalized(build, norm)(10).train().double()
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        torch.testing.assert_close(network(images)[:1], network(images[:1]))
        same = [name for name, _ in build(10).named_parameters()]
        assert [name for name, _ in network.named_parameters()] == same


def test_a_network_behind_standardisation_answers_alike_at_any_contrast():
    network = networks.standardized(partial(plain_cnn.cnn, filters=(4, 6, 8), features=16))(10).eval()
    images = torch.randn(2, 3, 32, 32)
    mean = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(network(images), network(mean + 0.2 * (images - mean)), atol=1e-4, rtol=1e-4)


def test_the_trained_network_keeps_its_weights_and_gets_a_classifier_for_other_classes(tmp_path):
    torch.manual_seed(0)
    torch.save(ResNet20().state_dict(), tmp_path / "resnet20.pt")
    saved = torch.load(tmp_path / "resnet20.pt")
    for classes in (10, 4):
        network = contrast.resnet20(classes, file=tmp_path / "resnet20.pt")
        assert torch.equal(network.conv.weight, saved["conv.weight"])
        assert torch.equal(network.fc.weight, saved["fc.weight"]) == (classes == 10)
        assert network(torch.randn(1, 3, 32, 32)).shape == (1, classes)
    scratch = {contrast.CNN, contrast.RESNET}
    assert {cell.panel for cell in cells_of(contrast, cells.CPU, tmp_path)} == {*scratch, contrast.TRAINED}
    assert {cell.panel for cell in cells_of(contrast, cells.CPU)} == scratch


def test_a_rival_is_compared_where_both_networks_were_asked_for(tmp_path):
    torch.save(ResNet20().state_dict(), tmp_path / "resnet20.pt")
    whole = cells_of(contrast, cells.CPU, tmp_path)
    pairs = [(one.name, other.name) for one, other in contrast.rivals(whole)]
    assert len(pairs) == len(set(pairs)) == 2 * (9 + 2 + 1) + 7 + 2 + 1
    assert ("ResNet-20: ρ = 2, jitter", "ResNet-20: plain, jitter") in pairs
    assert ("ResNet-20, trained further: ρ = 4, jitter", "ResNet-20, trained further: original, jitter") in pairs
    some = [cell for cell in whole if cell.name in ("CNN-9: plain", "ResNet-20: plain", "ResNet-20: ρ = 2")]
    assert [(one.name, other.name) for one, other in contrast.rivals(some)] == [
        ("ResNet-20: ρ = 2", "ResNet-20: plain")
    ]


def test_all_runs_every_program_that_there_is(tmp_path, monkeypatch):
    ran = {}

    class Program:
        def __init__(self, name: str):
            self.name = name

        def main(self, argv: list[str]) -> None:
            ran[self.name] = argv

    monkeypatch.setattr(programs, "import_module", Program)
    every.main(["--jobs", "2", "--report", "--data", "photos", "-o", str(tmp_path)])
    folder = Path(every.__file__).parent
    there = {file.stem for file in folder.glob("*.py")} & set(every.ORDER)
    assert list(ran) == [f"examples.evidence.{name}" for name in every.ORDER if name in there]
    assert set(PROGRAMS) <= there
    where = ["--data", "photos", "-o", str(tmp_path / "depth"), "--jobs", "2", "--report"]
    assert ran["examples.evidence.depth"] == where


def test_each_network_is_compared_with_the_labels_before_its_own():
    norms = [cells.Cell("batch 2", label, Stub, None) for label in ("Batch", "Group", "ours")]
    pairs = [(one.label, other.label) for one, other in results.against("Batch", "Group")(norms)]
    assert pairs == [("Group", "Batch"), ("ours", "Batch"), ("ours", "Group")]


def test_a_panel_that_lacks_its_weights_is_left_out_aloud(tmp_path, capsys):
    cells_of(contrast, cells.CPU, tmp_path)
    assert f"left out: {contrast.TRAINED}, for there is no {tmp_path}/resnet20.pt" in capsys.readouterr().err


def test_differences_are_taken_seed_by_seed():
    def runs(*accuracies):
        return [Outcome(seed, accuracy) for seed, accuracy in enumerate(accuracies)]

    plain, ours = (cells.Cell("CNN", label, torch.nn.Identity, None) for label in ("plain", "ours"))
    other = replace(ours, panel="VGG")
    experiment = cells.Experiment("one", None, lambda scale: [], pairs=results.against("plain"))
    outcomes = {plain.name: runs(0.5, 0.6, 0.9), ours.name: runs(0.51, 0.63, None), other.name: runs(1.0)}
    told = results.differences(experiment, [plain, ours, other], outcomes).splitlines()
    assert told[2:] == ["| CNN: ours less plain | 2 | +2.0 ± 1.4 |"]  # the third seed of one did not converge
    assert results.differences(replace(experiment, pairs=None), [plain, ours], outcomes) == ""
    assert results.differences(experiment, [plain, ours], {**outcomes, ours.name: []}) == ""


def test_the_conversion_with_a_radius_is_compared_with_all_of_its_panel(tmp_path):
    (tmp_path / "resnet20.pt").touch()
    found = contrast.cells(contrast.EXPERIMENT.cpu, plain=tmp_path)
    pairs = contrast.rivals(found)
    assert len(pairs) == len(found) + 6  # each against the rest of its panel; with the care of a rival three more
    assert all(one.panel == other.panel and one.label.startswith("ρ = ") for one, other in pairs)


def test_a_folder_of_images_is_the_same_from_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cells.place_of(".") == cells.place_of(str(tmp_path)) == str(tmp_path.resolve())
    assert cells.place_of("cifar10") == "cifar10"


def test_a_plain_network_is_trained_once_and_for_its_own_length(tmp_path, monkeypatch, capsys):
    trained = {}
    monkeypatch.setattr(plain_networks, "cifar", lambda folder: plain_networks.Images(*torch.zeros(4, 1)))
    monkeypatch.setattr(plain_networks, "digits", lambda: plain_networks.Images(*torch.zeros(4, 1)))
    monkeypatch.setattr(plain_networks, "train", lambda network, images, **how: trained.update({type(network): how}))
    (tmp_path / "mobilenet.pt").write_bytes(b"before")
    given = ["plain_networks", "--output", str(tmp_path), "--networks", "resnet20", "vit", "mobilenet"]
    monkeypatch.setattr("sys.argv", given)
    for lengths in ({"ResNet20": 20, "SmallViT": 40}, {}):
        plain_networks.main()
        assert {kind.__name__: how["epochs"] for kind, how in trained.items()} == lengths
        trained.clear()
    assert f"mobilenet: {tmp_path}/mobilenet.pt is there" in capsys.readouterr().out
    assert (tmp_path / "mobilenet.pt").read_bytes() == b"before"
    assert {file.name for file in tmp_path.iterdir()} == {"resnet20.pt", "vit.pt", "mobilenet.pt"}
    ResNet20().load_state_dict(torch.load(tmp_path / "resnet20.pt"))


def test_one_in_twenty_differences_is_bold_where_there_is_none():
    draw = np.random.default_rng(0)
    for seeds, bound in results.CHANCE.items():
        shares = draw.normal(size=(40_000, seeds))
        beyond = np.abs(shares.mean(1)) > bound * shares.std(1, ddof=1)
        assert beyond.mean() == pytest.approx(0.05, abs=0.004)  # three standard deviations of the count
    assert results.difference([0.02, 0.03, 0.04]) == "**+3.0 ± 1.0**"
    assert results.difference([-0.02, -0.03, -0.04]) == "**-3.0 ± 1.0**"
    assert results.difference([0.02, 0.03]) == "+2.5 ± 0.7"
    assert [results.difference(one) for one in ([0.02], [], [-0.0003])] == ["+2.0", "", "+0.0"]
