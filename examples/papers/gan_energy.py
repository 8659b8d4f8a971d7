"""Hyperspherical energy in a discriminator: table 14 of "Learning towards Minimum Hyperspherical Energy", smaller.

    python -m examples.papers.gan_energy --data CIFAR10 -o out/gan_energy

A generative adversarial network with hinge losses, its discriminator as it is, with spectral normalization, with the
hyperspherical energy of its filters, and with both. The score is not the Inception score of the paper: it is the
Fréchet distance between the features of generated images and of test images, in the last hidden layer of a CNN-9 that
is trained here first on the same data. Lower is better, 0 means the same mean and covariance; a distance holds for
this classifier only, and the distance of training images to test images, in the last row, is what can be reached.
"""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from examples.papers.cells import CPU, FULL, QUICK, Cell, Scale, network_trained
from examples.papers.plain_cnn import cnn, wide
from examples.papers.report import finish, markdown, parse, picture, told_errors
from sphereify import HypersphericalEnergy
from sphereify.datasets import load_data, load_images
from sphereify.files import write_text

KINDS = {"plain": (False, 0.0), "SN": (True, 0.0), "MHE": (False, 1.0), "MHE + SN": (True, 1.0)}
"""Spectral normalization, and the weight of the energy (s = 2, half space) in the discriminator's loss."""
AUTHORS = {"SN": 7.42, "MHE": 7.32, "MHE + SN": 7.59}
"""Inception scores, table 14."""
NOISE = 64
"""Length of the noise vector from which an image is generated."""
SAVED_EVERY = 1_000
"""Iterations between two saved states, from which an interrupted run continues."""


@dataclass(frozen=True)
class Size:
    """Size of the experiment."""

    classifier: Scale
    iterations: int
    batch_size: int
    width: int
    """Channels of the discriminator's first layer and of the generator's last but one."""
    images: int
    """Largest number of training images."""
    scored: int
    """Number of generated and of real images that are compared."""
    seeds: int


SIZES = {
    "quick": Size(QUICK, 2, 8, 4, 40, 20, 1),
    "cpu": Size(CPU, 1_500, 64, 8, 10_000, 5_000, 1),
    "full": Size(FULL, 50_000, 64, 64, 50_000, 10_000, 3),
}


def generator(width: int) -> nn.Sequential:
    """noise (B, NOISE) -> images (B, 3, 32, 32) in [-1, 1]"""
    layers: list[nn.Module] = [nn.Linear(NOISE, 16 * 4 * width), nn.Unflatten(1, (4 * width, 4, 4))]
    for inputs, outputs in ((4 * width, 2 * width), (2 * width, width), (width, width)):
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


def discriminator(width: int, spectral: bool) -> nn.Sequential:
    """images (B, 3, 32, 32) -> scores (B, 1)"""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
        layers += [nn.Conv2d(outputs, outputs, 4, 2, 1), nn.LeakyReLU(0.1)]
        inputs = outputs
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * inputs, 1))
    if spectral:
        for layer in network:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                spectral_norm(layer)
    return network


def train(kind: str, size: Size, seed: int, images: Tensor, folder: Path) -> nn.Module:
    """Train a generator, from the last state in `folder` if there is one."""
    spectral, weight = KINDS[kind]
    torch.manual_seed(seed)
    makes, judges = (net.to(images.device) for net in (generator(size.width), discriminator(size.width, spectral)))
    energy = HypersphericalEnergy(s=2, half_space=True)
    steps = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (makes, judges)]
    parts = {"makes": makes, "judges": judges, "makes_step": steps[0], "judges_step": steps[1]}
    saved = folder / "state.pt"
    first = _restore(saved, parts) if saved.is_file() else 0
    for iteration in range(first, size.iterations):
        real = images[torch.randint(len(images), (size.batch_size,))]
        fake = makes(_noise(size.batch_size, images.device))
        loss = F.relu(1 - judges(real)).mean() + F.relu(1 + judges(fake.detach())).mean()
        if weight:
            loss = loss + weight * energy(judges)
        _step(steps[1], loss)
        _step(steps[0], -judges(makes(_noise(size.batch_size, images.device))).mean())
        if (iteration + 1) % SAVED_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "iteration": iteration + 1, "random": torch.get_rng_state()}, saved)
    return makes.eval()


