"""predict and push at the command line: tables and JSON for people and programs, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphereify import save, sphereify
from sphereify.artifact import read_document
from sphereify.sources import build_model, find_model
from tests.cli.words import TINY


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """An artifact of two classes that have names. Look, don't touch."""
    torch.manual_seed(0)
    model = sphereify(build_model(find_model(TINY, num_classes=2)))
    record = {"data": "pets", "classes": ["cat", "[bold]dog[/]"], "image_size": [3, 32, 32], "accuracy": 0.75}
    return save(model, tmp_path_factory.mktemp("saved") / "pets", training=record)


@pytest.fixture
def photos(folder):
    (folder / "photos").mkdir()
    for number in range(2):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"photos/{number}.png")
    return Path("photos")


def test_predict_prints_a_table_of_names_and_probabilities(run, pets, photos):
    code, out, err = run("predict", pets, photos, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "photos/0.png" in out
    assert "photos/1.png" in out
    assert out.count("cat") == out.count("[bold]dog[/]") == 2
    assert out.count("%") == 4


def test_predict_prints_json_for_programs(run, pets, photos):
    code, out, _ = run("predict", pets, "photos/1.png", photos, "--json", "--top", 1)
    assert code == 0
    first, second, third = json.loads(out)
    assert [one["image"] for one in (first, second, third)] == ["photos/1.png", "photos/0.png", "photos/1.png"]
    assert first == third
    assert set(first["predictions"][0]) == {"class", "name", "probability"}


def test_a_broken_image_is_named_after_the_predictions_of_the_others(run, pets, photos):
    (photos / "0.png").write_text("no image")
    code, out, err = run("predict", pets, photos)
    assert code == 1
    assert "photos/1.png" in out
    assert "error: 1 of 2 images without a prediction:\nphotos/0.png: cannot be read as an image" in err
    code, out, err = run("predict", pets, photos, "--json")
    assert (code, [list(one) for one in json.loads(out)]) == (1, [["image", "error"], ["image", "predictions"]])


def test_options_say_what_an_artifact_does_not(run, own, photos, folder):
    code, out, err = run("convert", f"{own}:small", "-o", "unknown")
    assert code == 0, err
    assert "note: how images are prepared for this network is not known" in out
    code, _, err = run("predict", "unknown", photos, "--factory", f"{own}:small")
    assert code == 2
    assert "give --img-size, --mean, --std" in err
    (folder / "names.txt").write_text("a\nb\nc\nd\n")
    known = ["--img-size", 24, "--mean", 0.5, "--std", 0.2, "--std", 0.3, "--std", 0.4, "--class-names", "names.txt"]
    code, out, err = run("convert", f"{own}:small", "-o", "known", *known)
    assert (code, err) == (0, "")
    assert "not known" not in out
    assert read_document("known")["preparation"]["std"] == [0.2, 0.3, 0.4]
    told = json.loads(run("predict", "unknown", photos, "--factory", f"{own}:small", "--json", *known)[1])
    assert json.loads(run("predict", "known", photos, "--factory", f"{own}:small", "--json")[1]) == told
    assert {guess["name"] for guess in told[0]["predictions"]} == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--mean", "x"], "Invalid value for '--mean'"),
        (["--mean", "0.1", "--mean", "0.2"], "--mean: got [0.1, 0.2], expected 1 or 3 numbers"),
        (["--img-size", 24], "give --mean, --std, or leave the options"),
        (
            ["--class-names", "gone.txt", "--img-size", 8, "--mean", 0.5, "--std", 0.5],
            "--class-names: gone.txt cannot be",
        ),
    ],
)
def test_a_preparation_that_is_not_one_is_refused(run, own, given, told):
    code, _, err = run("convert", f"{own}:small", "-o", "out", *given)
    assert code in (1, 2)
    assert told in err
    assert not Path("out").exists()


def test_an_artifact_gets_its_names_later_and_keeps_its_record(run, pets, folder):
    (folder / "names.json").write_text('["hund", "katze"]')
    code, _, err = run("convert", pets, "--class-names", "names.json", "-o", "named")
    assert code == 0, err
    document = read_document("named")
    assert document["preparation"]["classes"] == ["hund", "katze"]
    assert document["training"]["accuracy"] == 0.75


def test_finetune_stores_the_preparation_of_the_data(run, folder):
    code, _, err = run("finetune", TINY, "--data", "digits", "--epochs", 1, "--epoch-batches", 1, "--batch-size", 8,
                       "--device", "cpu", "-o", "run", "--img-size", 16)  # fmt: skip
    assert code == 0, err
    stored = read_document("run/last")["preparation"]
    assert stored["image_size"] == [3, 16, 16]
    assert stored["mean"] == stored["std"] == [0.5, 0.5, 0.5]
    assert stored["classes"] == [str(digit) for digit in range(10)]


# ---------------------------------------------------------------------------------------------------------------- push


def test_push_uploads_and_predict_takes_it_from_the_hub(run, hub, pets, photos):
    code, out, err = run("push", pets, "me/pets", "--private")
    assert (code, err) == (0, "")
    assert "uploaded README.md, conversion.json, model.safetensors: http://127.0.0.1" in out
    assert "load it with: sphereify predict hf-hub:me/pets photo.jpg" in out
    assert hub.private == {"me/pets"}
    from_hub = run("predict", "hf-hub:me/pets", photos, "--json")
    assert from_hub == run("predict", pets, photos, "--json")
    assert "--replace-card replaces it" in run("push", pets, "me/pets")[1]
    assert run("inspect", "hf-hub:me/pets") == run("inspect", pets)


def test_a_dry_run_prints_the_card_and_asks_nobody(run, hub, pets):
    code, out, err = run("push", pets, "me/pets", "--dry-run", "--license", "mit")
    assert (code, err) == (0, "")
    assert out.startswith("---\nlicense: mit\n")
    assert hub.repositories == {}


def test_push_speaks_of_its_options_as_they_are_typed(run, hub, own):
    assert run("convert", f"{own}:small", "-o", "mine")[0] == 0
    code, _, err = run("push", "mine", "me/net")
    assert code == 2
    assert err.startswith("error: --license: is missing; the configuration of the base model")
    code, _, err = run("push", "gone", "me/net", "--license", "mit")
    assert (code, "gone: there is no such folder" in err) == (1, True)
