"""Checkpoints of other tools: what plain torch loads is loaded, and no code of the file runs."""

import argparse
import re
from collections import defaultdict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from sphereify.errors import ArtifactError, UsageError
from sphereify.models import SourceOptions, open_model, untrained_part
from sphereify.sources import Source, build_model
from sphereify.weights.loading import load_weights


def net(seed: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def saved(content: object, path: Path, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def assert_filled(path: Path, expected: nn.Module) -> None:
    model = net(seed=9)
    assert load_weights(model, path) == []
    assert [*model.state_dict()] == [*expected.state_dict()]
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


class Colour(Enum):
    RED = 1


class Attributes(dict):
    """A dictionary of a class of its own, as Lightning keeps hyperparameters."""


class Names(list):
    pass


class Config:
    def __init__(self):
        self.lr = 0.1


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(model="resnet", lr=0.1, place=Path("data")),
        np.float64(77.1),
        np.arange(3),
        Path("data"),
        Colour.RED,
        Config(),
        Attributes(lr=0.1, nested=Attributes(a=1)),
        Names(["cat", "dog"]),
        defaultdict(list, a=[1]),
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": np.float32(1)}]}},
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_lies_beside_the_weights_does_not_matter(tmp_path, beside, old_format):
    content = {"args": beside, "state_dict": net().state_dict(), "again": beside}
    path = saved(content, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=not old_format)
    assert_filled(path, net())


def test_a_checkpoint_of_timms_own_saver_is_loaded(tmp_path):
    model = net()
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model="net", lr=0.1),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, np.float64(0.5))
    assert_filled(tmp_path / "model_best.pth.tar", model)


@pytest.mark.parametrize(
    "place",
    [("net",), ("model_state_dict",), ("network", "weights"), ("params",), ("model_ema",), ("state", "model", "g")],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "model._orig_mod.", "backbone."])
def test_weights_are_found_wherever_they_lie(tmp_path, place, prefix):
    content: dict = {f"{prefix}{name}": tensor for name, tensor in net().state_dict().items()}
    for key in reversed(place):
        content = {"epoch": 3, key: content}
    assert_filled(saved(content, tmp_path / "c.pt"), net())


def test_an_averaged_model_and_what_a_wrapper_has_of_its_own(tmp_path):
    assert_filled(saved(torch.optim.swa_utils.AveragedModel(net()).state_dict(), tmp_path / "a.pt"), net())
    lightning = {f"model.{name}": tensor for name, tensor in net().state_dict().items()}
    lightning["criterion.weight"] = torch.ones(2)
    assert_filled(saved({"state_dict": lightning}, tmp_path / "l.ckpt"), net())


@pytest.mark.parametrize("average", ["ema_model.", "model_ema.module."])
def test_an_average_inside_the_same_dictionary_is_preferred(tmp_path, average):
    state = {f"model.{name}": tensor for name, tensor in net(1).state_dict().items()}
    state |= {f"{average}{name}": tensor for name, tensor in net(2).state_dict().items()}
    assert_filled(saved({"state_dict": state}, tmp_path / "c.ckpt"), net(2))


def test_of_two_networks_that_fit_none_is_guessed(tmp_path):
    path = saved({"student": net(1).state_dict(), "teacher": net(2).state_dict()}, tmp_path / "c.pt")
    model = net(3)
    with pytest.raises(ArtifactError, match="holds several networks that fit Sequential: student, teacher; save"):
        load_weights(model, path)
    assert torch.equal(model[0].weight, net(3)[0].weight)
    assert_filled(saved({"a": net(1).state_dict(), "b": net(1).state_dict()}, path), net(1))


def test_arrays_are_weights_too(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in net().state_dict().items()}
    assert_filled(saved({"model": arrays}, tmp_path / "c.pkl"), net())


def test_counts_that_old_checkpoints_lack_are_not_missed(tmp_path):
    state = {name: tensor for name, tensor in net().state_dict().items() if "num_batches" not in name}
    assert_filled(saved(state, tmp_path / "old.pth"), net())


