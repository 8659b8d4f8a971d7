"""The experiments of the papers run, finish what was begun, and say what they found."""

import json
import math
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.papers import all as every
from examples.papers import cells, conditioning, fourier, gan_energy, plain_cnn
from sphereify import plots, sphereify
from sphereify.datasets import load_data
from sphereify.training import Objective
from sphereify.training.variant import build_variant
from tests.examples.colours import write_pictures

TRAINED = (
    "operators_and_losses",
    "depth",
    "without_relu",
    "width",
    "batch_size",
    "learnable_k",
    "sphere_resnet",
    "minimum_energy",
)
# Without the marked tests one experiment stands for all.
EXPERIMENTS = [pytest.param(name, marks=[pytest.mark.papers] * (name != "without_relu")) for name in TRAINED]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photos"))


def table(path) -> dict[str, list[str]]:
    """The rows of a file's first Markdown table, by their first cell."""
    lines = path.read_text().partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows[2:]}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_each_cell_once_and_tells_what_it_gave(tmp_path, photos, name, monkeypatch):
    program = import_module(f"examples.papers.{name}")
    given = ["--quick", "--data", str(photos), "-o", str(tmp_path)]
    program.main(given)
    results = json.loads((tmp_path / "results.json").read_text())
    names = [cell.name for cell in program.cells(program.EXPERIMENT.quick)]
    assert list(results["cells"]) == list(table(tmp_path / "table.md")) == names
    for outcomes in results["cells"].values():
        assert [outcome["seed"] for outcome in outcomes] == [0]
        assert [point["step"] for point in outcomes[0]["curve"]] == [1, 2]
        assert len(outcomes[0]["per_class"]) == 4
    for picture in tmp_path.glob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 500
    weights = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr(cells, "train_once", None)  # what has finished is neither trained nor tested again
    monkeypatch.setattr(cells, "evaluate", None)
    program.main(given)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == weights
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == results["cells"]


@pytest.mark.parametrize("name", TRAINED)
def test_authors_numbers_belong_to_cells_that_there_are(name):
    program = import_module(f"examples.papers.{name}")
    experiment = program.EXPERIMENT
    for scale in (experiment.full, experiment.cpu, experiment.quick):
        names = [cell.name for cell in program.cells(scale)]
        assert len(set(names)) == len(names) > 0
    assert experiment.authors.keys() <= {cell.name for cell in program.cells(experiment.full)}


@pytest.mark.papers
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("depth", "width")])
def test_each_network_of_the_full_scale_has_a_loss_with_a_gradient(name):
    program = import_module(f"examples.papers.{name}")
    scale = replace(program.EXPERIMENT.full, width=1 / 32)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    for cell in program.cells(scale):
        settings = scale.settings(cell, 0, 0)
        network = build_variant(cells.Builder(cell, 10), cell.variant, settings).train()
        loss = Objective(network, settings.terms)(network(images), targets)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters()), cell.name


# ------------------------------------------------------------------------------------------------------------- cells


class Broken(nn.Module):
    """Its loss is not a number."""

    def __init__(self, classes: int):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1)) * math.nan


def test_a_network_that_does_not_converge_is_told_and_stops_nothing(tmp_path, photos):
    width = (2, 4, 6)
    two = [
        cells.Cell("one", "broken", Broken, None),
        cells.Cell("one", "sound", partial(plain_cnn.cnn, filters=width, features=8), None),
    ]
    experiment = cells.Experiment("test", "", lambda scale: two, {"one: sound": 12.5}, "authors")
    cells.run(experiment, ["--quick", "--data", str(photos), "-o", str(tmp_path)])
    rows = table(tmp_path / "table.md")
    assert rows["one: broken"] == ["not converged", "", "not reached", "not reached"]
    assert 0 <= float(rows["one: sound"][0]) <= 100
    assert rows["one: sound"][1] == "12.50"
    failure = json.loads((tmp_path / "results.json").read_text())["cells"]["one: broken"][0]["failure"]
    assert "the loss is nan" in failure


@pytest.mark.papers
def test_mean_and_deviation_over_seeds_are_told_with_the_steps_of_all(tmp_path, photos):
    cell = cells.Cell("one", "net", partial(plain_cnn.cnn, filters=(2, 4, 6), features=8), None)
    experiment = cells.Experiment("test", "", lambda scale: [cell], {}, "authors")
    cells.run(experiment, ["--quick", "--seeds", "2", "--jobs", "2", "--data", str(photos), "-o", str(tmp_path)])
    outcomes = json.loads((tmp_path / "results.json").read_text())["cells"]["one: net"]
    shares = [100 * outcome["accuracy"] for outcome in outcomes]
    told = f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}"
    assert table(tmp_path / "table.md")["one: net"][0] == told
    assert [outcome["seed"] for outcome in outcomes] == [0, 1]


