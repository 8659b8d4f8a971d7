"""Phase against magnitude: the first observation of "Deep Hyperspherical Learning".

    python -m examples.papers.fourier --data CIFAR10 -o out/fourier

Each test image gets the phases of its own Fourier transform and the magnitudes of another image's, of another class.
Networks trained on ordinary images, a plain and a cosine CNN-9, are asked what it shows: the class that its phases come
from, or the one of its magnitudes?
"""

from functools import partial

import torch
from torch import Tensor, nn

from examples.papers.cells import CPU, FULL, QUICK, Cell, network_trained
from examples.papers.operators_and_losses import options_of, terms_of
from examples.papers.plain_cnn import cnn, wide
from examples.papers.report import finish, markdown, parse, picture, told_errors
from sphereify.datasets import load_data

SCALES = {"quick": QUICK, "cpu": CPU, "full": FULL}
ASKED = 5_000
"""Largest number of test images."""


def mixed(phases: Tensor, magnitudes: Tensor) -> Tensor:
    """Images with the phases of one batch (B, C, H, W) and the magnitudes of another."""
    ours, theirs = torch.fft.fft2(phases), torch.fft.fft2(magnitudes)
    return torch.fft.ifft2(torch.polar(theirs.abs(), ours.angle())).real


def partners(targets: Tensor) -> Tensor:
    """For each image the index of one of another class, the same in each run."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for own, start in enumerate(order):
        turns = range(start, start + len(targets))
        found += [next(n % len(targets) for n in turns if targets[n % len(targets)] != targets[own])]
    return torch.tensor(found)


@torch.no_grad()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    """The predicted classes (B,)."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).argmax(1).cpu() for part in images.split(500)])


@told_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    scale = SCALES[args.scale]
    test = load_data(args.data, img_size=32).test
    chosen = range(0, len(test), -(-len(test) // ASKED))  # type: ignore[arg-type]
    pairs = [test[number] for number in chosen]
    images, targets = torch.stack([image for image, _ in pairs]), torch.tensor([target for _, target in pairs])
    others = partners(targets)
    odd = mixed(images, images[others])
    build = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
    rows, document = [], {}
    for name in ("plain", "cosine"):
        cell = Cell("CNN-9", name, build, options_of(name, "softmax"), terms_of(name))
        network, _ = network_trained(cell, scale, args)
        found = answers(network, odd)
        shares = {
            "ordinary images": answers(network, images) == targets,
            "class of the phases": found == targets,
            "class of the magnitudes": found == targets[others],
        }
        document[name] = {part: right.float().mean().item() for part, right in shares.items()}
        rows += [[name, *(f"{100 * share:.2f}" for share in document[name].values())]]
    table = markdown(["answers, %", *document["plain"]], rows)
    finish(args, "fourier", table, draw(images, images[others], odd), {"answers": document})


def draw(phases: Tensor, magnitudes: Tensor, odd: Tensor) -> object:
    """Draw eight images, those whose magnitudes they get, and the mixed ones."""
    figure, axes = picture(width=8, height=3.6, nrows=3)
    rows = {"phases of": phases, "magnitudes of": magnitudes, "together": odd}
    step = max(1, len(odd) // 8)
    for panel, (name, images) in zip(axes, rows.items(), strict=True):
        shown = torch.cat(list((images[::step][:8] + 1) / 2), 2).clamp(0, 1)
        panel.imshow(shown.permute(1, 2, 0).numpy())
        panel.set_title(name, fontsize=8, pad=2)
        panel.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