def _restore(saved: Path, parts: dict[str, Any]) -> int:
    """Load the last saved state, and return the number of iterations that led to it."""
    state = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    return state["iteration"]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _noise(count: int, device: torch.device) -> Tensor:
    return torch.randn(count, NOISE).to(device)


def frechet(a: Tensor, b: Tensor) -> float:
    """The distance ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2·(Σ_a·Σ_b)^½) of two sets of features (images, features), in fp64."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


@torch.no_grad()
def features(network: nn.Module, images: Tensor) -> Tensor:
    """The features of images (count, 3, 32, 32): the inputs of the classifier's last layer."""
    hidden = network[:-1]  # type: ignore[index]
    return torch.cat([hidden(part).cpu() for part in images.split(500)])


@torch.no_grad()
def samples(makes: nn.Module, count: int, device: torch.device) -> Tensor:
    """Generated images (count, 3, 32, 32), the same noise for every generator."""
    noise = torch.randn(count, NOISE, generator=torch.Generator().manual_seed(1))
    return torch.cat([makes(part.to(device)) for part in noise.split(500)])


@told_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    size = SIZES[args.scale]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = size.classifier.width
    build = partial(cnn, filters=wide((64, 96, 128), width), features=wide((256,), width)[0])
    network, accuracy = network_trained(Cell("classifier", "CNN-9", build, None), size.classifier, args)
    network.to(device)
    images = torch.cat(load_images(args.data, size.images, img_size=32)).to(device)
    test = load_data(args.data, img_size=32).test
    real = torch.stack([test[i][0] for i in range(0, len(test), -(-len(test) // size.scored))]).to(device)  # type: ignore[arg-type]
    wanted = features(network, real)
    found: dict[str, list[float]] = {}
    pictures = {"test images": real[torch.linspace(0, len(real) - 1, 10).long()]}
    for kind in KINDS:
        for seed in range(size.seeds):
            folder = args.output / "runs" / f"{kind.replace(' ', '')}-seed{seed}"
            score, shown = _scored(kind, size, seed, images, folder, network, wanted)
            found.setdefault(kind, []).append(score)
            pictures.setdefault(kind, shown)
    floor = frechet(features(network, images[: size.scored]), wanted)
    rows = [[kind, _mean(scores), f"{AUTHORS[kind]:.2f}" if kind in AUTHORS else ""] for kind, scores in found.items()]
    rows += [["training images", f"{floor:.2f}", "11.24"]]
    table = markdown(
        ["discriminator", "Fréchet distance of features", "authors, Inception score (higher is better)"], rows
    )
    document = {"size": dataclasses.asdict(size), "authors": AUTHORS, "distances": found, "training images": floor,
                "accuracy of the classifier": accuracy}  # fmt: skip
    finish(args, "gan_energy", table, draw(pictures), document)


def _scored(kind: str, size: Size, seed: int, images: Tensor, folder: Path, network: nn.Module,
            wanted: Tensor) -> tuple[float, Tensor]:  # fmt: skip
    """The distance of a generator's images, and ten of them; read from its file if the run has finished."""
    known, asked = folder / "outcome.json", repr(size)
    before = json.loads(known.read_text()) if known.is_file() else {}
    if before.get("size") == asked:
        return before["distance"], torch.tensor(before["shown"])
    makes = train(kind, size, seed, images, folder)
    made = samples(makes, size.scored, images.device)
    score, shown = frechet(features(network, made), wanted), (made[:10].cpu() * 1e3).round() / 1e3
    write_text(known, json.dumps({"size": asked, "distance": score, "shown": shown.tolist()}) + "\n")
    (folder / "state.pt").unlink(missing_ok=True)
    print(f"{kind}, seed {seed}: {score:.2f}", flush=True)
    return score, shown


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def draw(pictures: dict[str, Tensor]) -> Any:
    """Draw a row of ten images for each kind."""
    figure, axes = picture(width=8, height=0.95 * len(pictures), nrows=len(pictures))
    for panel, (name, images) in zip(axes, pictures.items(), strict=True):
        panel.imshow(torch.cat(list((images.cpu() + 1) / 2), 2).clamp(0, 1).permute(1, 2, 0).numpy())
        panel.set_title(name, fontsize=8, pad=2)
        panel.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
