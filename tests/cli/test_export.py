"""The command export: files for other runtimes, and words that are wrong."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

from sphereify import fold, save, sphereify
from tests.deployment.networks import assert_standard, without


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small converted network. Look, don't touch."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    return save(sphereify(model), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def tiny(saved: Path) -> Path:
    """A copy of that network in the working folder."""
    return Path(shutil.copytree(saved, "tiny"))


@pytest.mark.export
def test_the_command_writes_checks_and_shows(run, tiny):
    code, out, err = run("export", tiny, "--dynamic-size", "--img-size", 64)
    assert (code, err) == (0, "")
    assert re.search(r"file +│ tiny\.onnx", out)
    assert "opset 18" in out
    assert re.search(r"size +│ \d\.\d MB", out)
    assert re.search(r"largest difference +│ \d\.\de-0[678]", out)
    assert "15 Conv" in out  # those of the network: sums over windows are pools
    assert "checked with onnxruntime on a random input of 3×3×96×96" in out
    assert_standard("tiny.onnx")


@pytest.mark.export
def test_a_folded_artifact_a_fixed_batch_and_the_other_format(run, tiny):
    save(fold(sphereify(timm.create_model("test_resnet"))), "folded")
    code, out, err = run("export", "folded", "--format", "torch-export", "--batch-size", 1, "--img-size", 64)
    assert (code, err) == (0, "")
    assert "random input of 1×3×64×64" in out
    assert torch.export.load("folded.pt2").module()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.export
def test_without_folding_norms_stay(run, tiny):
    code, out, _ = run("export", tiny, "--no-fold", "--img-size", 64, "-o", "x.onnx", "--opset", 20)
    assert code == 0
    assert "BatchNormalization" in out
    assert "opset 20" in out


WRONG = {
    "test_resnet": ((), 2, "test_resnet: is no saved artifact; make one with: sphereify convert test_resnet"),
    "nowhere": ((), 2, "nowhere: is no saved artifact"),
    "broken": ((), 1, "there is no model.safetensors in it"),
    "tiny": (("-o", "nowhere/x.onnx"), 2, "there is no folder nowhere"),
    "tiny ": (("-o", "here.onnx"), 2, "here.onnx: exists already; --force replaces it"),
    "tiny  ": (("--format", "tflite"), 2, "expected one of onnx, torch-export"),
    "tiny   ": (
        ("--format", "torch-export", "--opset", "20"),
        2,
        "--opset: has no effect on --format torch-export; it belongs to ONNX",
    ),
    "tiny    ": (("--batch-size", "0"), 2, "--batch-size: got 0, expected a number of at least 1"),
    "tiny     ": (("--factory", "nowhere:net"), 2, "nowhere"),
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_use_is_told_in_a_line_and_writes_nothing(given, run, tiny):
    options, expected, text = WRONG[given]
    Path("here.onnx").write_text("mine")
    Path("broken").mkdir()
    Path("broken/conversion.json").write_text("{}")
    code, out, err = run("export", given.strip(), *options)
    assert (code, out) == (expected, "")
    assert text in err
    assert err.count("\n") == 1
    assert Path("here.onnx").read_text() == "mine"
    assert sorted(p.name for p in Path().iterdir()) == ["broken", "here.onnx", "tiny"]


@pytest.mark.export
def test_a_disk_that_cannot_be_written_is_told(run, tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, out, err = run("export", tiny, "--format", "torch-export", "--img-size", 64)
    assert (code, out, err) == (1, "", "error: tiny.pt2: cannot be written (No space left on device)\n")
    assert [p.name for p in Path().iterdir()] == ["tiny"]


def test_missing_packages_are_told_on_the_command_line(run, tiny, monkeypatch):
    without(monkeypatch, "onnx", "onnxscript", "onnxruntime")
    code, _, err = run("export", tiny, "--img-size", 64)
    assert code == 2
    assert "pip install 'sphereify[export]'" in err
    assert [p.name for p in Path().iterdir()] == ["tiny"]
