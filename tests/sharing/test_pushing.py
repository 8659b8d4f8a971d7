"""A converted network goes to the hub with a model card that says what is known of it, and comes back."""

import dataclasses
import json
import typing

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from sphereify import calibrate, load, push_to_hub, save, sphereify
from sphereify.annotations import PRETRAINED_BASE
from sphereify.errors import ArtifactError, HubError, UsageError
from sphereify.model_images import set_preparation
from sphereify.preparation import Preparation
from sphereify.sharing.card import model_card
from sphereify.sharing.options import PushKeywords, PushOptions
from sphereify.sharing.pushing import card_of
from tests.convert.models import plain

FILES = ("README.md", "conversion.json", "model.safetensors")


@pytest.fixture(scope="module")
def model():
    """A converted network of timm's for two classes. Look, don't touch."""
    torch.manual_seed(0)
    converted = sphereify(timm.create_model("test_resnet", num_classes=2), radius=1.5, exclude="fc")
    set_preparation(converted, Preparation((3, 48, 48), (0.5,) * 3, (0.5,) * 3, classes=("cat", "dog: a pet")))
    return converted


def head_of(card):
    """The head of a model card, as the library of the hub reads it."""
    return huggingface_hub.ModelCard(card).data.to_dict()


def test_a_model_goes_to_the_hub_and_comes_back(hub, model):
    pushed = push_to_hub(model, "me/net")
    assert (pushed.repository, pushed.files) == ("hf-hub:me/net", FILES)
    assert pushed.address.startswith(f"{hub.address}/me/net/commit/")
    assert tuple(sorted(hub.files("me/net"))) == FILES
    assert hub.messages == ["Upload a network converted with sphereify"]
    assert hub.private == set()
    loaded = load("hf-hub:me/net")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_an_artifact_goes_as_it_is_and_options_reach_the_hub(hub, model, tmp_path):
    folder = save(model, tmp_path / "artifact", training={"data": "digits", "accuracy": 0.5, "epochs": 2})
    pushed = push_to_hub(folder, "hf-hub:me/net", private=True, revision="v1", commit_message="First")
    assert pushed.repository == "hf-hub:me/net@v1"
    assert (hub.private, hub.messages) == ({"me/net"}, ["First"])
    assert hub.files("me/net") == {}  # main
    stored = hub.files("me/net", "v1")
    for name in FILES[1:]:
        assert stored[name] == (folder / name).read_bytes()
    assert b"Accuracy on the test images: 50.00%" in stored["README.md"]


def test_a_card_that_is_there_stays_unless_it_is_to_be_replaced(hub, model):
    hub.add("me/net", {"README.md": b"by hand", "notes.txt": b"mine"})
    assert push_to_hub(model, "me/net").kept_card
    assert (hub.files("me/net")["README.md"], hub.files("me/net")["notes.txt"]) == (b"by hand", b"mine")
    assert not push_to_hub(model, "me/net", replace_card=True).kept_card
    assert hub.files("me/net")["README.md"].startswith(b"---\nlicense")


@pytest.mark.parametrize(
    ("token", "told"),
    [
        (None, "the hub asks for an access token; log in with `hf auth login`, or set HF_TOKEN"),
        ("wrong", "access token"),
    ],
)
def test_without_a_token_that_may_write_nothing_is_uploaded(hub, model, monkeypatch, token, told):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError) as caught:
        push_to_hub(model, "me/net", token=token)
    assert told in str(caught.value)
    assert hub.repositories == {}


