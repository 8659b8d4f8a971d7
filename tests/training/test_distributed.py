"""Several processes train as one with their batches together: as copies (DDP) or shards (FSDP2), also when killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x).relu()
        return self.fc(x.mean((2, 3)))

def net(num_classes=10):
    return Net(num_classes)
"""
BEGIN = shlex.split(
    "finetune own.py:net --data digits --train-images 192 --epochs 2 --img-size 12 --lr 0.01 "
    "--device cpu --operator learnable-sigmoid --head a-softmax --margin 2 --rescale always --mhe "
    "0.5 --orthogonality 0.01 --checkpoint-minutes 0 --radius 1 --learn-radius"
)


def start(folder: Path, processes: int, *arguments: str) -> subprocess.Popen:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "sphereify", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    (made / "own.py").write_text(textwrap.dedent(NETWORK))
    return made


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    finished(start(folder, 1, *BEGIN, "--batch-size", "32", "-o", "alone"))
    return folder / "alone"


def assert_close(one: Path, other: Path) -> None:
    for part in ("last", "best"):
        a, b = (load_file(run / part / "model.safetensors") for run in (one, other))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    for row, same in zip(*rows, strict=True):
        assert row["accuracy"] == same["accuracy"]
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert row["k"] == pytest.approx(same["k"], abs=1e-5)
        assert row["radius"] == pytest.approx(same["radius"], abs=1e-5)
        assert len(row["radius"]) == 3
        assert row["energy"] == pytest.approx(same["energy"], abs=1e-5)


@pytest.mark.parametrize("way", [[], ["--fsdp"]], ids=["copies", "shards"])
def test_two_processes_train_as_one_with_the_double_batch(folder, alone, way):
    name = "two" + "".join(way)
    out = finished(start(folder, 2, *BEGIN, *way, "--batch-size", "16", "-o", name))
    assert out.count("test accuracy") == 3  # one process speaks: two epochs, and the end
    assert_close(alone, folder / name)


@pytest.mark.parametrize("way", [[], ["--fsdp"]], ids=["copies", "shards"])
def test_two_processes_killed_go_on_as_if_nothing_had_happened(folder, alone, way):
    name = "killed" + "".join(way)
    process = start(folder, 2, *BEGIN, *way, "--batch-size", "16", "-o", name)
    wait_for_step(folder / name, 8)
    for child in children(process):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
    assert not (folder / name / "summary.json").exists(), "the run was over before it could be killed"
    finished(start(folder, 2, "finetune", "--resume", name))
    assert_close(alone, folder / name)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(30_000):
        if any(int(path.stem) >= step for path in run.glob("checkpoints/[0-9]*.safetensors")):
            return
        time.sleep(0.002)
    raise AssertionError("no checkpoint came")


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder):
    process = start(folder, 2, *BEGIN, "--batch-size", "16", "-o", "stopped")
    wait_for_step(folder / "stopped", 3)
    os.kill(children(process)[-1], signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert out.count("stopped by SIGTERM after step") >= 1
    assert "Continue with: " in out


def test_shards_need_several_processes(folder):
    process = start(folder, 1, *BEGIN, "--fsdp", "-o", "never")
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (
        2,
        "error: --fsdp: needs several processes; start it with torchrun --nproc-per-node N\n",
    )
    assert not (folder / "never").exists()
