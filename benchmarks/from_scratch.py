"""The pooled radius in networks that are trained from scratch, against ρ = 0 and the plain network.

    python -m benchmarks.from_scratch --data CIFAR10 -o out/from_scratch [--jobs 2]

CNN-9 with cosine convolutions and the authors' settings; on a CPU a quarter of the filters, 20,000 images and three
seeds. Writes what the programs of examples/papers write, and robustness.md: the accuracy of the trained networks on
corrupted test images, and of the plain one behind contrast standardisation. Finished networks are not trained again.
"""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from examples.papers.cells import CPU, Builder, Cell, Experiment, Scale, folder_of, run
from examples.papers.operators_and_losses import options_of, terms_of
from examples.papers.plain_cnn import cnn, wide
from examples.papers.report import markdown, parse
from sphereify.datasets import class_count, load_data
from sphereify.files import write_text
from sphereify.training import Settings, trained
from sphereify.training.corruptions import CORRUPTIONS
from sphereify.training.robustness import RIVAL, Robustness, corrupted_accuracies, rival_of

RADII = (0.0, 1.0, 2.0)
CORRUPTED_IMAGES = {"full": None, "cpu": 1_000, "quick": 20}


def cells(scale: Scale) -> list[Cell]:
    build = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
    plain = Cell("CNN-9", "plain", build, None, terms_of("plain"))
    options = options_of("cosine", "softmax") or {}
    return [plain, *(Cell("CNN-9", f"ρ = {ρ:g}", build, {**options, "radius": ρ}, terms_of("cosine")) for ρ in RADII)]


EXPERIMENT = Experiment(
    "from_scratch",
    __doc__,
    cells,
    {},
    "authors",
    cpu=replace(CPU, width=1 / 4, train_images=20_000, seeds=3, tests=16),
)


def robustness_of(seed: int, scale: Scale, args: Any) -> Robustness:
    """Accuracies on corrupted images of the networks that were trained with a seed."""
    data = load_data(args.data, img_size=32, test_images=CORRUPTED_IMAGES[scale.name])
    networks = {
        cell.label: trained(
            Builder(cell, class_count(args.data)), cell.variant, folder_of(args.output / "runs", cell, seed)
        )
        for cell in cells(scale)
    }
    networks[RIVAL] = rival_of(networks["plain"], data)
    return corrupted_accuracies(networks, data, Settings(batch_size=500, seed=seed))


def table(found: list[Robustness]) -> str:
    """Mean accuracy in % over strengths and seeds, a network in each line."""
    names = ["clean", *CORRUPTIONS, "mean of the corrupted"]
    rows = []
    for network in found[0].networks:
        results = [seed.networks[network] for seed in found]
        columns = [[r.clean, *r.means.values(), r.mean] for r in results]
        rows.append([network, *(f"{100 * statistics.mean(column):.1f}" for column in zip(*columns, strict=True))])
    return markdown(["", *names], rows)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)
    args = parse(__doc__, argv, trains=True)
    scale: Scale = getattr(EXPERIMENT, args.scale)
    found = [robustness_of(seed, scale, args) for seed in range(args.seeds or scale.seeds)]
    write_text(args.output / "robustness.md", text := table(found))
    print(text)


if __name__ == "__main__":
    main()
