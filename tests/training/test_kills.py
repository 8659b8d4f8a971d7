"""The program in processes of its own: killed or stopped at any time, it goes on as if nothing had happened."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.small import (
    same,
)

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


NETWORK = """
from torch import nn

def small(num_classes=10, in_chans=1):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(8, 16, 3, 2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(16, num_classes))
"""


BEGIN = shlex.split(
    "finetune own.py:small --data digits --epochs 3 --img-size 8 --batch-size 128 --lr 0.01 --ema "
    "0.9 --checkpoint-minutes 0 --device cpu"
)


FORKS = """
import json, os, sys
import sklearn.datasets, sklearn.model_selection, timm.data, timm.optim, timm.scheduler, timm.utils, torchvision
import sphereify.cli, sphereify.training.run, sphereify.training.comparison, sphereify.plots
import matplotlib.backends.backend_agg

for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv = ["sphereify", *asked]
        sphereify.cli.main()
        sys.exit()
"""


class Commands:
    """The program in processes of its own, which do not each import torch anew."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.parent = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def _ask(self, question: object) -> int:
        self.parent.stdin.write(json.dumps(question) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def start(self, *arguments: str) -> int:
        return self._ask(arguments)

    def wait(self, process: int) -> tuple[int, str]:
        return self._ask(process), (self.folder / "log.txt").read_text()

    def stop(self, process: int, number: int, folder: Path, step: int) -> tuple[int, str]:
        """Send a signal once the checkpoint of a step is there."""
        for _ in range(60_000):
            if any(int(path.stem) >= step for path in folder.glob("checkpoints/[0-9]*.safetensors")):
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(process, number)
        return self.wait(process)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands"))
    (made.folder / "own.py").write_text(textwrap.dedent(NETWORK))
    yield made
    made.parent.stdin.close()
    made.parent.stdout.close()
    made.parent.wait()


@pytest.fixture(scope="module")
def uninterrupted(commands) -> Path:
    code, out = commands.wait(commands.start(*BEGIN, "-o", "uninterrupted"))
    assert code == 0, out
    return commands.folder / "uninterrupted"


def assert_same_runs(one: Path, other: Path) -> None:
    for part in ("last", "best"):
        a, b = (load_file(run / part / "model.safetensors") for run in (one, other))
        assert same(a, b), part
    a, b = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other))
    assert [{**row, "images_per_second": None} for row in a] == [{**row, "images_per_second": None} for row in b]


def assert_readable(folder: Path) -> None:
    assert [load_file(path) for path in folder.rglob("*.safetensors")]
    assert [json.loads(path.read_text()) for path in folder.rglob("*.json")]


@pytest.mark.parametrize(("workers", "kills"), [(0, (1, 5, 11, 24)), (2, (3, 17))])
def test_a_killed_run_goes_on_bit_by_bit(commands, uninterrupted, workers, kills):
    folder = commands.folder / f"killed{workers}"
    arguments = [*BEGIN, "-o", folder.name, "--workers", str(workers)]
    for step in kills:
        code, _ = commands.stop(commands.start(*arguments), signal.SIGKILL, folder, step)
        assert code == -signal.SIGKILL, "the run was over before it could be killed"
        assert_readable(folder)
        arguments = ["finetune", "--resume", folder.name]
    code, out = commands.wait(commands.start(*arguments))
    assert code == 0, out
    assert_same_runs(uninterrupted, folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_its_code_and_the_command_to_go_on(commands, uninterrupted, number, code):
    folder = commands.folder / f"my {number.name}"
    got, out = commands.stop(commands.start(*BEGIN, "-o", folder.name), number, folder, 6)
    assert got == code
    assert f"stopped by {number.name} after step " in out
    assert out.splitlines()[-1].endswith(f"Continue with: sphereify finetune --resume 'my {number.name}'")
    assert "error" not in out
    got, out = commands.wait(commands.start("finetune", "--resume", folder.name))
    assert got == 0, out
    assert_same_runs(uninterrupted, folder)


def test_a_run_is_continued_with_its_own_options_only(commands, uninterrupted):
    for given, differences in (
        (["--lr", "0.02", "--epochs", "3"], "--lr: 0.01 before, 0.02 now"),
        (
            ["other.py:small", "--mhe", "1"],
            "--mhe: 0.0 before, 1.0 now; --model: own.py:small before, other.py:small now",
        ),
        (["--operator", "linear"], "--operator: cosine before, linear now"),
    ):
        code, out = commands.wait(commands.start("finetune", *given, "--resume", "uninterrupted"))
        assert code == 2
        assert f"error: uninterrupted: cannot be continued otherwise than it began: {differences}\n" == out
    code, out = commands.wait(commands.start("finetune", "--resume", "nowhere"))
    assert (code, out) == (2, "error: --resume: nowhere is not the folder of a run, there is no run.json in it\n")


def test_the_program_continues_a_finished_run(commands, uninterrupted):
    code, out = commands.wait(commands.start("finetune", "--resume", "uninterrupted", "--workers", "1"))
    assert (code, "test accuracy" in out) == (0, True), out


def test_a_damaged_record_of_the_options_is_told(commands):
    (commands.folder / "odd").mkdir()
    (commands.folder / "odd" / "run.json").write_text('{"epochs": ')
    code, out = commands.wait(commands.start("finetune", "--resume", "odd"))
    assert (code, "run.json" in out, "not foreseen" in out) == (1, True, False), out
