"""Artifacts and models of timm on the Hugging Face Hub, here a stand-in on loopback: found, told apart, or refused."""

import json
import time
import types

import pytest
import timm
import torch
from safetensors.torch import save as tensors_as_bytes

from sphereify import load, save, sphereify
from sphereify.errors import ArtifactError, HubError, UsageError
from sphereify.hub import is_hub_name, repository_of
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.sources import base_of
from tests.convert.models import plain

TENSORS, DOCUMENT = "model.safetensors", "conversion.json"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A small artifact of a network of the user's own. Look, don't touch."""
    torch.manual_seed(0)
    return save(sphereify(plain()), tmp_path_factory.mktemp("saved") / "artifact")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def on_hub(hub, artifact):
    hub.add("me/net", {**files_in(artifact), "evil.bin": b"code", "README.md": b"a card"})
    return hub


def test_an_artifact_on_the_hub_is_loaded_and_nothing_else_of_its_repository_is_fetched(on_hub, artifact):
    loaded, expected = load("hf-hub:me/net", factory=plain), load(artifact, factory=plain)
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert sorted(on_hub.fetched) == [DOCUMENT, TENSORS]
    load("hf-hub:me/net", factory=plain)
    assert len(on_hub.fetched) == 2  # the second time from the cache


def test_a_revision_is_a_branch_a_tag_or_a_commit(on_hub, artifact, tmp_path):
    first, _ = on_hub.commit_of("me/net", "main")
    other = save(sphereify(plain(), operator="linear"), tmp_path / "other")
    on_hub.add("me/net", files_in(other))
    operators = {
        revision: load(f"hf-hub:me/net{revision}", factory=plain).conversion_plan.converted[0].operator
        for revision in ("", "@main", f"@{first}")
    }
    assert operators == {"": "linear", "@main": "linear", f"@{first}": "cosine"}


def test_files_of_two_commits_are_never_mixed(on_hub, artifact, tmp_path, monkeypatch):
    """A push between the two downloads."""
    import huggingface_hub

    other = files_in(save(sphereify(plain(), operator="linear"), tmp_path / "other"))
    download = huggingface_hub.hf_hub_download

    def pushed_meanwhile(repository, name, **rest):
        path = download(repository, name, **rest)
        on_hub.add("me/net", other)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pushed_meanwhile)
    assert load("hf-hub:me/net", factory=plain).conversion_plan.converted[0].operator == "cosine"


def test_a_private_repository_needs_a_token(on_hub, monkeypatch):
    on_hub.private.add("me/net")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no such repository on the hub, or it is private .* set HF_TOKEN"):
        load("hf-hub:me/net", factory=plain)
    from tests.hub_server import TOKEN

    assert load("hf-hub:me/net", factory=plain, token=TOKEN)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("hf-hub:me/gone", "hf-hub:me/gone: there is no such repository on the hub"),
        ("hf-hub:me/net@v9", "hf-hub:me/net@v9: there is no such revision in the repository"),
        ("hf-hub:me/data", "hf-hub:me/data: there is no conversion.json in it; an artifact has"),
        ("hf-hub:me/half", "hf-hub:me/half: there is no model.safetensors in it; an artifact has"),
    ],
)
def test_what_is_not_there_is_told(on_hub, spec, told):
    on_hub.add("me/data", {"data.csv": b"1"})
    on_hub.add("me/half", {DOCUMENT: on_hub.files("me/net")[DOCUMENT]})
    with pytest.raises(HubError) as caught:
        load(spec, factory=plain)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["me", "me/", "me/a/b", "me/net@", "me/../net", "me/ne t", "../net", "me/-"])
def test_a_name_of_another_form_is_refused_without_asking(name, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="expected hf-hub:user/name"):
        load(f"hf-hub:{name}")


def test_names_of_the_hub_are_told_from_others():
    assert [is_hub_name(x) for x in ("hf-hub:a/b", "a/b", None, 3)] == [True, False, False, False]
    assert str(repository_of("hf-hub:a/b@c")) == "hf-hub:a/b@c"


def test_without_a_network_it_is_said_and_the_cache_serves(on_hub, monkeypatch):
    load("hf-hub:me/net", factory=plain)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    assert load("hf-hub:me/net", factory=plain)
    with pytest.raises(HubError, match=r"hf-hub:me/other: the hub cannot be reached, and the cache"):
        load("hf-hub:me/other")


def test_without_huggingface_hub_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'sphereify\[hub\]'"):
        load("hf-hub:me/net")


def test_an_artifact_cannot_name_another_place_to_fetch_from(on_hub, artifact):
    document = json.loads((artifact / DOCUMENT).read_text())
    document["source"] = {"library": "timm", "name": "hf-hub:evil/net", "arguments": {}}
    on_hub.add("me/net", {DOCUMENT: json.dumps(document).encode()})
    with pytest.raises(ArtifactError, match="its source hf-hub:evil/net is no model of timm's own"):
        load("hf-hub:me/net")


# ------------------------------------------------------------------------------------------------ models timm has saved


@pytest.fixture(scope="module")
def saved_by_timm(tmp_path_factory):
    """A model of two classes in a folder, as timm saves it for the hub."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"license": "mit"}).eval()
    folder = tmp_path_factory.mktemp("timm") / "model"
    config = {"label_names": ["cat", "dog"], "num_classes": 2}
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return model, folder