def test_iterations_are_counted_at_the_first_test_that_reached_the_goal():
    curve = [{"step": step, "accuracy": accuracy} for step, accuracy in ((10, 0.2), (20, 0.5), (30, 0.4), (40, 0.6))]
    outcome = cells.Outcome(0, 0.6, curve=curve)
    assert [outcome.steps_to(goal) for goal in (0.1, 0.4, 0.55, 0.7)] == [10, 20, 40, None]


def test_a_curve_has_the_colour_of_its_name_in_every_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    run = [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.6}]
    names = [f"net {number}" for number in range(12)]
    plots.plot_panels({"all": {name: [run] for name in names}, "one": {"net 7": [run, run]}, "none": {}}, tmp_path)
    panels = [{line.get_label(): line.get_color() for line in axes.lines} for axes in drawn[0].axes]
    assert len({panels[0][name] for name in names}) == 12
    assert panels[1]["net 7"] == panels[0]["net 7"]
    assert [axes.get_title() for axes in drawn[0].axes] == ["all", "one", "none"]


def test_the_rate_falls_where_the_authors_let_it_fall():
    cell = cells.Cell("one", "net", plain_cnn.cnn, None)
    settings = replace(cells.FULL, iterations=64_000).settings(cell, 0, 0)
    falls = [settings.epoch_batches * milestone for milestone in settings.milestones]
    assert (falls, settings.epoch_batches * settings.epochs) == ([34_000, 54_000], 64_000)


def test_rare_classes_keep_their_share_and_the_others_all(photos):
    data = load_data(str(photos), img_size=32, in_memory=True)
    kept = [target for _, target in cells._with_rare(data, 2, 0.25).train]
    assert [kept.count(number) for number in range(4)] == [3, 3, 12, 12]


# ------------------------------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize(("name", "build"), plain_cnn.NETWORKS.items())
def test_a_network_has_as_many_layers_as_its_name_says(name, build):
    network = build(filters=(2, 3, 4))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    layers = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    # The residual one's name counts its classifier, too.
    assert len(layers) == int(name.split("-")[1]) - ("ResNet" in name)


def test_shortcuts_are_kept_in_the_second_version_only():
    network = plain_cnn.resnet32(filters=(2, 3, 4))
    kept = {
        version: [d.name for d in sphereify(network, **options).conversion_plan.decisions if d.action == "keep"]
        for version, options in plain_cnn.CONVERSIONS.items()
    }
    assert kept == {"v1": [], "v2": ["units.5.shortcut", "units.10.shortcut"]}


def test_without_norm_and_relu_there_is_none():
    kinds = {type(m) for m in plain_cnn.cnn(filters=(2, 3, 4), norm=False, relu=False).modules()}
    assert kinds == {nn.Sequential, nn.Conv2d, nn.MaxPool2d, nn.Flatten, nn.Linear}


@pytest.mark.papers
def test_the_networks_are_listed(tmp_path):
    plain_cnn.main(["--quick", "-o", str(tmp_path)])
    rows = table(tmp_path / "table.md")
    assert [rows[name][1] for name in ("CNN-9", "ResNet-32 v1", "ResNet-32 v2")] == ["11", "34", "32"]


# -------------------------------------------------------------------------------------------------------- conditioning


