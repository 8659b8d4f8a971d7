"""The tests of `quantization.py`: networks and their conversions, quantized or with pictures of another exposure."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from benchmarks.plain_networks import NETWORKS, trained
from examples.evidence.images import shuffled
from examples.evidence.quantizer import Setting, logits, prepare, quantize
from examples.evidence.work import Found
from sphereify import calibrate, export, sphereify
from sphereify.datasets import load_data, with_transform_of
from sphereify.files import replacing
from sphereify.fingerprint import fingerprint
from sphereify.training.recipe import GENTLE_RADIUS
from sphereify.training.robustness import ContrastStandardized, deviations_of

ORIGINAL, CONVERTED, STANDARDISED = "original", "converted", "original, contrast standardised"
VARIANTS = (ORIGINAL, CONVERTED)
BATCH = 64


@cache
def _tests(data: str, count: int) -> tuple[Tensor, Tensor]:
    """Test images, normalized to [-1, 1], and their classes: the same random choice each time."""
    part: Any = load_data(data, img_size=32).test
    rows = shuffled(len(part))[:count]
    images, classes = zip(*(part[row] for row in rows), strict=True)
    return torch.stack(images), torch.tensor(classes)


@cache
def _drawn(data: str, count: int, seed: int) -> Tensor:
    """Training images without labels or augmentation; a random choice for each seed."""
    whole = load_data(data, img_size=32)
    part: Any = with_transform_of(whole.train, whole.test)
    return torch.stack([image for image, _ in Subset(part, shuffled(len(part), seed)[:count])])


def _network(name: str, plain: Path | None) -> nn.Module:
    """A plain network from its file; an untrained one without a file."""
    torch.manual_seed(0)
    return NETWORKS[name]().eval() if plain is None else trained(name, plain)


def _converted(network: nn.Module, name: str, images: Tensor, seed: int, output: Path) -> nn.Module:
    """The calibrated conversion of a network, kept in the output folder, apart for other weights and images."""
    known = fingerprint({**network.state_dict(), "images": images})[:8]
    model = sphereify(network, operator="cosine", radius=GENTLE_RADIUS)
    file = output / "networks" / f"{name}-{known}-draw{seed}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file))
        return model.eval()
    calibrate(model, network, list(images.split(BATCH)))
    with replacing(file) as aside:
        torch.save(model.state_dict(), aside)
    return model.eval()


def quantized(
    data: str,
    folder: Path,
    *,
    name: str,
    variant: str,
    seed: int,
    calibration_images: int,
    range_images: int,
    test_images: int,
    settings: tuple[Setting, ...],
    plain: Path | None,
) -> Found:
    """Accuracies of a network in fp32 and with each setting of a quantization."""
    tests, classes = _tests(data, test_images)
    images = _drawn(data, calibration_images, seed)
    network = _network(name, plain)
    if variant == CONVERTED:
        network = _converted(network, name, images, seed, folder.parent.parent)
    found: Found = {}
    with tempfile.TemporaryDirectory() as place:
        exported, prepared, file = (Path(place) / f"{step}.onnx" for step in ("exported", "prepared", "quantized"))
        export(network, exported, images[:2], folded=variant == CONVERTED)
        prepare(exported, prepared)
        found["fp32"] = _share(logits(prepared, tests), classes)
        for setting in settings:
            quantize(prepared, file, images[:range_images], setting)
            found[setting.name] = _share(logits(file, tests), classes)
    return found


def exposed(
    data: str,
    folder: Path,
    *,
    name: str,
    seed: int,
    calibration_images: int,
    test_images: int,
    factors: tuple[float, ...],
    noises: tuple[float, ...],
    plain: Path | None,
) -> Found:
    """Accuracies on pictures of each exposure: {network: {noise: [accuracy for each factor]}}, and the factors."""
    tests, classes = _tests(data, test_images)
    images = _drawn(data, calibration_images, seed)
    original = _network(name, plain)
    networks = {
        ORIGINAL: original,
        STANDARDISED: ContrastStandardized(original, float(deviations_of(images).mean())),
        CONVERTED: _converted(original, name, images, seed, folder.parent.parent),
    }
    found: Found = {title: {f"{noise:g}": [] for noise in noises} for title in networks}
    found["factors"] = list(factors)
    for noise in noises:
        for factor in factors:
            pictures = exposure(tests.add(1).div(2), factor, noise, seed).mul(2).sub(1)
            for title, network in networks.items():
                found[title][f"{noise:g}"] += [_share(_answers(network, pictures), classes)]
    return found


def exposure(pixels: Tensor, factor: float, noise: float, seed: int) -> Tensor:
    """Pictures in [0, 1] with another exposure, as a camera stores them: clipped and rounded to 8 bits.

    Args:
        factor: of the light that reaches the sensor.
        noise: standard deviation of the sensor's noise, which does not depend on the light.
    """
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (pixels * factor + noise * drawn).clamp(0, 1).mul(255).round().div(255)


@torch.no_grad()
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in images.split(500)])


def _share(scores: Tensor, classes: Tensor) -> float:
    return float((scores.argmax(1) == classes).double().mean())
