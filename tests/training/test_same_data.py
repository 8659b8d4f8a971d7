"""A data set is the same one wherever it lies, if its classes and files are; then a run goes on with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sphereify import finetune
from sphereify.class_splits import without_classes
from sphereify.datasets import load_data
from sphereify.errors import UsageError
from sphereify.training import Settings
from sphereify.training.run_folder import RunFolder, locate
from sphereify.training.same_data import identity_of, is_same
from tests.training.small import CPU, images


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder of images in the working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = Path("data") / part / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return Path("data")


def identity(folder: str | Path, **options: object) -> dict:
    return json.loads(json.dumps(identity_of(load_data(str(folder), img_size=8, **options))))


def test_moved_and_copied_data_is_the_same(data):
    before = identity(data)
    assert is_same(before, identity("./data"))
    assert is_same(before, identity(data.resolve()))
    shutil.copytree("data", "copy")
    assert is_same(before, identity("copy"))
    shutil.move("data", "moved")
    assert is_same(before, identity("moved"))
    assert not is_same(before, identity("moved", train_images=5))
    assert is_same(identity("copy", train_images=5), identity("moved", train_images=5))


def test_a_repaired_image_in_the_same_place_changes_nothing(data):
    before = identity(data)
    Image.new("RGB", (8, 8)).save(data / "train" / "a" / "0.png")
    assert is_same(before, identity(data))


@pytest.mark.parametrize("spec", ["data", "digits"])
def test_data_without_other_classes_is_other_data(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    for place in (Path("data") / part / label for part in ("train", "val") for label in "abcd"):
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "0.png")
    data = load_data(spec, img_size=8)
    first, last = data.classes[:2], data.classes[-2:]
    identities = [identity_of(without_classes(data, some)) for some in (first, last)]
    assert is_same(identities[0], identity_of(without_classes(load_data(spec, img_size=8), first)))
    assert not is_same(*identities)
    assert not is_same(identities[0], identity_of(data))
    assert not is_same(identity_of(data), identities[0])


@pytest.mark.parametrize("change", ["name", "class", "content", "fewer", "more"])
def test_other_files_elsewhere_are_other_data(data, change):
    before = identity(data)
    shutil.copytree("data", "other")
    train = Path("other/train")
    if change == "name":
        (train / "a" / "0.png").rename(train / "a" / "9.png")
    elif change == "class":
        for part in ("train", "val"):
            Path("other", part, "b").rename(Path("other", part, "c"))
    elif change == "content":
        Image.new("RGB", (8, 8)).save(train / "b" / "3.png")
    elif change == "fewer":
        (train / "b" / "3.png").unlink()
    else:
        shutil.copy(train / "b" / "3.png", train / "b" / "4.png")
    assert not is_same(before, identity("other"))


def test_data_without_files_is_told_by_its_name():
    assert is_same({"name": "patterns"}, identity_of(images()))
    assert not is_same({"name": "others"}, identity_of(images()))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def test_a_run_goes_on_with_data_that_moved_and_not_with_other(data, tmp_path):
    settings = Settings(epochs=1, batch_size=4, **CPU)
    finetune(small(), load_data("data", img_size=8), settings, output="run")
    shutil.move("data", "moved")
    finetune(small(), load_data("moved", img_size=8), settings, output="run", resume=True)
    Image.new("RGB", (8, 8)).save("moved/train/b/3.png")
    with pytest.raises(UsageError, match=r"began: data: data before, moved now with other classes or files$"):
        finetune(small(), load_data("moved", img_size=8), settings, output="run", resume=True)


# ------------------------------------------------------------------------------------------------ places of options


def test_the_paths_of_a_run_are_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "one" / "data").mkdir(parents=True)
    (tmp_path / "one" / "net.py").write_text("")
    monkeypatch.chdir(tmp_path / "one")
    own = {"model": "net.py:make", "data": "data", "weights": "missing.pt", "teacher": "original", "lr": 0.1}
    RunFolder("run").write_options(own)
    assert RunFolder("run").read_options() == own
    assert RunFolder("run").options_to_resume({}) == own
    here = str(tmp_path / "one")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    located = {**own, "model": f"{here}/net.py:make", "data": f"{here}/data"}
    assert RunFolder("../one/run").options_to_resume({}) == located
    for given in ({"model": "../one/net.py:make"}, {"model": f"{here}/net.py:make"}):
        assert RunFolder("../one/run").options_to_resume(given) == located
    with pytest.raises(UsageError, match=r"model: net\.py:make before, \.\./one/other\.py:make now"):
        RunFolder("../one/run").options_to_resume({"model": "../one/other.py:make"})
    assert RunFolder("../one/run").options_to_resume({"data": "anywhere"}) == {**located, "data": "anywhere"}
    # All of it moves.
    (tmp_path / "one").rename(tmp_path / "two")
    moved = {name: str(value).replace(here, str(tmp_path / "two")) for name, value in located.items()}
    assert RunFolder("../two/run").options_to_resume({}) == {**moved, "lr": 0.1}


@pytest.mark.parametrize(
    "value", ["digits", "original", "resnet18", "torch/cifar10", "package.module:make", "", None, 3]
)
def test_what_names_no_place_stays_as_it_is(tmp_path, value):
    for name in ("digits", "original", "torch/cifar10"):
        (tmp_path / name).mkdir(parents=True)
    assert locate(value, [tmp_path]) == value
