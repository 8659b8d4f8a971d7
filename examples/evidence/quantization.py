"""Invariance for free: what do trained networks and their conversions lose to 8 bits, and to a camera's exposure?

    python -m benchmarks.plain_networks --data CIFAR10 --output data/plain          # trains the networks, once
    python -m examples.evidence.quantization --data CIFAR10 --plain data/plain -o out/quantization --jobs 2

A ResNet-20, a VGG and a MobileNet are converted (cosine, pooled radius 4) and calibrated on unlabelled training images,
not trained further. Original and conversion are exported to ONNX and quantized by ONNX Runtime's static quantization.
The runs are draws of the calibration images, of which each gives a conversion and the ranges of the quantization; the
trained networks are the same ones.

all operators   whatever ONNX Runtime quantizes by default, in an angular layer also the sums of squares
products        convolutions and linear maps with their filters only
fewer bits      the same ranges with fewer levels, of weights and activations alike

Quantized values are computed in floating point, so results do not depend on the integer kernels of a processor.
Exposure is a factor on the pixels before they are clipped and rounded to 8 bits, with noise of the sensor or without.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.plain_networks import weights_of
from examples.evidence.quantization_report import draw, tables
from examples.evidence.quantization_runs import ORIGINAL, VARIANTS, exposed, quantized
from examples.evidence.quantizer import MINMAX, PERCENTILE, Setting
from examples.evidence.work import Piece, complete, cpu_minutes
from examples.papers.report import finish, parse

EIGHT = tuple(
    Setting(operators, method, per_channel)
    for operators in ("all operators", "products")
    for method, per_channel in ((MINMAX, True), (MINMAX, False), (PERCENTILE, True), ("Entropy", True))
)
FEWER = tuple(Setting("products", method, True, bits) for method in (MINMAX, PERCENTILE) for bits in (6, 5, 4))


@dataclass(frozen=True)
class Scale:
    """Size of the program."""

    networks: tuple[str, ...]
    seeds: int
    """Number of draws of calibration images."""
    calibration_images: int
    """Number of images on which conversions are calibrated."""
    range_images: int
    """Number of these that give the ranges of a quantization."""
    test_images: int
    settings: tuple[Setting, ...]
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    noises: tuple[float, ...] = (0.0, 0.03)
    """Standard deviations of noise in pixels from 0 to 1."""
    needs_trained: bool = True


CPU = Scale(("resnet20", "vgg", "mobilenet"), 2, 1024, 256, 2_000, EIGHT + FEWER)
FULL = replace(CPU, seeds=5, test_images=10_000)
QUICK = Scale(("vgg",), 1, 16, 8, 20, (EIGHT[0], EIGHT[6], FEWER[2]), factors=(1.0, 4.0), needs_trained=False)
SCALES = {"quick": QUICK, "cpu": CPU, "full": FULL}


def main(argv: list[str] | None = None) -> None:
    further = {"--plain": {"type": Path, "default": Path("data/plain"), "help": "folder of the trained networks"}}
    args = parse(__doc__, argv, trains=True, further=further)
    scale = replace(SCALES[args.scale], **({"seeds": args.seeds} if args.seeds else {}))
    quantizations: dict[tuple[str, str, int], Piece] = {}
    exposures: dict[tuple[str, int], Piece] = {}
    for seed in range(scale.seeds):
        for name in scale.networks:
            given = {"name": name, "seed": seed, "calibration_images": scale.calibration_images,
                     "test_images": scale.test_images}  # fmt: skip
            trained = weights_of(name, args.plain) if scale.needs_trained else None
            for variant in VARIANTS:
                quantizations[name, variant, seed] = Piece(
                    f"{name}, {variant}, quantized, draw {seed}", partial(quantized, plain=trained),
                    {**given, "variant": variant, "range_images": scale.range_images, "settings": scale.settings},
                    trained,
                )  # fmt: skip
            exposures[name, seed] = Piece(
                f"{name}, exposed, draw {seed}", partial(exposed, plain=trained),
                {**given, "factors": scale.factors, "noises": scale.noises}, trained,
            )  # fmt: skip
    found = complete([*quantizations.values(), *exposures.values()], args)
    results = {
        "quantization": [{"network": name, "variant": variant, "draw": seed, **found[piece.name]}
                         for (name, variant, seed), piece in quantizations.items() if piece.name in found],
        "exposure": [{"network": name, "draw": seed, **found[piece.name]}
                     for (name, seed), piece in exposures.items() if piece.name in found],
    }  # fmt: skip
    minutes = cpu_minutes(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = [setting.name for setting in scale.settings]
    table = tables(results, scale.networks, settings, scale.seeds, minutes)
    document = {"settings": asdict(scale), "cpu_minutes": minutes, "original": ORIGINAL, **results}
    finish(args, "quantization", table, draw(results, scale.networks), document)


if __name__ == "__main__":
    main()
