"""Robustness: accuracies on corrupted images, the same whatever the batch, beside the original and its rival."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from sphereify.datasets import Data
from sphereify.errors import DataError, UsageError
from sphereify.training import Settings
from sphereify.training.corruptions import CORRUPTIONS, corrupt
from sphereify.training.robustness import (
    RIVAL,
    ContrastStandardized,
    contrast_of,
    corrupted_accuracies,
    open_original,
    robustness,
)
from sphereify.training.robustness import write_robustness as write
from tests.training.small import CPU

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels(number: int = 23, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(number, channels, size, size, generator=draw)


def coloured(number: int = 23, channels: int = 3) -> Data:
    """Images of noise, normalized; the classes have no meaning."""
    mean, std = MEAN[:channels], STD[:channels]
    normalized = (pixels(number, channels) - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    part = TensorDataset(normalized, torch.arange(number) % 3)
    return Data("noise", part, part, ["a", "b", "c"], (channels, 8, 8), mean, std)


def scores(channels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 3), nn.Dropout(0.9))


@pytest.mark.parametrize("channels", [1, 3])
def test_accuracies_are_those_of_images_that_are_corrupted_as_pixels_and_normalized_again(channels):
    data, model = coloured(channels=channels), scores(channels)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    found = robustness(model, data, Settings(seed=5, **CPU), name="mine")
    targets = data.test.tensors[1]

    def accuracy(images: Tensor) -> float:
        return float((model.eval()(images).argmax(1) == targets).double().mean())

    assert list(found.networks) == ["mine"]
    mine = found.networks["mine"]
    assert mine.clean == pytest.approx(accuracy(data.test.tensors[0]))
    assert list(mine.corrupted) == list(CORRUPTIONS)
    for name, accuracies in mine.corrupted.items():
        expected = [accuracy((corrupt(pixels(channels=channels), name, s, seed=5) - mean) / std) for s in range(1, 6)]
        assert accuracies == pytest.approx(expected, abs=1.01 / 23 if name in ("gamma", "brightness") else 1e-9)
    assert mine.means["fog"] == pytest.approx(sum(mine.corrupted["fog"]) / 5)
    assert mine.mean == pytest.approx(sum(map(sum, mine.corrupted.values())) / 35)
    assert (found.images, found.chance) == (23, pytest.approx(1 / 3))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_results_do_not_depend_on_the_batch_size_or_on_who_loads_but_on_the_seed(workers, batch_size):
    data, model, kinds = coloured(), scores(), ("noise", "fog")
    first = robustness(model, data, Settings(**CPU), corruptions=kinds)
    assert robustness(model, data, Settings(batch_size=batch_size, workers=workers, **CPU), corruptions=kinds) == first
    assert robustness(model, data, Settings(seed=1, **CPU), corruptions=kinds) != first


class Partly(Dataset):
    """Images of which some cannot be read."""

    def __init__(self, images: Dataset, bad: set[int]):
        self.images, self.bad = images, bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple:
        if number in self.bad:
            raise OSError("broken")
        return self.images[number]


def test_an_image_that_cannot_be_read_is_counted_and_leaves_the_others_as_they_are():
    data, model = coloured(), scores()
    whole = robustness(model, data, Settings(**CPU), corruptions=["noise"])
    rights = []
    for bad in range(3):
        found = robustness(model, replace(data, test=Partly(data.test, {bad})), Settings(**CPU), corruptions=["noise"])
        assert (found.images, found.skipped) == (22, 1)
        rights.append([round(22 * share) for share in found.networks["network"].corrupted["noise"]])
    for strength, share in enumerate(whole.networks["network"].corrupted["noise"]):
        assert all(round(23 * share) - right[strength] in (0, 1) for right in rights)
    with pytest.raises(DataError, match="image 3: OSError: broken"):
        robustness(model, replace(data, test=Partly(data.test, {3})), Settings(strict=True, **CPU))
    with pytest.raises(DataError, match="noise: not one of its test images could be read"):
        robustness(model, replace(data, test=Partly(data.test, set(range(23)))), Settings(**CPU))


def test_the_rival_does_not_see_contrast_and_keeps_the_mean():
    seen: list[Tensor] = []
    rival = ContrastStandardized(nn.Identity(), 0.7)
    rival.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = coloured().test.tensors[0]
    mean = images.mean((2, 3), keepdim=True)
    for factor in (1.0, 0.1, 3.0):
        rival(mean + factor * (images - mean))
        torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0].mean((2, 3)), images.mean((2, 3)))
    deviations = (seen[0] - mean).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(deviations, torch.full((23,), 0.7))
    constant = torch.full((2, 3, 8, 8), 0.3)
    for almost in (constant, constant + 1e-6 * torch.randn(constant.shape)):
        torch.testing.assert_close(rival(almost), almost)


def test_an_image_with_the_training_sets_contrast_passes_the_rival_as_it_is():
    data = coloured()
    images = data.train.tensors[0]
    expected = (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt().mean()
    assert contrast_of(data) == pytest.approx(float(expected), rel=1e-5)
    image = images[:1]
    torch.testing.assert_close(
        ContrastStandardized(nn.Identity(), contrast_of(replace(data, train=TensorDataset(image, torch.zeros(1)))))(
            image
        ),
        image,
    )


def test_against_the_original_there_is_always_its_rival():
    data, model, original = coloured(), scores(), scores()
    nn.init.normal_(original[1].weight)
    found = robustness(model, data, Settings(**CPU), against=original, corruptions=["contrast"])
    assert list(found.networks) == ["network", "original", RIVAL]
    rival = ContrastStandardized(original, contrast_of(data))
    apart = corrupted_accuracies({"a": original, "b": rival}, data, Settings(**CPU), corruptions=["contrast"])
    assert list(found.networks.values())[1:] == list(apart.networks.values())
    one = found.networks[RIVAL].corrupted["contrast"]
    assert max(one) - min(one) < 1 / 23  # up to rounding it sees the same image at every strength
    assert list(robustness(model, data, Settings(**CPU), against=original, name="original",
                           corruptions=["fog"]).networks) == ["network", "original", RIVAL]  # fmt: skip


def test_results_become_json_a_table_and_a_picture(tmp_path):
    found = robustness(scores(), coloured(), Settings(**CPU), against=scores(), corruptions=["contrast", "noise"])
    write(found, tmp_path)
    written = json.loads((tmp_path / "robustness.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert written["networks"]["network"] == {
        **dataclasses.asdict(found.networks["network"]),
        "means": found.networks["network"].means,
        "mean": found.networks["network"].mean,
    }
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert found.columns() == ["accuracy, %", "clean", "contrast", "noise", "mean"]
    assert [len(row) for row in found.rows()] == [5, 5, 5]
    mine = found.networks["network"]
    assert found.rows()[0] == ["network", f"{100 * mine.clean:.1f}", f"{100 * mine.means['contrast']:.1f}",
                               f"{100 * mine.means['noise']:.1f}", f"{100 * mine.mean:.1f}"]  # fmt: skip


def test_images_are_counted_while_they_are_tested():
    heard = []
    robustness(scores(), coloured(7), Settings(batch_size=18, **CPU), corruptions=["gamma"],
               on_images=lambda *now: heard.append(now))  # fmt: skip
    assert heard == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("change", "kinds", "error", "text"),
    [
        ({"mean": None}, ["fog"], DataError, "corruptions: how noise was normalized is not known"),
        ({"image_size": (4, 8, 8)}, ["fog"], DataError, "corruptions: noise has images of 4 channels, expected 1 or 3"),
        ({"test": TensorDataset(torch.zeros(0))}, ["fog"], DataError, "noise: has no test images"),
        ({"classes": ["a", "b"]}, ["fog"], DataError, "the model has 3 classes, noise has 2"),
        ({}, ["fogg"], UsageError, "corruptions: got 'fogg', expected"),
        ({}, [], UsageError, "corruptions: got none, expected some of contrast, brightness"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_one_sentence(change, kinds, error, text):
    with pytest.raises(error, match=text):
        robustness(scores(), replace(coloured(), **change), Settings(**CPU), corruptions=kinds)


def test_an_original_needs_weights_that_were_trained():
    with pytest.raises(UsageError, match=r"against: tests.training.test_robustness:scores needs against_weights"):
        open_original("tests.training.test_robustness:scores", coloured())
