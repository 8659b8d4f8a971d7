"""What a model knows of its images: by its training, its artifact or its library, in this order."""

import json

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from sphereify import load, save, sphereify
from sphereify.convert.model_inputs import data_config
from sphereify.errors import ArtifactError, UsageError
from sphereify.model_images import class_names, image_config, preparation_of, prepare_as, set_preparation
from sphereify.model_images import unknown_preparation as unknown
from sphereify.preparation import Preparation, PreparationOptions
from sphereify.sources import build_model, find_model
from tests.convert.models import plain

TINY = "test_resnet"
OWN = Preparation((3, 40, 40), (0.1, 0.2, 0.3), (0.3, 0.2, 0.1), "bicubic", 0.9, "center", ("a", "b", "c"))


def test_a_timm_model_brings_its_configuration_and_the_names_of_imagenet():
    model = timm.create_model(TINY)
    known = preparation_of(model)
    config = timm.data.resolve_model_data_config(model)
    assert known.image_size == config["input_size"]
    for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert getattr(known, name) == config[name]
    assert len(known.classes) == 1000
    assert (known.classes[0], known.classes[207]) == ("tench, Tinca tinca", "golden retriever")


@pytest.mark.parametrize("arguments", [{"num_classes": 7}, {"num_classes": 0}])
def test_a_model_for_other_classes_has_no_names(arguments):
    assert preparation_of(timm.create_model(TINY, **arguments)).classes == ()


def test_weights_that_are_not_of_imagenet_have_no_names_and_those_of_a_configuration_come_first():
    model = timm.create_model(TINY, pretrained_cfg_overlay={"tag": "mine"})
    assert class_names(model) == ()
    model = timm.create_model(TINY, pretrained_cfg_overlay={"num_classes": 2, "label_names": ["x", "y"]})
    assert class_names(model) == ("x", "y")
    model.pretrained_cfg["label_descriptions"] = {"x": "an x"}
    assert class_names(model) == ("an x", "y")


def test_a_transformer_for_another_size_is_prepared_for_that_size():
    assert preparation_of(timm.create_model("test_vit", img_size=96)).image_size == (3, 96, 96)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "vit_b_16"])
def test_a_torchvision_model_by_name_is_prepared_as_its_weights_say(name):
    from torchvision import models

    from sphereify.sources import _torchvision_config

    weights = models.get_model_weights(name).DEFAULT
    config = _torchvision_config(name, {})
    preparation = Preparation.of(config["input_size"][-1], 3, config)
    pixels = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    photo = Image.fromarray(pixels.numpy())
    torch.testing.assert_close(preparation.transform()(photo), weights.transforms()(photo))
    assert config["label_names"] == weights.meta["categories"]


def test_a_torchvision_model_that_was_built_by_name_has_the_names_of_its_classes():
    model = build_model(find_model("torchvision:squeezenet1_1"))
    assert preparation_of(model).classes[0] == "tench"
    other = build_model(find_model("torchvision:squeezenet1_1", num_classes=3))
    assert preparation_of(other).classes == ()
    assert "label_names" not in data_config(torchvision.models.squeezenet1_1())


def test_a_model_of_the_users_own_knows_nothing_until_it_is_told():
    model = plain()
    assert preparation_of(model) is None
    assert "not known" in unknown(model)
    assert unknown(nn.Linear(3, 4)) == ""
    assert unknown(nn.Conv2d(5, 4, 3)) == ""  # no file of an image has five channels
    with pytest.raises(UsageError, match="give img_size, std, or leave"):
        prepare_as(model, PreparationOptions(mean=(0.5,)))
    prepare_as(model, PreparationOptions(img_size=40, mean=(0.5,), std=(0.5,)))
    assert preparation_of(model) == Preparation.of(40, 3, {})
    assert unknown(model) == ""


def test_names_for_another_number_of_classes_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=r"class_names: .* has 2 names, the model has 1000 classes"):
        prepare_as(timm.create_model(TINY), PreparationOptions(class_names=tmp_path / "names.txt"))


# ----------------------------------------------------------------------------------------------------- in the artifact


def test_an_artifact_brings_the_preparation_back(tmp_path):
    model = sphereify(timm.create_model(TINY, num_classes=3))
    assert preparation_of(load(save(model, tmp_path / "library"))) == preparation_of(model)
    set_preparation(model, OWN)
    loaded = load(save(model, tmp_path / "own"))
    assert preparation_of(loaded) == OWN
    assert {**image_config(loaded), **OWN.config()} == image_config(loaded)
    save(model, tmp_path / "given", preparation=(given := Preparation.of(48, 3, {})))
    assert preparation_of(load(tmp_path / "given")) == given


def test_an_artifact_of_an_earlier_version_is_prepared_by_its_library_and_its_record(tmp_path):
    model = sphereify(timm.create_model(TINY, num_classes=2))
    record = {"image_size": [3, 48, 48], "classes": ["cat", "dog"]}
    save(model, tmp_path, training=record)
    document = json.loads((tmp_path / "conversion.json").read_text())
    del document["preparation"], document["base"], document["calibration"]
    (tmp_path / "conversion.json").write_text(json.dumps(document))
    known = preparation_of(load(tmp_path))
    assert known == Preparation.of(48, 3, model.pretrained_cfg, ("cat", "dog"))


def test_a_damaged_preparation_is_an_error_of_the_artifact(tmp_path):
    save(sphereify(timm.create_model(TINY)), tmp_path)
    document = json.loads((tmp_path / "conversion.json").read_text())
    document["preparation"]["mean"] = []
    (tmp_path / "conversion.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="its part 'preparation' is of another form \\(mean is"):
        load(tmp_path)


def test_something_else_as_a_preparation_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="preparation: got dict, expected a Preparation"):
        save(sphereify(timm.create_model(TINY)), tmp_path / "a", preparation={"mean": 1})
    assert not (tmp_path / "a").exists()
