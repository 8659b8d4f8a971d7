"""Settings, terms of the loss and options of images: each is checked by itself and with the others."""

import math

import pytest
import torch

from sphereify.errors import UsageError
from sphereify.training import (
    Settings,
    Terms,
    finetune,
)
from tests.training.small import CPU, images, net


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("epochs", 0, "epochs: got 0, expected a number of at least 1"),
        ("epochs", -2, "epochs: got -2, expected a number of at least 1"),
        ("batch_size", 0, "batch_size: got 0, expected a number of at least 1"),
        ("workers", -1, "workers: got -1, expected a number of at least 0"),
        ("weight_decay", -0.1, "weight_decay: got -0.1, expected a number of at least 0"),
        ("lr", 0.0, "lr: got 0.0, expected a number above 0. Usual: 1e-4 to 1e-3 with adamw"),
        ("lr", -1.0, "lr: got -1.0, expected a number above 0"),
        ("sched", "plateau", "sched: plateau cannot be continued after a stop"),
        ("sched", "multistep", "milestones: none given, expected the epochs after which multistep lowers the rate"),
        ("decay_epochs", 0.0, "decay_epochs: got 0.0, expected a number above 0"),
        ("decay_rate", 0.0, "decay_rate: got 0.0, expected a number above 0 and at most 1"),
        ("epoch_batches", 0, "epoch_batches: got 0, expected a number of at least 1"),
        ("lr", math.nan, "lr: got nan, expected a number above 0"),
    ],
)
def test_a_setting_out_of_range_is_told_with_its_option(setting, value, text):
    with pytest.raises(UsageError, match=text):
        Settings(**{setting: value})


@pytest.mark.parametrize(
    "setting", [{"mhe_s": 2.0}, {"mhe_half_space": True}, {"mhe_distance": "angular"}, {"mhe_output": 10.0}]
)
def test_a_kind_of_energy_without_its_weight_is_told(setting):
    with pytest.raises(UsageError, match=f"{next(iter(setting))}: no effect without mhe, whose usual weight is 1"):
        Terms(**setting)


def test_an_unknown_distance_of_filters_is_told():
    with pytest.raises(UsageError, match="mhe_distance: got 'manhattan', expected one of euclidean, angular"):
        Terms(mhe=1.0, mhe_distance="manhattan")


def test_settings_at_their_limits_are_fine():
    finetune(net(), images(4), Settings(epochs=1, batch_size=2, weight_decay=0, workers=0, **CPU))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"device: got '{device}', but torch sees no CUDA device.*take 'cpu'"):
        Settings(device=device)


def test_a_device_that_torch_does_not_know_is_an_error():
    with pytest.raises(UsageError, match="device: got 'gpu'"):
        _ = Settings(device="gpu").chosen_device


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_cuda_is_taken_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert Settings().chosen_device == torch.device(device)
    assert Settings(device="cpu").chosen_device == torch.device("cpu")


def test_one_pattern_or_a_list_is_as_good_as_a_tuple():
    assert Settings(freeze="a", milestones=3) == Settings(freeze=["a"], milestones=[3])
