"""The benchmarks of speed: what is measured is kept, what failed is measured again, and the bytes are counted right."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import columns, gpu, plain_networks
from benchmarks.bench import Bench, ratios, spread
from benchmarks.record import Record, check_setting
from benchmarks.traffic import traffic
from sphereify.nn import SphereConv2d, SphereLinear


def bench(*models):
    return Bench(argparse.Namespace(device="cpu", dtype="float32", contiguous=False, operators=["cosine", "linear"],
                                    models=list(models), batch=2, size=32, rounds=1, compile=False))  # fmt: skip


def test_the_table_keeps_what_is_measured_and_repeats_what_failed(tmp_path, monkeypatch, capsys):
    calls, works = [], {"value": False}

    def first(network):
        calls.append((network.name, "first"))
        yield "a", {"ratios": {"cosine": {"median": 1.2}, "linear": {"median": 1.3}}, "allowed": 1.05}

    def second(network):
        calls.append((network.name, "second"))
        yield "b", {"note": "nothing to measure"}
        if not works["value"]:
            raise RuntimeError("out of | luck\nand more")
        yield "c", {"ratios": {"cosine": {"median": 2.0}}}

    monkeypatch.setattr(columns, "JOBS", {"first": (first, ("a",)), "second": (second, ("b", "c"))})
    monkeypatch.setattr(columns, "bandwidth", lambda _: 1e9)
    path = tmp_path / "speed.json"
    columns.measure(bench("one", "two"), ["first", "second"], Record(path, "here"))
    out = capsys.readouterr().out
    assert "| network | a | b | c |" in out
    assert "| one | 1.20 / 1.30 (1.05) |  | failed: RuntimeError: out of / luck |" in out
    data = json.loads(path.read_text())
    assert data["setting"] == "here"
    assert data["networks"]["two"]["c"] == {"error": "RuntimeError: out of | luck"}
    works["value"], calls[:] = True, []
    columns.measure(bench("one", "two"), ["first", "second"], Record(path, "here"))
    assert calls == [("one", "second"), ("two", "second")]
    assert "| two | 1.20 / 1.30 (1.05) |  | 2.00 |" in capsys.readouterr().out
    calls.clear()
    monkeypatch.setattr(columns, "bandwidth", None)
    columns.measure(bench("one", "two"), ["first", "second"], Record(path, "here"))
    assert calls == []
    with pytest.raises(SystemExit, match=r"speed\.json: was measured with another setting: here\nnow: there"):
        Record(path, "there")


def test_each_cell_is_written_before_the_next_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "speed.json"

    def job(network):
        yield "a", {"note": ""}
        assert json.loads(path.read_text())["networks"]["one"] == {"a": {"note": ""}}
        raise KeyboardInterrupt

    monkeypatch.setattr(columns, "JOBS", {"job": (job, ("a", "b"))})
    monkeypatch.setattr(columns, "bandwidth", lambda _: 1e9)
    with pytest.raises(KeyboardInterrupt):
        columns.measure(bench("one"), ["job"], Record(path, "here"))
    assert set(json.loads(path.read_text())["networks"]["one"]) == {"a"}


def test_a_job_measures_a_network_of_timm(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "bandwidth", lambda _: 1e10)
    record = Record(tmp_path / "speed.json", "here")
    columns.measure(bench("test_resnet"), ["training", "forward"], record)
    cells = record.cells("test_resnet")
    assert list(cells) == ["training", "SphereNorm", "forward"]
    assert list(cells["training"]["ratios"]) == list(cells["forward"]["ratios"]) == ["cosine", "linear"]
    for cell in cells.values():
        assert all(ratio["median"] > 0 for ratio in cell["ratios"].values())
        assert 0.5 < cell["allowed"] < 3
    assert cells["SphereNorm"]["allowed"] < cells["training"]["allowed"]


def test_the_traffic_of_angles_and_of_batch_norm():
    x, y = 2 * 3 * 8 * 8, 2 * 4 * 6 * 6
    images = torch.zeros(2, 3, 8, 8)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    assert traffic(plain, images) == (3 * y, 8 * y)
    angular = nn.Sequential(SphereConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert traffic(angular, images) == (3 * y + x + 2 * y, 8 * y + 4 * x + 5 * y)
    assert traffic(SphereConv2d(3, 4, 3, bias=True, rescale=True), images) == (x + 3 * y, 4 * x + 6 * y)
    assert traffic(SphereLinear(8, 5, bias=False), images) == (x + 2 * 240, 4 * x + 5 * 240)
    assert not any(module._forward_hooks for module in (*plain.modules(), *angular.modules()))


def test_spread_and_ratios():
    assert spread([2.0]) == (2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)
    assert ratios({"a": [1.0, 2.0], "b": [2.0, 6.0]}, "a")["b"][0] == 2.5


OPTIONS = argparse.Namespace(device="cpu")


def test_a_step_that_faults_or_takes_too_long_leaves_a_note():
    found = gpu.run(gpu.Step("fault", (sys.executable, "-c", "import os; print('so far'); os.abort()"), 9), 9, OPTIONS)
    assert found["exit_code"] == -6
    assert not gpu.is_done(found)
    waits = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    began = time.perf_counter()
    found = gpu.run(gpu.Step("slow", (sys.executable, "-c", waits), 60), 0.7, OPTIONS)
    assert time.perf_counter() - began < 20
    assert (found["exit_code"], gpu.how_it_ended(found)) == (None, "out of time")
    status = Path(f"/proc/{int(found['output'])}/status")
    for _ in range(50):  # until its own process has ended, too
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("a process of the step lives on")


def test_a_step_gives_json_from_what_it_prints_or_from_a_file():
    printed = gpu.run(gpu.Step("a", (sys.executable, "-c", "print('[1]')"), 9, "json"), 9, OPTIONS)
    assert (printed["exit_code"], printed["result"]) == (0, [1])
    assert gpu.is_done(printed | {"result": None})
    code = 'import sys; open(sys.argv[1], \'w\').write(\'{"networks": {"n": {"c": {"error": "e"}}}}\')'
    written = gpu.run(gpu.Step("b", (sys.executable, "-c", code, "FILE"), 9, "file"), 9, OPTIONS)
    assert written["exit_code"] == 0
    assert gpu.how_it_ended(written) == "failed: n: c"
    assert not gpu.is_done(written)


def test_the_steps_for_a_gpu_are_the_kernels_first_and_then_each_network_in_each_dtype():
    options = argparse.Namespace(device="cuda", quick=False, models=list(gpu.MODELS), batch=256, size=224, rounds=5)
    names = [step.name for step in gpu.steps(options)]
    assert names[:4] == ["nvidia-smi", "doctor", "kernels", "self-check"]
    assert len(names) == len(set(names)) == 4 + 2 * 2 * len(gpu.MODELS)
    assert names[4] == "eager, bfloat16, resnet50"
    assert names[-1] == "compiled, float16, mobilenetv3_large_100"
    options.quick = True
    assert [step.name for step in gpu.steps(options)][4:] == [
        f"{mode}, bfloat16, {name}" for mode in gpu.MODES for name in ("resnet50", "vit_small_patch16_224")
    ]


def test_what_is_kept_belongs_to_its_options_and_weights(tmp_path):
    file, kept = tmp_path / "rows.setting.json", [tmp_path / "rows.json"]
    one, other, same = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    jobs = iter(range(10))

    def check(*, strengths, **networks):  # the number of jobs, another one in each call, changes no result
        options = argparse.Namespace(strengths=strengths, data=tmp_path, jobs=next(jobs))
        check_setting(file, options, ("strengths", "data"), networks, kept)

    check(strengths=(1, 2), vgg=one)
    kept[0].touch()
    check(strengths=[1, 2], vgg=same)
    check(strengths=[1, 2], resnet20=other)  # another network, which is new
    known = file.read_text()
    assert set(json.loads(known)) == {"strengths", "data", "weights of vgg", "weights of resnet20"}
    for strengths, network, changed in (([1], one, r"strengths: \[1, 2\], now: \[1\]"),
                                        ([1, 2], other, "weights of vgg: ")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"error: .*measured with another {changed}"):
            check(strengths=strengths, vgg=network)
    assert file.read_text() == known
    file.unlink()
    with pytest.raises(
        SystemExit, match=r"rows\.json: nothing tells with which .*\n.*together with rows\.setting\.json"
    ):
        check(strengths=[1, 2], vgg=one)
    assert not file.exists()


@pytest.mark.processes
def test_accuracies_of_other_weights_or_options_are_not_taken_for_those_asked_for(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "photos" / part / "dog").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / part / "dog" / "one.png")
    program = [sys.executable, "-m", "benchmarks.finetuning", "--network", "vgg", "--variants", "original", "--prepare"]
    where = ["--data", tmp_path / "photos", "--plain", tmp_path, "--output", tmp_path / "out"]
    ended = []
    for weights, more in ((None, []), (0, []), (0, ["--lr", "0.1"]), (1, []), (0, [])):
        if weights is not None:
            torch.manual_seed(weights)
            torch.save(plain_networks.vgg().state_dict(), tmp_path / "vgg.pt")
        ended += [subprocess.run([*program, *where, *more], capture_output=True, text=True)]
    told = ["vgg.pt: no such file", "", "another lr: 0.02, now: 0.1", "another weights of vgg: ", ""]
    assert [one.returncode for one in ended] == [bool(text) for text in told], ended
    assert all(text in one.stderr and "Traceback" not in one.stderr for text, one in zip(told, ended, strict=True))
