"""The tutorial runs from top to bottom, what it tells is so, and the outputs in it are those of a run."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.papers

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"
FACTS = """
import json
print(json.dumps({
    "accuracy": accuracy,
    "explained": calibration.r2,
    "turned": [float(degrees(a, b).mean()) for network in (original, model_as_calibrated)
               for a, b in [(maps(network, clear)["conv5"], maps(network, dim)["conv5"])]],
    "means": {name: found.mean for name, found in networks.items()},
    "fog": {name: found.means["fog"] for name, found in networks.items()},
    "difference": exported.difference,
    "same": torch.equal(model(test_images), again(test_images)),
}))
"""


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)


@pytest.mark.filterwarnings("default")  # those of Jupyter's packages
def test_the_tutorial_runs_and_what_it_tells_is_so(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = read()
    place = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("from sphereify import Settings"))
    notebook.cells.insert(place, _code("import copy\nmodel_as_calibrated = copy.deepcopy(model)"))
    notebook.cells.append(_code(FACTS))
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()

    facts = json.loads(notebook.cells[-1].outputs[0].text)
    accuracy = facts["accuracy"]
    assert accuracy["original"] > 0.95
    assert accuracy["weights copied"] < accuracy["original"] - 0.1
    assert accuracy["calibrated"] > accuracy["original"] - 0.03
    assert accuracy["fine-tuned"] > accuracy["original"] - 0.02
    assert accuracy["ONNX Runtime"] == pytest.approx(accuracy["fine-tuned"])
    assert min(facts["explained"].values()) > 0.95
    plain, converted = facts["turned"]
    assert converted < plain
    assert facts["means"]["fine-tuned"] > facts["means"]["original"] + 0.05
    assert facts["fog"]["calibrated"] > facts["fog"]["original"] + 0.1
    assert facts["difference"] < 1e-4
    assert facts["same"]


def test_the_outputs_in_the_tutorial_are_those_of_one_run_from_top_to_bottom():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert NOTEBOOK.stat().st_size < 500_000


def _code(source: str):
    from nbformat.v4 import new_code_cell

    return new_code_cell(source)
