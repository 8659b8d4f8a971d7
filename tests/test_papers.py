"""The experiments of the papers run, finish what was begun, and say what they found."""

import json
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

TRAINED = ("operators_and_losses", "depth", "without_relu", "width", "batch_size", "learnable_k", "sphere_resnet",
           "minimum_energy")  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four classes of 32×32 noise, each of its own colour."""
    folder = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 12), ("test", 5)):
        for name in range(4):
            (folder / part / f"class {name}").mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 60, (32, 32, 3)) + 60 * (name % 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"class {name}" / f"{number}.png")
    return folder


def table(path) -> dict[str, list[str]]:
    """The rows of a Markdown table, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines()]
    return {first: rest for first, *rest in rows[2:]}


@pytest.mark.parametrize("name", TRAINED)
def test_an_experiment_trains_each_cell_once_and_tells_what_it_gave(tmp_path, photos, name, capsys):
    program = import_module(f"examples.papers.{name}")
    given = ["--quick", "--data", str(photos), "-o", str(tmp_path)]
    program.main(given)
    results = json.loads((tmp_path / "results.json").read_text())
    cells = program.cells(program.EXPERIMENT.quick)
    assert list(results["cells"]) == list(table(tmp_path / "table.md")) == [cell.name for cell in cells]
    for outcomes in results["cells"].values():
        assert [outcome["seed"] for outcome in outcomes] == [0]
        assert [point["step"] for point in outcomes[0]["curve"]] == [1, 2]
        assert len(outcomes[0]["per_class"]) == 4
    for picture in tmp_path.glob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 500
    weights = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    program.main(given)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == weights
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == results["cells"]


@pytest.mark.parametrize("name", TRAINED)
def test_authors_numbers_belong_to_cells_that_there_are(name):
    program = import_module(f"examples.papers.{name}")
    names = {cell.name for cell in program.cells(program.EXPERIMENT.full)}
    few = [{cell.name for cell in program.cells(scale)} for scale in (program.EXPERIMENT.cpu, program.EXPERIMENT.quick)]
    assert len(names) == len(program.cells(program.EXPERIMENT.full))
    wrong = program.EXPERIMENT.authors.keys() - names
    assert not wrong
    assert all(few)