def test_a_licence_that_is_not_known_is_asked_for_before_the_hub_is(hub, tmp_path):
    own = sphereify(plain())
    with pytest.raises(
        UsageError, match=r"license: is missing; the configuration of the base model .* names no licence"
    ):
        push_to_hub(own, "me/net")
    assert hub.repositories == {}
    push_to_hub(own, "me/net", license="cc-by-nc-4.0")
    card = hub.files("me/net")["README.md"].decode()
    assert head_of(card)["license"] == "cc-by-nc-4.0"
    assert "factory=build" in card


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (("net",), UsageError, "net: expected hf-hub:user/name"),
        (("a/b/c",), UsageError, "a/b/c: expected hf-hub:user/name"),
        (("me/net@v1", {"revision": "v2"}), UsageError, "revision: got 'v2', and me/net@v1 names a revision, too"),
        (("me/net", {"original_accuracy": 93.0}), UsageError, "original_accuracy: got 93.0"),
        (("me/net", {"license": " "}), UsageError, "license: is empty"),
        ((3,), TypeError, "repository: got int"),
    ],
)
def test_wrong_requests_are_refused(hub, model, given, error, told):
    name, options = given[0], given[1] if len(given) > 1 else {}
    with pytest.raises(error) as caught:
        push_to_hub(model, name, **options)
    assert told in str(caught.value)
    assert hub.repositories == {}


def test_what_is_no_converted_network_is_refused(hub, tmp_path):
    with pytest.raises(UsageError, match="was not converted"):
        push_to_hub(nn.Linear(2, 2), "me/net", license="mit")
    with pytest.raises(ArtifactError, match="there is no such folder"):
        push_to_hub(tmp_path / "gone", "me/net", license="mit")
    with pytest.raises(TypeError, match="model: got int"):
        push_to_hub(3, "me/net")


# ---------------------------------------------------------------------------------------------------------------- card


@pytest.fixture(scope="module")
def document(model, tmp_path_factory):
    """The content of the artifact's conversion.json. Look, don't touch."""
    folder = save(model, tmp_path_factory.mktemp("card") / "a")
    return json.loads((folder / "conversion.json").read_text())


def card(document, changes=None, **options):
    return model_card({**document, **(changes or {})}, "me/net", PushOptions(**options))


def test_the_card_says_what_the_artifact_knows(document):
    text = card(document)
    head = head_of(text)
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "sphereify"
    assert head["pipeline_tag"] == "image-classification"
    assert head["tags"] == ["sphereify", "hyperspherical", "timm", "cosine"]
    assert not {"base_model", "datasets", "metrics", "model-index"} & set(head)
    for words in (
        "# net\n",
        'sphereify.load("hf-hub:me/net")',
        "| operator | cosine (15) |",
        "| pooled radius ρ | 1.5, ",
        "| converted | 15 layers of 16 |",
        "| kept | 1 layer: ",
        "3×48×48",
        "Classes: cat; dog: a pet.",
        "It was neither calibrated nor trained",
        "apache-2.0, the licence that the configuration of its base model test_resnet.r160_in1k names",
    ):
        assert words in text, words


def test_the_card_says_what_was_measured(document):
    fit = {
        "r2": {"conv1.0": {"copied": 0.1, "calibrated": 0.9}, "conv1.3": {"copied": 0.0, "calibrated": 0.7}},
        "inputs": 512, "agreement": 0.981, "agreement_inputs": 128,
    }  # fmt: skip
    training = {"data": "hfds/uoft-cs/cifar10", "accuracy": 0.9123, "epochs": 3, "classes": ["cat", "dog"]}
    changes = {"calibrated": True, "calibration": fit, "training": training}
    text = card(document, changes, original_accuracy=0.92, base_model="timm/test_resnet.r160_in1k")
    head = head_of(text)
    assert (head["base_model"], head["datasets"]) == ("timm/test_resnet.r160_in1k", ["uoft-cs/cifar10"])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9123}]
    for words in (
        "Calibrated without labels on 512 inputs",
        "explained 0.80 of the variance",
        "0.70 at the least (`conv1.3`)",
        "98.1% of 128 inputs",
        "Trained further, which changed the layers since, on hfds/uoft-cs/cifar10 for 3 epochs",
        "Accuracy on the test images: 91.23%; the original: 92.00%.",
        "It started from the weights of timm/test_resnet.r160_in1k.",
    ):
        assert words in text, words
    assert "neither calibrated nor trained" not in text


