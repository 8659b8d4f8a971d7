"""The command doctor: what it prints, and what it says of passes that are wrong or do not run."""

import json

import pytest
import torch

from sphereify import doctor
from sphereify.nn.passes import compiled, cpu, self_check, triton
from tests.cli.words import one_line

MAKERS = ["reference", "blocks", *["compiled"] * compiled.serves()]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """On the CPU alone, one dtype, one call each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(triton._switch, "on", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    monkeypatch.setattr(doctor, "TIMED", self_check.CASES[1])
    monkeypatch.setattr(doctor, "MOST", 1)
    monkeypatch.setattr(doctor, "FEWEST", 1)


def test_each_pass_of_each_maker_has_a_row(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    text = one_line(out)
    assert f"torch {torch.__version__}" in text.replace("│", "")
    assert "none: torch sees no CUDA device, so the CPU alone is examined" in text
    for maker in MAKERS:
        table = one_line(out.partition(f"{maker} on cpu")[2].partition(" on cpu")[0])
        for name in self_check.PASSES:
            assert f"{name} yes" in table
    assert "all passes agree with the reference" in text


def test_as_json(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["environment"]["torch"] == torch.__version__
    passes = found["passes"]
    assert {(p["maker"], p["name"]) for p in passes} == {
        (maker, name) for maker in MAKERS for name in self_check.PASSES
    }
    for report in passes:
        assert report["agrees"]
        assert 0 <= report["deviation"] < report["allowed"] < 1e-4
        assert report["where"].startswith("float32, ")
        timed = {"float32"} if report["maker"] == "compiled" else {"float32", "bfloat16"}
        assert set(report["microseconds"]) == timed
        assert all(time > 0 for time in report["microseconds"].values())


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_pass_is_shown_and_the_exit_code_is_1(factor, run, monkeypatch):
    right = cpu.patch_norm
    monkeypatch.setattr(cpu, "patch_norm", lambda *args: right(*args) * factor)
    code, out, err = run("doctor")
    assert code == 1
    blocks = one_line(out.partition("blocks on cpu")[2].partition(" on cpu")[0])
    assert "patch_norm no: float32, " in blocks
    assert blocks.count(" no: ") == 1
    assert "all passes agree" not in out
    assert err.startswith("error: wrong results: blocks patch_norm on cpu. ")
    assert "Traceback" not in err
    code, out, err = run("doctor", "--json")
    assert code == 1
    wrong = [report for report in json.loads(out)["passes"] if not report["agrees"]]
    assert [report["name"] for report in wrong] == ["patch_norm"]
    assert wrong[0]["deviation"] is None if factor != factor else wrong[0]["deviation"] == pytest.approx(0.01, rel=1e-3)


def test_a_kernel_that_does_not_run_is_shown_with_the_reason(run, monkeypatch):
    def broken():
        raise OSError("no compiler was found")

    monkeypatch.setattr(triton, "serves", lambda device: True)
    monkeypatch.setattr(triton, "_kernels", broken)
    code, out, err = run("doctor")
    assert code == 1
    assert "kernel normalize_rows no: OSError: no compiler was found" in one_line(out.partition("Triton on cpu")[2])
    assert "Triton kernel normalize_rows on cpu" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda patch: patch.setattr(triton._switch, "on", False), "kernels switched off"),
        (lambda patch: patch.setenv("CC", "/nowhere/cc"), "C compiler none was found"),
        (lambda patch: patch.setenv("PATH", ""), "C++ compiler none was found"),
    ],
)
def test_what_is_missing_is_said(change, words, run, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Examination(doctor.environment(), "", []))
    monkeypatch.setattr(triton, "_has_triton", lambda: True)
    monkeypatch.setattr(doctor, "find_spec", lambda _: True)
    change(monkeypatch)
    code, out, _ = run("doctor")
    assert code == 0
    assert words in one_line(out)