def test_a_folder_that_timm_saved_is_a_model_with_its_weights_and_names(saved_by_timm, tmp_path):
    model, folder = saved_by_timm
    opened = open_model(f"local-dir:{folder}", SourceOptions(pretrained=True))
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), rtol=0, atol=0)
    path = save(sphereify(opened), tmp_path / "artifact")
    moved = folder.rename(folder.with_name("moved"))
    try:
        document = json.loads((path / DOCUMENT).read_text())
        source = document["source"]
        assert (source["library"], source["name"]) == ("timm", "test_resnet.r160_in1k")
        assert source["arguments"]["num_classes"] == 2
        assert document["preparation"]["classes"] == ["cat", "dog"]
        assert document["base"]["license"] == "mit"
        loaded = load(path)  # without the folder
        torch.testing.assert_close(loaded.state_dict(), sphereify(opened).state_dict(), rtol=0, atol=0)
    finally:
        moved.rename(folder)


def test_without_pretrained_its_architecture_is_built(saved_by_timm):
    model, folder = saved_by_timm
    opened = open_model(f"local-dir:{folder}")
    assert opened.num_classes == 2
    assert not torch.equal(opened.fc.weight, model.fc.weight)


def test_a_repository_of_timm_is_told_from_an_artifact_by_its_files(on_hub, saved_by_timm):
    model, folder = saved_by_timm
    on_hub.add("timm/tiny", files_in(folder))
    assert not is_saved("hf-hub:timm/tiny")
    assert is_saved("hf-hub:me/net")
    opened = open_model("hf-hub:timm/tiny", SourceOptions(pretrained=True))
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert base_of(opened) == {"model": "timm/tiny", "license": "mit"}
    with pytest.raises(UsageError, match=r"pretrained: does not go with the saved artifact hf-hub:me/net"):
        open_model("hf-hub:me/net", SourceOptions(pretrained=True))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no config.json in"),
        ("{", "its config.json cannot be read"),
        ("[]", "its config.json names no architecture"),
        ('{"architecture": "bert"}', "its config.json names 'bert', expected an architecture of this timm's"),
    ],
)
def test_a_folder_without_a_model_of_timm_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        open_model(f"local-dir:{tmp_path}")
    assert told in str(caught.value)


def test_a_folder_without_weights_is_refused_where_they_are_wanted(saved_by_timm, tmp_path):
    (tmp_path / "config.json").write_bytes((saved_by_timm[1] / "config.json").read_bytes())
    with pytest.raises(UsageError, match="No suitable checkpoints"):
        open_model(f"local-dir:{tmp_path}", SourceOptions(pretrained=True))


def test_a_repository_that_is_neither_is_refused(on_hub):
    on_hub.add("me/words", {"model.safetensors": tensors_as_bytes({"a": torch.zeros(1)})})
    with pytest.raises(HubError, match=r"holds neither an artifact of sphereify .* nor a model of timm"):
        open_model("hf-hub:me/words")
