"""Passes that take turns: they run only while they are waited for, and end when they are given up."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import calibrate, sphereify
from sphereify.calibration.lockstep import Pass, active_pass
from tests.calibration.networks import smooth_images


def test_a_pass_runs_only_while_it_is_waited_for():
    trace = []

    def body():
        for number in range(3):
            trace.append(number)
            active_pass().pause(number)

    a_pass = Pass(body, 0)
    assert trace == []
    assert [a_pass.advance() for _ in range(4)] == [0, 1, 2, None]
    assert trace == [0, 1, 2]


def test_a_pass_that_is_given_up_ends_its_thread():
    ended = []

    def body():
        try:
            active_pass().pause("here")
        finally:
            ended.append(True)

    before = threading.active_count()
    a_pass = Pass(body, 0)
    a_pass.advance()
    a_pass.close()
    assert ended == [True]
    assert threading.active_count() == before


def test_what_a_pass_raises_is_raised_where_it_is_waited_for():
    def body():
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        Pass(body, 0).advance()


class Interrupted(nn.Module):
    def __init__(self, at: int):
        super().__init__()
        self.first, self.second, self.at, self.calls = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), at, 0

    def forward(self, x):
        x = self.first(x)
        self.calls += 1
        if self.calls >= self.at:
            raise KeyboardInterrupt
        return F.leaky_relu(self.second(x.relu()), 1.0)


def test_no_thread_and_no_hook_is_left_after_an_interruption():
    original = Interrupted(10**9)
    model = sphereify(original)
    model.at, model.calls = 2, 0
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, original, list(torch.randn(24, 3, 8, 8).split(8)))
    assert threading.active_count() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, original) for m in net.modules())


def test_a_pass_that_catches_everything_still_ends():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            with contextlib.suppress(BaseException):  # as much existing code does
                x = self.a(x)
            return F.leaky_relu(self.b(x), 1.0)

    def stop(name, explained):
        raise KeyboardInterrupt

    original = Stubborn()
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(sphereify(original), original, smooth_images(16).split(8), on_layer=stop)
    assert threading.active_count() == before
