"""A run that was killed, crashed or stopped goes on, bit by bit, as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sphereify import sphereify
from sphereify.datasets import Data
from sphereify.errors import ArtifactError, Interrupted, UsageError
from sphereify.training import Result, Settings, Terms, finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from tests.training.test_run import Augmented, images, same, state

ROOT = Path(__file__).parents[1]


class Layered(nn.Sequential):
    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^0", "blocks": r"^(\d+)"}


def net(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    plain = Layered(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip
    return sphereify(plain, inplace=True, **options)


def usual(**settings) -> Settings:
    """Six batches an epoch, and a checkpoint after each step."""
    return Settings(**{"epochs": 3, "batch_size": 4, "checkpoint_minutes": 0, "device": "cpu", "lr": 0.01, **settings})


class Crash(Exception):
    pass


def crash_at(step: int):
    """Before the checkpoint of that step."""

    def on_step(now) -> None:
        if now.number == step:
            raise Crash

    return on_step


def told(result: Result) -> list[dict]:
    """All but how fast it was."""
    return [{**vars(epoch), "images_per_second": None} for epoch in result.epochs]


# ------------------------------------------------------------------------------------------------------------ Python

WAYS = {
    "plain": ({}, {}),
    "average and accumulation": ({}, {"ema": 0.8, "accumulate": 4}),
    "mixup and cutmix": ({}, {"mixup": 0.4, "cutmix": 1.0}),
    "learned k, a number a filter": ({"operator": "learnable-sigmoid"}, {}),
    "a margin that comes in": ({"head": "a-softmax", "margin": 3}, {}),
    "other terms": ({}, {"terms": Terms(label_smoothing=0.1, mhe=1.0, orthogonality=1e-3)}),
    "lamb": ({}, {"opt": "lamb"}),
    "lamb, channels last, clipped": ({}, {"opt": "lamb", "channels_last": True, "clip_grad": 0.1}),
    "sgd, step": ({}, {"opt": "sgd", "sched": "step"}),
    "multistep": ({}, {"sched": "multistep", "milestones": (1, 2)}),
    "half precision": ({}, {"amp": "bf16"}),
    "layer decay, head first": ({}, {"layer_decay": 0.5, "warmup_head_epochs": 2}),
    "frozen": ({}, {"freeze": ("0", "1")}),
}


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_crashed_run_goes_on_as_if_it_had_not(tmp_path, way, at):
    options, settings = WAYS[way]
    settings = usual(**settings)
    steps = -(-6 // settings.accumulate)
    model = net(**options)
    expected = told(finetune(model, images(), settings))
    for crash in (at, steps + at):  # in the first epoch, and in the second
        with pytest.raises(Crash):
            finetune(net(crash, **options), images(), settings, output=tmp_path, resume=crash > at,
                     on_step=crash_at(min(crash, 3 * steps))) if crash > at else finetune(
                net(**options), images(), settings, output=tmp_path, on_step=crash_at(crash))  # fmt: skip
    continued = net(99, **options)
    torch.manual_seed(99)
    assert told(finetune(continued, images(), settings, output=tmp_path, resume=True)) == expected
    assert same(state(model), state(continued))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{**row, "images_per_second": None} for row in rows] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_does_not_depend_on_interruption_or_workers(tmp_path, workers):
    plain = images()
    data = Data(plain.name, Augmented(plain.train), plain.test, plain.classes, plain.image_size)
    model = net()
    finetune(model, data, usual(epochs=2))
    with pytest.raises(Crash):
        finetune(net(), data, usual(epochs=2, workers=workers), output=tmp_path, on_step=crash_at(4))
    continued = net(99)
    finetune(continued, data, usual(epochs=2), output=tmp_path, resume=True)
    assert same(state(model), state(continued))


def test_the_count_of_the_margin_goes_on(tmp_path):
    settings = usual(epochs=1)
    with pytest.raises(Crash):
        finetune(net(head="a-softmax"), images(), settings, output=tmp_path, on_step=crash_at(4))
    counts = [read_checkpoint(path)["objective"] for path in checkpoints(tmp_path / "checkpoints")]
    finetune(net(head="a-softmax"), images(), settings, output=tmp_path, resume=True)
    counts.append(read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["objective"])
    assert [[int(value) for value in count.values()] for count in counts] == [[2], [3], [6]]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_that_is_continued_is_told_again(tmp_path, epochs):
    model, continued = net(), net(99)
    result = finetune(model, images(), usual(epochs=epochs, ema=0.8), output=tmp_path)
    (tmp_path / "summary.json").unlink()  # killed just before
    again = finetune(continued, images(), usual(epochs=epochs, ema=0.8), output=tmp_path, resume=True)
    assert again == result
    assert same(state(model), state(continued))
    assert json.loads((tmp_path / "summary.json").read_text())["accuracy"] == result.accuracy


def test_two_checkpoints_are_kept(tmp_path):
    seen = []

    def look(_) -> None:
        seen.append([int(path.stem) for path in checkpoints(tmp_path / "checkpoints")])

    finetune(net(), images(), usual(epochs=1), output=tmp_path, on_step=look)
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


def test_without_an_output_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(net(), images(), usual(epochs=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_says_how_to_go_on(tmp_path, number, code):
    settings = usual(checkpoint_minutes=60)
    model = net()
    finetune(model, images(), settings)
    steps = []

    def on_step(step) -> None:
        steps.append(step.number)
        if step.number == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3; resume=True, "
                       f"or the same comparison again, continues it from {tmp_path}$") as caught:  # fmt: skip
        finetune(net(), images(), settings, output=tmp_path, on_step=on_step)
    assert signal.getsignal(number) is before
    assert caught.value.exit_code == code
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [
        "000000000.safetensors", "000000003.safetensors"
    ]  # fmt: skip
    continued = net(99)
    finetune(
        continued, images(), settings, output=tmp_path, resume=True, on_step=lambda step: steps.append(step.number)
    )
    assert steps == list(range(1, 19))
    assert same(state(model), state(continued))


def test_a_run_continued_otherwise_is_refused_with_each_difference(tmp_path):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    other = usual(epochs=2, lr=0.5, workers=1, terms=Terms(mhe=1.0), freeze=("0",))
    with pytest.raises(UsageError) as caught:
        finetune(net(), images(), other, output=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path}: cannot be continued otherwise than it began: --epochs: 1 before, 2 now; --lr: 0.01 before, 0.5 "
        f"now; --freeze: () before, ('0',) now; --mhe: 0.0 before, 1.0 now"
    )
    renamed = Data("others", images().train, images().test, images().classes, images().image_size)
    with pytest.raises(UsageError, match=r"began: --data: patterns before, others now$"):
        finetune(net(), renamed, usual(epochs=1), output=tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    text = r"000000006\.safetensors: is of another model; the two differ in 0\.operator\."
    with pytest.raises(UsageError, match=text):
        finetune(net(operator="learnable-sigmoid"), images(), usual(epochs=1), output=tmp_path, resume=True)


def test_a_continued_run_needs_a_folder_with_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="resume: needs output"):
        finetune(net(), images(), usual(), resume=True)
    with pytest.raises(ArtifactError, match="there is no checkpoint to continue from"):
        finetune(net(), images(), usual(), output=tmp_path, resume=True)


# --------------------------------------------------------------------------------------------------------------- disk


def values() -> dict:
    return {"a": [1, (2.5, None, "x")], "b": {3: torch.arange(4.0), "t": torch.ones(2, 2, dtype=torch.int64)}}


def test_a_checkpoint_comes_back_as_it_was_given(tmp_path):
    back = read_checkpoint(write_checkpoint(tmp_path, 7, values()))
    assert back["a"] == [1, (2.5, None, "x")]
    assert list(back["b"]) == [3, "t"]
    torch.testing.assert_close(back["b"], values()["b"], rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_a_damaged_checkpoint_is_told(tmp_path, keep):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    last = checkpoints(tmp_path / "checkpoints")[-1]
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=rf"{last.name}: cannot be read as a checkpoint \("):
        finetune(net(), images(), usual(epochs=1), output=tmp_path, resume=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path, monkeypatch, error):
    def full(tensors, path, metadata=None) -> None:
        if int(Path(path.name.removeprefix(".")).stem) >= 4:
            Path(path).write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("sphereify.training.checkpoint.save_file", full)
    with pytest.raises(ArtifactError, match=r"000000004.safetensors: cannot be written \(.*No space left on device\). "
                       r"Earlier checkpoints are kept\."):  # fmt: skip
        finetune(net(), images(), usual(), output=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000000002.safetensors", "000000003.safetensors"
    ]  # fmt: skip
    monkeypatch.undo()
    model, continued = net(), net(99)
    finetune(model, images(), usual())
    finetune(continued, images(), usual(), output=tmp_path, resume=True)
    assert same(state(model), state(continued))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    write_checkpoint(tmp_path, 1, values())
    (tmp_path / ".000000002.partial").write_bytes(b"half of it")
    assert [path.name for path in checkpoints(tmp_path)] == ["000000001.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["000000001.safetensors"]


# ---------------------------------------------------------------------------------------------------- killed, for real

NETWORK = """
from torch import nn

def small(num_classes=10, in_chans=1):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(8, 16, 3, 2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(16, num_classes))
"""
BEGIN = ["finetune", "own.py:small", "--data", "digits", "--epochs", "3", "--img-size", "8", "--batch-size", "128",
         "--lr", "0.01", "--ema", "0.9", "--checkpoint-minutes", "0", "--device", "cpu"]  # fmt: skip
FORKS = """
import json, os, sys
import sklearn.datasets, sklearn.model_selection, timm.data, timm.optim, timm.scheduler, timm.utils, torchvision
import sphereify.cli, sphereify.training, sphereify.plots, matplotlib.backends.backend_agg

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
        self.parent = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, cwd=folder, env=environment)  # fmt: skip

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
    folder = commands.folder / number.name
    got, out = commands.stop(commands.start(*BEGIN, "-o", folder.name), number, folder, 6)
    assert got == code
    assert f"stopped by {number.name} after step " in out
    assert out.splitlines()[-1].endswith(f"Continue with: sphereify finetune --resume {folder.name}")
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