def test_an_accuracy_that_was_measured_later_counts(document):
    text = card(document, {"training": {"data": "pets", "accuracy": 0.5}}, accuracy=0.75)
    assert "Accuracy on the test images: 75.00%." in text
    assert "50.00%" not in text
    assert head_of(text)["metrics"] == ["accuracy"]


def test_the_path_of_a_folder_stays_private(document):
    text = card(document, {"training": {"data": "/home/someone/secret/pets, 40 test images", "accuracy": 0.5}})
    assert "pets, 40 test images" in text
    assert "secret" not in text


def test_a_licence_without_a_word_on_the_hub_goes_by_its_name(document):
    head = head_of(card(document, license="Our-Own 1.0"))
    assert (head["license"], head["license_name"]) == ("other", "our-own 1.0")


def test_an_artifact_of_an_earlier_version_has_a_card_too(document):
    old = {name: part for name, part in document.items() if name not in ("base", "calibration", "preparation")}
    text = model_card(old, "me/net", PushOptions())
    assert head_of(text)["license"] == "apache-2.0"  # timm's, by the name of the model
    assert "How its inputs are prepared is not part of it." in text


def test_a_calibration_and_pretrained_weights_are_told_by_the_artifact(tmp_path):
    torch.manual_seed(0)
    original = plain()
    model = sphereify(original)
    PRETRAINED_BASE.write(model, "someone/plain")
    calibration = calibrate(model, original, [torch.randn(24, 3, 8, 8)])
    text = card_of(save(model, tmp_path), "me/net", license="mit")
    assert f"{calibration.summary().partition('R² ')[2][:4]} of the variance" in text
    assert "Calibrated without labels on 24 inputs" in text
    assert head_of(text)["base_model"] == "someone/plain"


def test_text_of_others_stays_text_in_the_head_and_in_the_body(document):
    prepared = Preparation.of(32, 3, {}, ("cat\n# Owned", "dog"))
    changes = {
        "training": {"data": "pets\n- a: list", "accuracy": 0.5},
        "base": {"model": "me/x\n# Base", "license": None},
        "preparation": prepared.to_json(),
    }
    text = card(document, changes, license="mit\ntags: [owned]\n---\n# Heading")
    head = head_of(text)
    assert head["license_name"] == "mit tags: [owned] --- # heading"
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == "pets - a: list"
    body = text.split("---\n\n", 1)[1].splitlines()
    assert [line for line in body if line.startswith(("# ", "- a", "tags", "---"))] == ["# net"]


def test_a_training_after_the_calibration_is_told_beside_it(document):
    fit = {"r2": {"a": {"copied": 0.1, "calibrated": 0.9}}, "inputs": 8}
    text = card(document, {"calibration": fit, "training": {"data": "pets"}}, license="mit")
    assert "the layers then explained 0.90 of" in text
    assert "- Trained further, which changed the layers since, on pets." in text


def test_the_accuracy_of_an_artifact_is_not_told_of_a_model_that_was_changed_since(model, tmp_path):
    folder = save(model, tmp_path / "a", training={"data": "pets", "accuracy": 0.5})
    loaded = load(folder)
    assert "Accuracy on the test images: 50.00%." in card_of(loaded, "me/net")
    with torch.no_grad():
        loaded.fc.bias[0] += 1
    text = card_of(loaded, "me/net")
    assert "50.00%" not in text
    assert "Its accuracy was not measured." in text
    assert "Accuracy on the test images: 75.00%." in card_of(loaded, "me/net", accuracy=0.75)


def test_the_keywords_for_type_checkers_are_the_fields_of_the_options():
    fields = {field.name: field.type for field in dataclasses.fields(PushOptions)}
    assert typing.get_type_hints(PushKeywords) == fields
    assert list(PushKeywords.__annotations__) == list(fields)
    assert not PushKeywords.__required_keys__
