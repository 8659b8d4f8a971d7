"""Opening a network by name, from a factory, with weights, or from an artifact."""

import dataclasses
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from sphereify import save, sphereify
from sphereify.errors import ArtifactError, UsageError
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.sources import build_model, find_model

TINY = "test_resnet"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def own() -> str:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=4, in_chans=3):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Identity(),\n"
        "                         nn.Flatten(), nn.Linear(6, num_classes))\n"
        "def features():\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())\n"
    )
    return "mine.py:small"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = build_model(find_model(TINY, num_classes=10, in_chans=1))
    return str(save(sphereify(model), tmp_path_factory.mktemp("saved") / "tiny"))


def test_a_name_gives_the_model_of_the_library_with_the_seed_of_the_options():
    model = open_model(TINY, SourceOptions(num_classes=3, in_chans=1, seed=5))
    torch.manual_seed(5)
    expected = timm.create_model(TINY, num_classes=3, in_chans=1)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_without_a_seed_the_generator_goes_on(own):
    torch.manual_seed(1)
    models = [open_model(own, SourceOptions(seed=seed)) for seed in (None, None, 1, 1)]
    weights = [model[0].weight for model in models]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    ("suffix", "key"), [(".safetensors", None), (".pt", None), (".pth", "state_dict"), (".pt", "model")]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_from_a_file(own, suffix, key, prefix):
    torch.manual_seed(9)
    state = build_model(find_model(own)).state_dict()
    tensors = {prefix + name: tensor for name, tensor in state.items()}
    file = Path("weights" + suffix)
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({key: tensors, "epoch": 3} if key else tensors, file)
    model = open_model(own, SourceOptions(weights=file))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (None, ["w.pt: there is no such file"]),
        (b"no checkpoint", ["w.pt: cannot be read as a checkpoint of tensors"]),
        ({"5.weight": (11, 6)}, ["w.pt: does not fit", "5.weight: (11, 6) in the file, (4, 6) in the model"]),
        ({"5.bias": None}, ["w.pt: does not fit Sequential", "1 missing: 5.bias"]),
        ({"9.weight": (2,)}, ["w.pt: does not fit Sequential", "1 not in the model: 9.weight"]),
        ([1, 2], ["w.pt: holds list, expected a dictionary of tensors"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(own, content, texts):
    if isinstance(content, bytes):
        Path("w.pt").write_bytes(content)
    elif isinstance(content, list):
        torch.save(content, "w.pt")
    elif content is not None:
        tensors = build_model(find_model(own)).state_dict()
        tensors.update({name: torch.zeros(shape) for name, shape in content.items() if shape})
        torch.save({name: tensor for name, tensor in tensors.items() if content.get(name, 0) is not None}, "w.pt")
    with pytest.raises(ArtifactError) as caught:
        open_model(own, SourceOptions(weights=Path("w.pt")))
    assert all(text in str(caught.value) for text in texts)


def test_a_torch_file_with_code_in_it_is_not_run(own):
    class Bomb:
        def __reduce__(self):
            return Path("exploded").touch, ()

    torch.save({"5.weight": Bomb()}, "w.pt")
    with pytest.raises(ArtifactError, match=r"w\.pt: cannot be read as a checkpoint of tensors"):
        open_model(own, SourceOptions(weights=Path("w.pt")))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("spec", [TINY, "torchvision:resnet18"])
def test_pretrained_weights_without_a_network_are_refused_with_the_way_around(monkeypatch, spec):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr("torchvision.models.get_model", unreachable)
    with pytest.raises(ArtifactError) as caught:
        open_model(spec, SourceOptions(pretrained=True))
    assert f"{spec}: its pretrained weights could not be fetched (Name or service not known)" in str(caught.value)
    assert str(caught.value).endswith("Download them where there is a network and pass the file with weights.")


def test_two_sources_of_weights_are_refused():
    with pytest.raises(UsageError, match="pretrained and weights: got both, expected one source of weights"):
        SourceOptions(pretrained=True, weights=Path("w.pt"))


@pytest.mark.parametrize(("name", "value"), [("num_classes", -1), ("num_classes", 0), ("in_chans", 0)])
def test_a_model_of_nothing_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name}: got {value}, expected a number of at least 1"):
        SourceOptions(**{name: value})


def test_a_factory_that_takes_no_such_argument_is_refused(own):
    with pytest.raises(UsageError, match=r"features: cannot be built with {'num_classes': 3}"):
        open_model("mine.py:features", SourceOptions(num_classes=3))


def test_a_torchvision_model_takes_no_channels():
    with pytest.raises(UsageError, match="have no in_chans; take a timm model for that"):
        open_model("torchvision:resnet18", SourceOptions(in_chans=1))


# ----------------------------------------------------------------------------------------------------------- artifacts


def test_an_artifact_is_loaded(artifact):
    assert is_saved(artifact)
    assert not is_saved(TINY)
    assert not is_saved("")
    model = open_model(artifact)
    assert model.conversion_plan.converted
    assert not model.training


def test_an_artifact_of_ones_own_is_made_by_its_factory(own, folder):
    save(sphereify(build_model(find_model(own))), "saved")
    with pytest.raises(UsageError, match="factory=…"):
        open_model("saved")
    assert isinstance(open_model("saved", SourceOptions(factory=own)), nn.Sequential)


@pytest.mark.parametrize(
    "option", [{"pretrained": True}, {"weights": Path("w.pt")}, {"num_classes": 3}, {"in_chans": 1}], ids=str
)
def test_options_of_a_plain_model_do_not_go_with_an_artifact(artifact, option):
    with pytest.raises(
        UsageError, match=f"{next(iter(option))}: does not go with the saved artifact .*its own weights"
    ):
        open_model(artifact, SourceOptions(**option))


def test_a_factory_belongs_to_an_artifact():
    with pytest.raises(UsageError, match=r"factory: got 'mine\.py:small', but 'test_resnet' is not a saved artifact"):
        open_model(TINY, SourceOptions(factory="mine.py:small"))


def test_a_folder_without_an_artifact_is_a_damaged_one(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty: there is no conversion\.json in it"):
        open_model("empty")


def test_tensors_of_another_shape_are_refused(artifact, folder):
    (folder / "damaged").mkdir()
    with safe_open(f"{artifact}/model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    content = load_file(f"{artifact}/model.safetensors")
    save_file({**content, "fc.weight": torch.zeros(11, 96)}, "damaged/model.safetensors", metadata)
    Path("damaged/conversion.json").write_bytes(Path(artifact, "conversion.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"tensor fc\.weight has shape \(11, 96\), the model expects \(10, 96\)"):
        open_model("damaged")


def test_the_options_are_plain_data():
    assert dataclasses.replace(SourceOptions(seed=3), seed=None) == SourceOptions(seed=None)