def test_rescaling_spoils_the_condition_where_lengths_are_free_and_not_on_the_sphere(tmp_path):
    conditioning.main(["--quick", "-o", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    grows = {name: found["exponent"] for name, found in results["problems"].items()}
    assert grows["plain, k < n, m"] > 3
    assert grows["cosine, free"] > 3
    assert abs(grows["plain, k > n, m"]) < 0.1
    assert abs(grows["cosine, on sphere"]) < 1e-6
    assert results["difference to sphere_linear"] < 1e-12


def test_the_condition_of_the_plain_problem_is_that_of_its_factors():
    """At an optimum the Hessian is JᵀJ; JJᵀ = VVᵀ ⊗ I + I ⊗ UUᵀ has the same eigenvalues other than 0."""
    problem = conditioning.PROBLEMS[0]
    u, v = conditioning.rescaled(problem, *conditioning.optimum(problem.sizes, 3), 2.0)
    found = conditioning.condition(conditioning.eigenvalues(problem, u, v, u @ v.T))
    sums = torch.linalg.eigvalsh(u @ u.T)[:, None] + torch.linalg.eigvalsh(v @ v.T)[None]
    assert found == pytest.approx((sums.max() / sums[sums > 1e-9].min()).item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------- a generative network


def test_the_distance_of_two_sets_is_that_of_their_means_and_covariances():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=draw)
    assert gan_energy.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert gan_energy.frechet(a, a + 2) == pytest.approx(5 * 2**2, rel=1e-6)
    sum_of_variances = a.double().var(0).sum().item()
    twice = a.mean(0) + 2 * (a - a.mean(0))
    assert gan_energy.frechet(a, twice) == pytest.approx(sum_of_variances, rel=1e-5)  # Σ (2σ - σ)²


@pytest.mark.parametrize("kind", ["plain", "MHE + SN"])
def test_an_interrupted_generator_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(gan_energy, "SAVED_EVERY", 2)
    size = replace(gan_energy.SIZES["quick"], iterations=5)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = gan_energy.train(kind, size, 0, images, tmp_path / "whole").state_dict()
    gan_energy.train(kind, replace(size, iterations=3), 0, images, tmp_path / "stopped")
    torch.randn(7)  # what else a program may draw
    goes_on = gan_energy.train(kind, size, 0, images, tmp_path / "stopped").state_dict()
    assert all(torch.equal(whole[name], goes_on[name]) for name in whole)


@pytest.mark.papers
def test_each_discriminator_is_scored_once(tmp_path, photos, capsys):
    for _ in range(2):
        gan_energy.main(["--quick", "--data", str(photos), "-o", str(tmp_path)])
    assert capsys.readouterr().out.count("seed 0: ") == len(gan_energy.KINDS)
    rows = table(tmp_path / "table.md")
    assert list(rows) == [*gan_energy.KINDS, "training images"]
    assert all(float(cells[0]) > 0 for cells in rows.values())


# ------------------------------------------------------------------------------------------------ phase and magnitude


def test_an_image_of_phases_and_magnitudes_has_them():
    one, other = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64)
    odd = torch.fft.fft2(fourier.mixed(one, other))
    torch.testing.assert_close(odd.abs(), torch.fft.fft2(other).abs())
    torch.testing.assert_close(fourier.mixed(one, one), one)


def test_partners_are_of_other_classes():
    targets = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    others = targets[fourier.partners(targets)]
    assert (others != targets).all()


@pytest.mark.parametrize("program", [fourier, gan_energy])
def test_data_that_are_not_there_end_a_program_with_a_line(tmp_path, program, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--quick", "--data", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")])
    assert ended.value.code > 0
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.papers
def test_phases_and_magnitudes_are_asked_for(tmp_path, photos):
    fourier.main(["--quick", "--data", str(photos), "-o", str(tmp_path)])
    assert list(table(tmp_path / "table.md")) == ["plain", "cosine"]


# --------------------------------------------------------------------------------------------------------- all of them


def test_all_runs_every_experiment_and_goes_on_after_one_that_fails(tmp_path, monkeypatch, capsys):
    ran = {}

    class Program:
        def __init__(self, name: str):
            self.name = name.rpartition(".")[2]

        def main(self, argv: list[str]) -> None:
            ran[self.name] = argv
            if self.name in fails:
                raise fails[self.name]

    fails = {
        "depth": SystemExit(1),
        "width": SystemExit("no weights: train them"),
        "fourier": ValueError("a fault"),
        "conditioning": SystemExit(0),
    }
    monkeypatch.setattr(every, "import_module", Program)
    with pytest.raises(SystemExit) as ended:
        every.main(["--full", "--jobs", "3", "--data", "photos", "-o", str(tmp_path)])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.endswith("\nfailed: depth, width, fourier\n")
    assert "no weights: train them\n" in told
    assert "ValueError: a fault\n" in told
    folder = Path(every.__file__).parent
    shared = {"__init__", "all", "cells", "report", "results", "training_images"}
    assert set(ran) == {file.stem for file in folder.glob("*.py")} - shared
    where = ["--full", "--data", "photos", "-o"]
    assert ran["width"][:4] == ran["conditioning"][:4] == where
    assert ran["width"][5:] == ["--jobs", "3"]
    assert ran["conditioning"][4:] == [str(tmp_path / "conditioning")]
