"""--report: each command that writes one, and when it refuses to."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sphereify.sources import build_model, find_model
from tests.cli.words import TINY, one_line
from tests.report.pages import read, references

FEW = ["--data", "digits", "--train-images", 40, "--test-images", 20, "--device", "cpu"]


def strip_of(file):
    """Names and classes of the blocks of the strip."""
    (strip,) = read(Path(file)).all("div", "strip")
    return {block.attributes["title"].split(" · ")[0]: block.classes[1] for block in strip.all("i", "layer")}


def numbers_of(file):
    """The cards of the summary."""
    (cards,) = read(Path(file)).all("dl", "cards")
    return {card.all("dt")[0].text: card.all("dd")[0].text for card in cards.children}


def options_of(file):
    return [code.text for code in read(Path(file)).part("numbers").all("code")]


def test_inspect_reports_what_would_happen_and_writes_nothing_else(run, own, folder):
    code, out, err = run("inspect", f"{own}:small", "--report", "r.html", "--exclude", "5", "--img-size", 9)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "report written to r.html"
    assert strip_of("r.html") == {"0": "cosine", "5": "asked"}
    assert options_of("r.html") == ["--exclude 5", "--img-size 9"]
    page = read(folder / "r.html")
    assert references(page, (folder / "r.html").read_text()) == []
    assert "float32 2×3×9×9" in page.part("angles").text
    assert {path.name for path in folder.iterdir()} == {"r.html", own}


def test_convert_reports_the_calibration(run, own, shapes):
    command = [
        "convert",
        f"{own}:small",
        "--calibrate",
        shapes / "train",
        "--img-size",
        12,
        "--radius",
        1.5,
        "-o",
        "out",
    ]
    code, out, err = run(*command, "--report", "r.html", "--json")
    assert (code, err) == (0, "")
    json.loads(out)
    assert [row[0] for row in read(Path("r.html")).part("fit").rows()] == ["0", "5"]
    assert numbers_of("r.html")["pooled radius ρ"] == "1.5"
    assert "images of the calibration" in read(Path("r.html")).part("angles").text
    assert "original" in read(Path("r.html")).part("angles").all("ul", "legend")[0].text


def test_the_converted_model_is_the_same_with_a_report(run, own):
    run("convert", f"{own}:of_two_classes", "-o", "without")
    run("convert", f"{own}:of_two_classes", "-o", "with", "--report", "r.html")
    first, second = (load_file(Path(name, "model.safetensors")) for name in ("without", "with"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finetune_reports_the_run_and_resuming_it_replaces_the_report(run, own):
    command = ["finetune", f"{own}:small", *FEW, "--img-size", 8, "--epochs", 2, "-o", "run", "--report", "r.html"]
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    page = read(Path("r.html"))
    assert [row[0] for row in page.part("training").rows()] == ["1", "2"]
    accuracy = json.loads(Path("run/summary.json").read_text())["accuracy"]
    assert numbers_of("r.html")["test accuracy"] == f"{100 * accuracy:.2f} %"
    assert "training images of digits" in page.part("angles").text
    Path("r.html").write_text("old")
    assert run("finetune", "--resume", "run")[0] == 0
    assert [row[0] for row in read(Path("r.html")).part("training").rows()] == ["1", "2"]


def test_evaluate_reports_corruptions_and_inspect_finds_them(run, own):
    own = ["--factory", f"{own}:of_ten_classes"]
    assert run("convert", own[1], "-o", "artifact")[0] == 0
    images = ["--data", "digits", "--img-size", 8, "--test-images", 20]
    command = ["evaluate", "artifact", *own, *images, "--corruptions", "--device", "cpu", "-o", "out"]
    assert run(*command, "--report", "r.html")[0] == 0
    found = json.loads(Path("out/robustness.json").read_text())["networks"]["artifact"]
    (row,) = read(Path("r.html")).part("robustness").rows()
    shares = [found["clean"], *found["means"].values(), found["mean"]]
    assert row == ["artifact", *(f"{100 * share:.1f}" for share in shares)]
    copy = Path("copy")
    shutil.copytree("artifact", copy)
    shutil.copy("out/robustness.json", copy)
    assert run("inspect", copy, *own, "--report", "again.html")[0] == 0
    assert read(Path("again.html")).part("robustness").rows() == [row]
    os.utime(copy / "robustness.json", (1, 1))  # of an earlier model in this folder
    assert run("inspect", copy, *own, "--report", "again.html", "--force")[0] == 0
    assert "robustness" not in {part.attributes.get("id") for part in read(Path("again.html")).all("section")}


@pytest.mark.parametrize("command", [["inspect", TINY], ["convert", TINY], ["finetune", TINY, *FEW]])
def test_a_file_that_exists_is_not_replaced_without_force(run, folder, refused, command):
    Path("r.html").write_text("mine")
    refused([*command, "--report", "r.html"], 2, "r.html: exists already; --force replaces it, --report names another")
    assert Path("r.html").read_text() == "mine"


def test_what_cannot_be_a_report_is_refused(refused, own):
    refused(["inspect", TINY, "--report", own], 2, f"--report: got '{own}', expected a file that ends in .html or .htm")
    Path("folder.html").mkdir()
    refused(["inspect", TINY, "--report", "folder.html"], 2, "--report: folder.html is a folder, expected a file")
    refused(["inspect", TINY, "--report", "r.html", "--energy"], 2, "--report and --energy: got both, expected one")
    together = ["--report", "r.html", "--verification"]
    refused(["evaluate", TINY, "--data", "digits", *together], 2, "--report and --verification: got both")


def test_a_network_that_is_not_converted_has_no_report_of_its_evaluation(run, own, trained_of_ten):
    command = ["evaluate", f"{own}:gray", "--weights", trained_of_ten, "--data", "digits", "--img-size", 8]
    code, _, err = run(*command, "--report", "r.html")
    assert code == 2
    assert "is not converted, and a report is about a conversion; give an artifact" in one_line(err)
    assert not Path("r.html").exists()


@pytest.fixture
def trained_of_ten(own, folder):
    """Weights of the network for gray images of ten classes."""
    torch.save(build_model(find_model(f"{own}:gray", num_classes=10)).state_dict(), folder / "gray.pt")
    return folder / "gray.pt"
