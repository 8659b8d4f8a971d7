"""The examples run as they are printed, and say what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.papers

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: str, folder: Path) -> str:
    """What an example prints, run in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def table(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in rows[2:]}


@pytest.mark.parametrize("imbalanced", [False, True])
def test_features_in_a_plane_are_measured_and_drawn(tmp_path, imbalanced):
    text = run("angular_features.py", "--quick", *(["--imbalanced"] if imbalanced else []), folder=tmp_path)
    rows = table(text)
    assert len(rows) == 5
    assert all(0 <= float(cell) <= 180 for cells in rows.values() for cell in cells)
    with Image.open(tmp_path / "angular_features.png") as picture:
        assert picture.width > 4 * picture.height  # five panels in a row


def test_energy_falls_on_a_plain_network(tmp_path):
    rows = table(run("energy_alone.py", "--quick", folder=tmp_path))
    assert all(float(w) < float(wo) for w, wo in zip(rows["with"][1:], rows["without"][1:], strict=True))


@pytest.mark.parametrize("framework", ["", "lightning", "transformers", "timm"])
def test_a_converted_network_trains_in_other_loops(tmp_path, framework):
    if framework:
        pytest.importorskip(framework)
    text = run(f"training/{f'with_{framework}' if framework else 'bare_loop'}.py", "--epochs", "2", folder=tmp_path)
    accuracy = re.fullmatch(r"test accuracy (.+)%", text.splitlines()[-1])
    assert float(accuracy[1]) > 30  # a guess is right in 10 %


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the demo, and what it prints, with `python` and `sphereify` being those of this environment."""
    folder = tmp_path_factory.mktemp("d")
    for name, command in (("python", ""), ("sphereify", "-m sphereify")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        program.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "demo.sh", folder / "out"],
        capture_output=True, text=True, cwd=folder, env={**environment, "COLUMNS": ""}, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_the_demo_prints_each_command_before_its_output_within_80_columns(demo):
    folder, printed = demo
    names = re.findall(r"^\$ (\S+ \S+)", printed, re.MULTILINE)
    expected = ["sphereify inspect", "python examples/plain_digits.py", "sphereify convert", "sphereify evaluate"]
    assert names == expected
    lines = [line for line in printed.replace(str(folder / "out"), "demo").splitlines() if "written to" not in line]
    assert max(map(len, lines)) <= 80
    assert "17 convolutions converted, 3 shortcuts kept" in printed


def test_the_network_of_the_demo_keeps_what_it_knew_and_bears_low_contrast(demo):
    found = json.loads((demo[0] / "out" / "report" / "robustness.json").read_text())["networks"]
    original, rival = found["original"], found["original, contrast standardised"]
    (converted,) = (network for name, network in found.items() if name.endswith("converted"))
    assert original["clean"] > 0.97
    assert converted["clean"] > original["clean"] - 0.02
    assert converted["means"]["contrast"] > original["means"]["contrast"] + 0.2
    assert rival["means"]["contrast"] > 0.9
    with Image.open(demo[0] / "out" / "report" / "robustness.png") as picture:
        assert picture.width > 1000


def test_the_next_command_of_the_demo_is_one_that_works(demo, monkeypatch):
    folder, printed = demo
    text = printed.partition("What to type next:")[2].replace("\\\n", " ")
    (command,) = re.findall(r"^ *sphereify (finetune .*)$", text, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "sphereify", *command.split()],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "out" / "run" / "curves.png").is_file()
