"""Tables fit into 80 columns wherever they go, and use more where the terminal has more; no name or reason is lost."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from sphereify import plan_conversion, tables, terminal
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.calibration.suggestion import Suggestion
from sphereify.deployment.exporting import Exported
from sphereify.nn import HypersphericalEnergy
from sphereify.terminal import console
from sphereify.training import Evaluation
from sphereify.training.corruptions import CORRUPTIONS
from sphereify.training.robustness import CorruptedAccuracy, Robustness
from sphereify.wording import shortened_name

LONG = "encoder.a_part_with_a_long_name.blocks.{}.another_part_with_a_long_name.projection"


def printed(show, width, *args, **options):
    """What is printed at a terminal of this width."""
    out = Console(width=width, force_terminal=True, color_system=None)
    with out.capture() as capture:
        show(out, *args, **options)
    return capture.get()


def network():
    """A first block, two that are alike and one to exclude, with names of 80 characters."""
    model = nn.Sequential()
    for i in range(4):
        at = model
        *path, last = LONG.format(i).split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Sequential())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(4, 4))
    return model


def plan():
    options = {"operator": "learnable-sigmoid", "share_k": "layer", "exclude": LONG.format(3), "head": "keep"}
    return plan_conversion(network(), **options, example_inputs=torch.randn(2, 4))


FITS = [LayerFit(LONG.format(i), 0.1, 0.9, 12_345_678, 123_456, "its norm was calibrated, too") for i in range(3)]
CORRUPTED = CorruptedAccuracy(0.991, {name: [0.123] * 5 for name in CORRUPTIONS})
ROBUST = Robustness(dict.fromkeys(("runs/digits/last", "original", "original, behind it"), CORRUPTED), 10_000, 10)
MEASURES = ["", "test accuracy, %", "under corruptions, %", "true accepts at FAR 0.01, %", "equal error rate, %",
            "steps to 94.1%", "images/s", "ratio", "peak memory"]  # fmt: skip
COMPARED = SimpleNamespace(
    columns=lambda: MEASURES,
    rows=lambda: [[name, *["12.34 ± 1.23"] * 8] for name in ("original", "cosine", "linear", "learnable-sigmoid")],
)
VERIFIED = SimpleNamespace(
    tar={0.1: 0.5, 0.0001: None},
    too_few=lambda rate: "needs 100,000 pairs of different identities, there are 32" if rate < 0.001 else "",
    eer=0.3, neighbours=1, neighbour_accuracy=0.88, of_what=lambda: "12 images of 3 identities",
)  # fmt: skip
SUGGESTION = Suggestion(FITS, {0: 0.5, 3: 0.99}, [LONG.format(0)], 0.98, 0.99)
EXPORTED = Exported(
    Path("a/folder/with/a/long/name/and/a/file/with/a/longer/name/than/fits.onnx"), "onnx", 47_000_000, 4e-7, "checked",
    18, {f"Operator{i}": i for i in range(20)},
)  # fmt: skip
CONFUSION = torch.eye(3, dtype=torch.long)
CLASSES = ["a class whose name is a sentence, as in ImageNet, with synonyms: tench, Tinca tinca, and so on", "b", "c"]
TABLES = {
    "plan": lambda out: tables.print_plan(out, plan()),
    "whole plan": lambda out: tables.print_plan(out, plan(), every=True),
    "calibration": lambda out: tables.print_calibration(out, Calibration({fit.name: fit for fit in FITS}, [])),
    "suggestion": lambda out: out.print(
        tables.calibration_table(SUGGESTION.layers, "the least explained layers first")
    ),
    "export": lambda out: tables.print_export(out, EXPORTED),
    "evaluation": lambda out: tables.print_evaluation(out, Evaluation(0.5, 1.0, CONFUSION, 3, 1.0, 0), CLASSES),
    "robustness": lambda out: tables.print_robustness(out, ROBUST),
    "comparison": lambda out: tables.print_comparison(out, COMPARED),
    "verification": lambda out: tables.print_verification(out, VERIFIED, "a/folder/with/a/long/name/run/last"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", [80, 200])
def test_a_table_fits_into_the_terminal(name, width):
    lines = printed(TABLES[name], width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_a_name_that_does_not_fit_keeps_its_numbers():
    text = printed(TABLES["plan"], 80)
    assert re.search(r"│ e….*\.b.*….1–2\..*│ 2 linear │", text)
    assert re.search(r"│ e….*\.b.*….3\..*│ linear   │ kept", text)
    assert LONG.format("1–2") in printed(TABLES["plan"], 200)


def test_the_whole_plan_breaks_names_into_lines_and_cuts_nothing():
    text = printed(TABLES["whole plan"], 80)
    first = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert first == "".join(LONG.format(i) for i in range(4))
    assert "…" not in text


def test_a_path_that_does_not_fit_is_broken_into_lines():
    text = printed(TABLES["export"], 80)
    cells = [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells).startswith(str(EXPORTED.path))


def test_energies_fit_into_the_terminal(monkeypatch):
    report = HypersphericalEnergy().report(network())
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, str(report).splitlines())) <= columns
    assert LONG.format(1) in str(report)


def test_corruptions_are_columns_where_they_fit_and_rows_elsewhere():
    narrow, broad = printed(TABLES["robustness"], 80), printed(TABLES["robustness"], 200)
    assert re.search(r"│ contrast +│ 12\.3 +│ 12\.3 +│ 12\.3 +│", narrow)
    assert re.search(r"│ original, behind it │ 99\.1 +│ 12\.3 +│", broad)
    for text in (narrow, broad):
        numbers = re.findall(r"\d+\.\d(?= +│)", text)
        assert sorted(numbers) == sorted(["99.1"] * 3 + ["12.3"] * (3 * len(CORRUPTIONS) + 3))


def test_networks_are_rows_where_they_are_more_than_their_measures():
    many = SimpleNamespace(
        columns=lambda: ["", "accuracy", "speed"],
        rows=lambda: [[f"a network with a long name and the number {i} at the end of it", "1", "2"] for i in range(9)],
    )
    assert re.search(r"┃ accuracy ┃ speed ┃", printed(tables.print_comparison, 60, many))


@pytest.mark.parametrize(("given", "width"), [(None, 80), ("100", 100), ("", 80), ("0", 80), ("wide", 80)])
def test_a_pipe_gets_80_columns_unless_the_environment_says_otherwise(monkeypatch, capsys, given, width):
    monkeypatch.delenv("COLUMNS")
    if given is not None:
        monkeypatch.setenv("COLUMNS", given)
    assert console().width == console(stderr=True).width == width


def test_a_sentence_in_a_pipe_stays_on_one_line(run):
    _, out, _ = run("inspect", "mobilenetv3_small_100")
    assert any(line.startswith("note: ") and line.endswith("skip_depthwise keeps them") for line in out.splitlines())


def test_a_shortened_name_is_short_enough_and_keeps_numbers_where_it_can():
    names = ("stages.2.blocks.10.token_mixer.conv", "x" * 50, "", "a.b.c.d.e.f.g.h.i.j.k.l.m", "layer2–4.0.conv1–2")
    for name in names:
        assert [len(shortened_name(name, most)) for most in range(1, 60)] == [
            min(most, len(name)) for most in range(1, 60)
        ]
    assert shortened_name("layer12.conv3", 9) == "l…12.co…3"
    assert shortened_name("stages.2.blocks.10.token_mixer.conv", 26) == "sta….2.bloc….10.toke….conv"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_escaped_and_json_stays_json(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.escape_what_cannot_be_written()
    name = 'ρ ‖x‖ 🙂 "ü" \udcff'  # the last one is a byte in a file's name that is no text
    print(json.dumps([name], ensure_ascii=False), file=stream, flush=True)
    assert json.loads(stream.buffer.getvalue().decode(encoding)) == [name]
