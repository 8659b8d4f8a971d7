"""The examples run as they are printed, and say what they promise."""

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
