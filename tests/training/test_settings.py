"""Settings, terms of the loss and options of images: each is checked by itself and with the others."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sphereify.errors import UsageError, spelled
from sphereify.options import options_of
from sphereify.training import DataOptions, Settings, Terms, finetune
from sphereify.training.settings import differences
from tests.training.small import CPU, images, net

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        (
            {"mhe_energy": "separation", "mhe_s": 2.0},
            "mhe_s: has no effect on mhe_energy='separation'; it belongs to mhe and compressive",
        ),
        (
            {"mhe_energy": "determinant", "mhe_distance": "angular"},
            "mhe_distance: has no effect on mhe_energy='determinant'; it belongs to mhe, compressive and separation",
        ),
        ({"mhe_dimensions": 20}, "mhe_dimensions: has no effect on mhe_energy='mhe'; it belongs to compressive"),
        ({"mhe_energy": "compressive", "mhe_gamma": 2.0}, "mhe_gamma: has no effect on mhe_energy='compressive'"),
        ({"mhe_energy": "compression"}, "mhe_energy: got 'compression', expected one of mhe, compressive, .*mean"),
        ({"mhe_energy": "compressive", "mhe_dimensions": 1}, "mhe_dimensions: got 1, expected a number of at least 2"),
        ({"mhe_energy": "compressive", "mhe_projections": 0}, "mhe_projections: got 0, expected a number of at least"),
        ({"mhe_energy": "determinant", "mhe_gamma": 0.0}, "mhe_gamma: got 0.0, expected a number above 0"),
    ],
)
def test_an_option_of_another_energy_is_told(terms, text):
    with pytest.raises(UsageError, match=text):
        Terms(mhe=1.0, **terms)


def test_projections_wider_than_a_layer_are_told_before_training():
    terms = Terms(mhe=1.0, mhe_energy="compressive", mhe_dimensions=20)
    text = r"0: mhe_dimensions=20: a projection cannot be wider than its filters, which have 18 inputs. Take at most 18"
    with pytest.raises(UsageError, match=text):
        finetune(net(), images(4), Settings(epochs=1, batch_size=2, terms=terms, **CPU))


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


@pytest.mark.parametrize(
    "settings",
    [
        Settings(**CPU),
        Settings(freeze="re:a", milestones=(1, 5), warmup_epochs=0.5, terms=Terms(mhe=0.5, mhe_s=2.0), **CPU),
    ],
)
def test_settings_come_back_from_json(settings):
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_an_unknown_setting_in_json_is_told_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"option: got 'epoch', expected one of epochs, .* Did you mean 'epochs'"):
        Settings.from_json({"epoch": 3})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"warmup_epochs": 3.0, "epochs": 2}, "warmup_epochs: got 3.0, expected at most the 2 of epochs"),
        ({"fsdp": True, "ema": 0.9}, "fsdp: does not go with ema"),
        ({"fsdp": True, "amp": "fp16"}, "fsdp: does not go with amp='fp16'"),
        ({"fsdp": True, "compile": True}, "fsdp: does not go with compile"),
        ({"fsdp": True, "warmup_head_epochs": 1}, "fsdp: does not go with warmup_head_epochs"),
        ({"amp": "bf61"}, "amp: got 'bf61', expected one of none, bf16, fp16. Did you mean 'bf16'"),
        ({"epochs": 1.5}, "epochs: got 1.5, expected a whole number of at least 1"),
        ({"epoch_batches": 2.0}, "epoch_batches: got 2.0, expected a whole number of at least 1"),
        ({"teacher_weight": 1.5}, "teacher_weight: got 1.5, expected a number of at least 0 and at most 1"),
        ({"device": "meta"}, "device: got 'meta', expected a device that holds values"),
    ],
)
def test_settings_that_do_not_go_together_are_told(settings, text):
    with pytest.raises(UsageError, match=text):
        Settings(**{**CPU, **settings})


def test_sharding_goes_with_other_half_precision():
    assert Settings(fsdp=True, amp="BF16", **CPU).amp == "bf16"


def test_differences_are_those_that_change_what_is_learned():
    before = Settings(lr=0.001, terms=Terms(mhe=1.0), **CPU)
    now = Settings(lr=0.5, workers=3, checkpoint_minutes=1, terms=Terms(mhe=2.0), **CPU)
    assert [spelled(text) for text in differences(before, now)] == [
        "lr: 0.001 before, 0.5 now",
        "mhe: 1.0 before, 2.0 now",
    ]
    assert differences(before, before) == []


def test_images_need_a_data_set_and_sizes_of_at_least_one():
    assert DataOptions("digits", img_size=1, train_images=1).test_images is None
    with pytest.raises(UsageError, match="data: is missing; digits, a folder with train/ and val/"):
        DataOptions()
    for name in ("img_size", "train_images", "test_images"):
        with pytest.raises(UsageError, match=f"{name}: got 0, expected a number of at least 1"):
            DataOptions("digits", **{name: 0})


@pytest.mark.parametrize("options", [Settings, Terms, DataOptions])
def test_each_field_is_an_option_with_a_sentence_of_help_in_a_panel(options):
    names = {field.name for field in dataclasses.fields(options)} - {"terms"}
    assert options_of(options).keys() == names
    for about in options_of(options).values():
        assert about.panel
        assert about.help[-1] in ".…"
        assert about.help[0].isupper() or about.help.startswith(("digits", "α"))


def test_options_load_no_torch():
    code = (
        "import sys\n"
        "from sphereify import Settings, training\n"
        "assert {'finetune', *training.__all__} <= set(dir(training))\n"
        "training.Terms(mhe=1.0), training.DataOptions('digits')\n"
        "print(*sorted(sys.modules.keys() & {'torch', 'numpy', 'timm', 'typer', 'sphereify.training.run'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
