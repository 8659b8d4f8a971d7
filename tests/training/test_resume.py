"""A run that crashed or was stopped goes on, bit by bit, as if nothing had happened."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from sphereify.annotations import CALIBRATED
from sphereify.datasets import Data
from sphereify.errors import ArtifactError, Interrupted, UsageError
from sphereify.training import Result, Terms, finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint, read_last_checkpoint
from sphereify.training.recipe import recipe
from tests.training.small import (
    Augmented,
    Crash,
    crash_at,
    dropout_net,
    images,
    same,
    state,
    usual,
)


def untimed(result: Result) -> list[dict]:
    """All measurements but the speed."""
    return [{**vars(epoch), "images_per_second": None} for epoch in result.epochs]


WAYS = {
    "plain": ({}, {}),
    "average and accumulation": ({}, {"ema": 0.8, "accumulate": 4}),
    "mixup and cutmix": ({}, {"mixup": 0.4, "cutmix": 1.0}),
    "learned k, a number a filter": ({"operator": "learnable-sigmoid"}, {}),
    "learned radius, new parameters first": (
        {"radius": 1.0, "learn_radius": True},
        {"warmup_head_epochs": 1, "ema": 0.8},
    ),
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


FEW = {("average and accumulation", 2), ("mixup and cutmix", 4), ("a margin that comes in", 2)}
FEW |= {("learned k, a number a filter", 4), ("layer decay, head first", 2), ("sgd, step", 4)}
FEW |= {("learned radius, new parameters first", 4)}
"""The ways and steps of a crash that catch most defects together."""


@pytest.mark.parametrize(
    ("way", "at"),
    [
        pytest.param(way, at, marks=() if (way, at) in FEW else pytest.mark.exhaustive, id=f"{way}-{at}")
        for way in WAYS
        for at in (2, 4)
    ],
)
def test_a_crashed_run_goes_on_as_if_it_had_not(tmp_path, way, at):
    options, settings = WAYS[way]
    settings = usual(**settings)
    steps = -(-6 // settings.accumulate)
    model = dropout_net(**options)
    expected = untimed(finetune(model, images(), settings))
    with pytest.raises(Crash):  # in the first epoch
        finetune(dropout_net(**options), images(), settings, output=tmp_path, on_step=crash_at(at))
    with pytest.raises(Crash):  # and in the second
        finetune(
            dropout_net(at, **options),
            images(),
            settings,
            output=tmp_path,
            resume=True,
            on_step=crash_at(min(steps + at, 3 * steps)),
        )
    continued = dropout_net(99, **options)
    torch.manual_seed(99)
    assert untimed(finetune(continued, images(), settings, output=tmp_path, resume=True)) == expected
    assert same(state(model), state(continued))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{**row, "images_per_second": None} for row in rows] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_does_not_depend_on_interruption_or_workers(tmp_path, workers):
    plain = images()
    data = Data(plain.name, Augmented(plain.train), plain.test, plain.classes, plain.image_size)
    model = dropout_net()
    finetune(model, data, usual(epochs=2))
    with pytest.raises(Crash):
        finetune(dropout_net(), data, usual(epochs=2, workers=workers), output=tmp_path, on_step=crash_at(4))
    continued = dropout_net(99)
    finetune(continued, data, usual(epochs=2), output=tmp_path, resume=True)
    assert same(state(model), state(continued))


def test_the_count_of_the_margin_goes_on(tmp_path):
    settings = usual(epochs=1)
    with pytest.raises(Crash):
        finetune(dropout_net(head="a-softmax"), images(), settings, output=tmp_path, on_step=crash_at(4))
    counts = [read_checkpoint(path)["objective"] for path in checkpoints(tmp_path / "checkpoints")]
    finetune(dropout_net(head="a-softmax"), images(), settings, output=tmp_path, resume=True)
    counts.append(read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["objective"])
    assert [[int(value) for value in count.values()] for count in counts] == [[2], [3], [6]]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_that_is_continued_is_told_again(tmp_path, epochs):
    model, continued = dropout_net(), dropout_net(99)
    result = finetune(model, images(), usual(epochs=epochs, ema=0.8), output=tmp_path)
    (tmp_path / "summary.json").unlink()  # killed just before
    again = finetune(continued, images(), usual(epochs=epochs, ema=0.8), output=tmp_path, resume=True)
    assert again == result
    assert same(state(model), state(continued))
    assert json.loads((tmp_path / "summary.json").read_text())["accuracy"] == result.accuracy


def test_a_run_can_be_continued_from_its_very_beginning(tmp_path):
    class Killed(Exception):
        pass

    def kill(_) -> None:
        raise Killed

    settings = usual(epochs=1, checkpoint_minutes=60)
    with pytest.raises(Killed):
        finetune(dropout_net(), images(), settings, output=tmp_path, on_step=kill)
    model, continued = dropout_net(), dropout_net(99)
    finetune(model, images(), settings)
    finetune(continued, images(), settings, output=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(continued).values(), strict=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_says_how_to_go_on(tmp_path, number, code):
    settings = usual(checkpoint_minutes=60)
    model = dropout_net()
    finetune(model, images(), settings)
    steps = []

    def on_step(step) -> None:
        steps.append(step.number)
        if step.number == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted,
        match=f"stopped by {number.name} after step 3; resume=True, "
        f"or the same comparison again, continues it from {tmp_path}$",
    ) as caught:
        finetune(dropout_net(), images(), settings, output=tmp_path, on_step=on_step)
    assert signal.getsignal(number) is before
    assert caught.value.exit_code == code
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [
        "000000000.safetensors",
        "000000003.safetensors",
    ]
    continued = dropout_net(99)
    finetune(
        continued, images(), settings, output=tmp_path, resume=True, on_step=lambda step: steps.append(step.number)
    )
    assert steps == list(range(1, 19))
    assert same(state(model), state(continued))


def test_a_run_continued_otherwise_is_refused_with_each_difference(tmp_path):
    finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)
    other = usual(epochs=2, lr=0.5, workers=1, terms=Terms(mhe=1.0), freeze=("0",))
    with pytest.raises(UsageError) as caught:
        finetune(dropout_net(), images(), other, output=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path}: cannot be continued otherwise than it began: epochs: 1 before, 2 now; lr: 0.01 before, 0.5 "
        f"now; freeze: () before, ('0',) now; mhe: 0.0 before, 1.0 now"
    )
    renamed = Data("others", images().train, images().test, images().classes, images().image_size)
    with pytest.raises(UsageError, match=r"began: data: patterns before, others now$"):
        finetune(dropout_net(), renamed, usual(epochs=1), output=tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)
    text = r"000000006\.safetensors: belongs to another model; the two differ in 0\.operator\."
    with pytest.raises(UsageError, match=text):
        finetune(dropout_net(operator="learnable-sigmoid"), images(), usual(epochs=1), output=tmp_path, resume=True)


def test_a_continued_run_needs_a_folder_with_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="resume: needs output"):
        finetune(dropout_net(), images(), usual(), resume=True)
    with pytest.raises(ArtifactError, match="there is no checkpoint to continue from"):
        finetune(dropout_net(), images(), usual(), output=tmp_path, resume=True)


def test_what_settings_leave_open_follows_from_the_model_and_stays_in_a_run_that_is_continued(tmp_path):
    def begun(folder):
        saved = read_last_checkpoint(folder / "checkpoints")[1]["settings"]
        return saved["opt"], saved["lr"], saved["weight_decay"]

    def calibrated():
        model = dropout_net()
        CALIBRATED.write(model, True)
        return model

    left_open = usual(epochs=1, opt=None, lr=None, weight_decay=None)
    fresh, gentle = (tuple(vars(recipe(left_open, trained=trained)).values()) for trained in (False, True))
    for name, make, expected in (("fresh", dropout_net, fresh), ("kept", calibrated, gentle)):
        folder = tmp_path / name
        finetune(make(), images(), left_open, output=folder)
        assert begun(folder) == expected
        for again in (dropout_net, calibrated):  # the checkpoint holds what came of a calibration
            finetune(again(), images(), left_open, output=folder, resume=True)
    with pytest.raises(UsageError, match="opt: sgd before, adam now"):
        finetune(calibrated(), images(), replace(left_open, opt="adam"), output=tmp_path / "kept", resume=True)