class Translating(nn.Module):
    """A module that knows its older names, and that older versions kept the weight transposed."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        for own in ("weight", "bias"):
            if f"{prefix}linear.{own}" in state:
                state[f"{prefix}fc.{own}"] = state.pop(f"{prefix}linear.{own}")
        if metadata.get("version") != 2:
            state[f"{prefix}fc.weight"] = state[f"{prefix}fc.weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize(("names", "wrapped"), [("fc", False), ("linear", False), ("fc", True)])
@pytest.mark.parametrize("versioned", [True, False])
def test_a_module_that_translates_its_state_does_so(tmp_path, names, versioned, wrapped):
    expected = Translating()
    state = (nn.ModuleDict({"module": expected}) if wrapped else expected).state_dict()
    versions = state._metadata
    state = type(state)((name.replace("fc", names), tensor) for name, tensor in state.items())
    if versioned:
        state._metadata = versions
    plain, own = Translating(), Translating()
    bare = type(state)((name.removeprefix("module."), tensor) for name, tensor in state.items())
    if versioned:
        bare._metadata = expected.state_dict()._metadata
    plain.load_state_dict(bare, strict=True)
    load_weights(own, saved(state, tmp_path / "c.pt"))
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=0, atol=0)


RAN = []


def spring(number):
    RAN.append(number)


class Trap:
    def __reduce__(self):
        return spring, (1,)


class DeeperTrap:
    def __reduce__(self):
        return RAN.append, (1,)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_no_code_of_the_file_runs_and_what_is_not_read_is_named_in_plain_text(tmp_path):
    assert_filled(saved({"trap": Trap(), "state_dict": net().state_dict()}, tmp_path / "c.pt"), net())
    for content, named in (({"model": net()}, "torch.nn.modules.container.Sequential"), (Config(), "Config")):
        with pytest.raises(
            ArtifactError, match=rf"cannot be read as a checkpoint .*{re.escape(named)}.* state_dict\(\)"
        ):
            load_weights(net(), saved(content, tmp_path / "c.pt"))
    with pytest.raises(ArtifactError, match=r"call reduce for unrecognized function builtins\.getattr\(\)"):
        load_weights(net(), saved({"trap": DeeperTrap(), "state_dict": net().state_dict()}, tmp_path / "c.pt"))
    with pytest.raises(
        ArtifactError, match=r"missing.* Objects of tests\.weights\.test_loading\.spring in it are not read"
    ):
        load_weights(net(), saved({"0.bias": torch.zeros(9), "trap": Trap()}, tmp_path / "c.pt"))
    (tmp_path / "script.pt").unlink(missing_ok=True)
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ArtifactError, match="TorchScript") as caught:
        load_weights(net(), tmp_path / "script.pt")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert RAN == []


# ----------------------------------------------------------------------------------------------------- other classes


def test_weights_of_other_classes_fill_all_but_the_classifier_and_that_is_said(tmp_path):
    trained = timm.create_model("test_resnet", num_classes=7)
    path = saved(trained.state_dict(), tmp_path / "seven.pt")
    model = open_model("test_resnet", SourceOptions(weights=path, num_classes=3))
    assert torch.equal(model.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)
    assert untrained_part(model) == f"{path} is for other classes than 3, so fc.weight, fc.bias are new"
    assert untrained_part(open_model("test_resnet", SourceOptions(weights=path, num_classes=7))) == ""
    with pytest.raises(ArtifactError, match="of another shape"):
        open_model("test_resnet", SourceOptions(weights=path))


def pretend_to_download(monkeypatch, name: str) -> dict:
    """Let torchvision's pretrained weights of a model be random ones, which are returned."""
    torch.manual_seed(0)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    sizes = {"aux_logits": True} if name == "googlenet" else {}
    if "detection" in torchvision.models.get_model_builder(name).__module__:
        sizes["weights_backbone"] = None
    state = torchvision.models.get_model(
        name, weights=None, num_classes=len(weights.meta["categories"]), **sizes
    ).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: state)
    return state


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("mobilenet_v3_small", marks=pytest.mark.exhaustive),
                                  pytest.param("googlenet", marks=pytest.mark.exhaustive),
                                  pytest.param("vit_b_32", marks=pytest.mark.exhaustive)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_pretrained_weights_of_torchvision_serve_other_classes_but_for_the_classifier(monkeypatch, name):
    state = pretend_to_download(monkeypatch, name)
    model = build_model(Source("torchvision", name, {"num_classes": 3}), pretrained=True).eval()
    own = model.state_dict()
    new = [key for key in own if own[key].shape != state[key].shape]
    assert 0 < len(new) <= 2
    assert all(torch.equal(own[key], state[key]) for key in own if key not in new)
    assert f"{', '.join(new)} are new" in untrained_part(model)
    assert untrained_part(model).startswith("the pretrained weights are for 1000 classes, not 3")
    size = 64 if name != "vit_b_32" else 224
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)
    same = build_model(Source("torchvision", name, {"num_classes": 1000}), pretrained=True)
    assert untrained_part(same) == ""
    assert getattr(same, "transform_input", None) == getattr(model, "transform_input", None)


def test_a_detector_has_more_than_a_classifier_that_depends_on_the_classes(monkeypatch):
    name = "ssdlite320_mobilenet_v3_large"
    pretend_to_download(monkeypatch, name)
    with pytest.raises(UsageError, match="for 91 classes, and more than a classifier depends on them; drop num_class"):
        build_model(Source("torchvision", name, {"num_classes": 3}), pretrained=True)
