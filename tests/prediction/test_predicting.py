"""Classes of images in files: those that the network's scores say, whatever form the network has."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from sphereify import evaluate, export, fold, load, predict, save, sphereify
from sphereify.datasets import load_data
from sphereify.errors import ArtifactError, DataError, UsageError
from sphereify.model_images import set_preparation
from sphereify.prediction.options import PredictKeywords, PredictOptions
from sphereify.prediction.predicting import Guess, Prediction
from sphereify.preparation import Preparation, PreparationOptions
from sphereify.training.settings import Settings

NAMES = ("ant", "bee", "cat", "dog")
PREPARATION = Preparation((3, 24, 24), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.75, "center", NAMES)


def network():
    """A network of four classes, whose weights tell images apart."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = sphereify(nn.Sequential(*layers, nn.Linear(24, 4)), inplace=True).eval()
    set_preparation(model, PREPARATION)
    return model


@pytest.fixture
def photos(tmp_path):
    """Photographs of several kinds, by what is special about them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        pixels = torch.randint(0, 256, (4, 5, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg")
    return folder


def expected(model, file, preparation=PREPARATION):
    """Probabilities by hand: open, prepare, run, softmax."""
    with Image.open(file) as picture, torch.no_grad():
        image = preparation.transform()(picture.convert("RGB"))
        return model(image[None])[0].double().softmax(0)


def test_the_likeliest_classes_come_first_with_names_and_probabilities(photos):
    model = network()
    predictions = predict(model, sorted(photos.iterdir()), top=3, batch_size=2, device="cpu")
    assert [Path(p.image).name for p in predictions] == ["a.jpg", "b.jpg", "c.jpg"]
    for prediction in predictions:
        probabilities = expected(model, prediction.image)
        order = probabilities.argsort(descending=True)[:3].tolist()
        assert [guess.number for guess in prediction.guesses] == order
        assert [guess.name for guess in prediction.guesses] == [NAMES[number] for number in order]
        found = torch.tensor([guess.probability for guess in prediction.guesses], dtype=torch.float64)
        torch.testing.assert_close(found, probabilities[order], atol=1e-6, rtol=0)


def test_a_module_stays_in_its_mode_and_more_classes_than_there_are_give_all(photos):
    model = network().train()
    (prediction,) = predict(model, photos / "a.jpg", top=9, device="cpu")
    assert len(prediction.guesses) == 4
    assert sum(guess.probability for guess in prediction.guesses) == pytest.approx(1)
    assert model.training


def test_an_artifact_and_the_same_one_folded_say_the_same(photos, tmp_path):
    model = network()
    by_module = predict(model, photos, device="cpu")
    assert predict(load(save(model, tmp_path / "a"), factory=plain_network), photos, device="cpu") == by_module
    folded = predict(fold(model, torch.randn(2, 3, 24, 24)), photos, device="cpu")
    for one, other in zip(folded, by_module, strict=True):
        assert [guess.number for guess in one.guesses] == [guess.number for guess in other.guesses]


def plain_network():
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 4))


@pytest.mark.export
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_an_exported_file_holds_the_preparation_and_says_the_same(photos, tmp_path, form, batch_size):
    model = network()
    file = tmp_path / ("net.onnx" if form == "onnx" else "net.pt2")
    written = export(model, file, format=form, batch_size=batch_size)
    assert written.preparation == PREPARATION
    for one, other in zip(predict(file, photos, device="cpu"), predict(model, photos, device="cpu"), strict=True):
        assert one.image == other.image
        assert [(g.number, g.name) for g in one.guesses] == [(g.number, g.name) for g in other.guesses]
        for a, b in zip(one.guesses, other.guesses, strict=True):
            assert a.probability == pytest.approx(b.probability, abs=1e-5)


@pytest.mark.export
def test_the_metadata_of_a_file_are_plain_json_for_other_programs(tmp_path):
    import onnx

    export(network(), tmp_path / "net.onnx", img_size=32)
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert entries["classes"] == list(NAMES)
    assert entries["preparation"]["mean"] == [0.4, 0.5, 0.6]
    assert entries["preparation"]["image_size"] == [3, 32, 32]
    export(network(), tmp_path / "net.pt2", format="torch-export")
    extra = {"preparation": "", "classes": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == list(NAMES)
    assert json.loads(extra["preparation"])["crop_pct"] == 0.75


def test_gray_transparent_and_rotated_images_are_predicted_as_what_they_show(photos, tmp_path):
    model = network()
    with Image.open(photos / "a.jpg") as picture:
        photo = picture.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be rotated clockwise
    forms = {
        "plain.png": photo,
        "transparent.png": photo.convert("RGBA"),
        "gray.png": photo.convert("L"),
        "gray as rgb.png": photo.convert("L").convert("RGB"),
    }
    for name, form in forms.items():
        form.save(tmp_path / name)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    by_name = {name: predict(model, tmp_path / name, device="cpu")[0].guesses for name in [*forms, "rotated.png"]}
    assert by_name["transparent.png"] == by_name["rotated.png"] == by_name["plain.png"]
    assert by_name["gray.png"] == by_name["gray as rgb.png"] != by_name["plain.png"]


def test_a_file_that_cannot_be_read_is_named_and_does_not_stop_the_others(photos):
    (photos / "b.jpg").write_bytes(b"no image")
    (photos / "c.jpg").write_bytes((photos / "a.jpg").read_bytes()[:400])  # truncated
    first, *broken = predict(network(), photos, device="cpu")
    assert (first.error, len(first.guesses)) == (None, 4)
    for prediction in broken:
        assert prediction.guesses == ()
        assert prediction.error.startswith(f"{prediction.image}: cannot be read as an image")
    assert broken[0].to_json() == {"image": str(photos / "b.jpg"), "error": broken[0].error}


def test_scores_that_are_not_finite_are_an_error_of_the_image(photos):
    model = network()
    with torch.no_grad():
        model[-1].weight.fill_(float("nan"))
    assert all("not finite" in prediction.error for prediction in predict(model, photos, device="cpu"))


def test_predictions_count_as_evaluate_does(tmp_path):
    """The images of two classes, tested and predicted: one preparation, the same answers."""
    generator = torch.Generator().manual_seed(1)
    for number in range(24):
        file = tmp_path / "data" / "val" / NAMES[number % 4] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((40, 30), Image.Resampling.BILINEAR).save(file)
    model = network()
    from sphereify.training.data_options import DataOptions

    data = DataOptions(data=str(tmp_path / "data")).open(model, as_trained=True, test_only=True)
    assert data.preparation == Preparation.of(24, 3, PREPARATION.config())
    result = evaluate(model, data, Settings(device="cpu", batch_size=8))
    answers = torch.zeros(4, 4, dtype=torch.int64)
    for prediction in predict(model, tmp_path / "data", top=1, device="cpu"):
        answers[NAMES.index(Path(prediction.image).parent.name), prediction.guesses[0].number] += 1
    torch.testing.assert_close(answers, result.confusion)


def test_the_digits_as_a_picture_are_prepared_as_the_data_are(tmp_path):
    from sklearn.datasets import load_digits

    data = load_data("digits")
    image = load_digits().images[0]  # 8×8, from 0 to 16
    picture = Image.fromarray((image * 255 / 16).round().astype("uint8"))
    inputs = torch.stack([images for images, _ in [*data.train, *data.test]])
    found = data.preparation.transform()(picture.convert("RGB"))
    nearest = (inputs - found).abs().amax((1, 2, 3)).min()
    assert nearest < 0.01  # 8 bits


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_network_that_does_not_say_how_its_images_are_prepared_is_refused_unless_it_is_told(photos):
    model = sphereify(plain_network())
    with pytest.raises(
        UsageError, match="Sequential: does not say how its images are prepared; give img_size, mean, std"
    ):
        predict(model, photos, device="cpu")
    options = PreparationOptions(img_size=24, mean=(0.5,), std=(0.5,))
    (first, *_) = predict(model, photos, device="cpu", preparation=options)
    probabilities = expected(model.eval(), photos / "a.jpg", Preparation.of(24, 3, {}))
    assert first.guesses[0] == Guess(
        int(probabilities.argmax()), None, pytest.approx(float(probabilities.max()), abs=1e-6)
    )
    assert str(first.guesses[0]) == f"class {first.guesses[0].number}"


def test_names_for_another_number_of_classes_are_refused(photos, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="has 4 classes, and there are 2 names; give class_names"):
        predict(network(), photos, device="cpu", preparation=PreparationOptions(class_names=tmp_path / "names.txt"))


@pytest.mark.parametrize(
    ("model", "error", "told"),
    [
        ("test_resnet", UsageError, "test_resnet: was built with random weights; give pretrained or weights"),
        ("gone.onnx", ArtifactError, "gone.onnx: there is no such file"),
        ("broken.onnx", ArtifactError, "broken.onnx: onnxruntime cannot read it"),
        ("broken.pt2", ArtifactError, "broken.pt2: torch cannot read it"),
        (3, TypeError, "model: got int, expected a torch.nn.Module, or the name of one"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_trained_network_is_refused(photos, monkeypatch, tmp_path, model, error, told):
    monkeypatch.chdir(tmp_path)
    Path("broken.onnx").write_bytes(b"no model")
    Path("broken.pt2").write_bytes(b"no model")
    with pytest.raises(error) as caught:
        predict(model, photos, device="cpu")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ("gone.jpg", "gone.jpg: there is no such file or folder"),
        ("empty", "no images in empty"),
        ([], "images: got none"),
    ],
)
def test_no_images_are_refused(monkeypatch, tmp_path, images, told):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(DataError, match=told):
        predict(network(), images, device="cpu")


def test_a_network_of_maps_or_of_another_size_is_refused(photos):
    maps = nn.Conv2d(3, 4, 3)
    set_preparation(maps, PREPARATION)
    with pytest.raises(UsageError, match=r"returns Tensor of shape \(3, 4, 22, 22\) for 3 images, expected one score"):
        predict(maps, photos, device="cpu")
    rows = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    set_preparation(rows, PREPARATION)
    with pytest.raises(UsageError, match=r"does not take images of 3 × 24 × 24 .* Try another img_size"):
        predict(rows, photos, device="cpu")


def test_a_prediction_is_plain_data():
    prediction = Prediction("a.jpg", (Guess(1, "bee", 0.75),))
    assert prediction.to_json() == {
        "image": "a.jpg",
        "predictions": [{"class": 1, "name": "bee", "probability": 0.75}],
    }


def test_the_keywords_for_type_checkers_are_the_fields_of_the_options():
    fields = {field.name: field.type for field in dataclasses.fields(PredictOptions)}
    assert typing.get_type_hints(PredictKeywords) == fields
    assert list(PredictKeywords.__annotations__) == list(fields)
    assert not PredictKeywords.__required_keys__
