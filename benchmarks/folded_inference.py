"""How long folded inference takes against the original: `OMP_NUM_THREADS=2 python benchmarks/folded_inference.py`.

All variants take turns within one process, so that a busy machine slows each of them alike; medians are compared.
"""

import argparse
import copy
import statistics
import time

import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sphereify import fold, sphereify
from sphereify.choices import OPERATORS
from sphereify.convert.graph import trace
from sphereify.convert.rewrite import without_norm


def with_norms_folded(model: nn.Module) -> nn.Module:
    """The plain network with each BatchNorm folded into the convolution before it, as torch does it."""
    fused = copy.deepcopy(model).eval()
    for site in trace(fused).sites:
        norm = fused.get_submodule(site.norm) if site.norm and site.owns_norm else None
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            fused.set_submodule(site.name, fuse_conv_bn_eval(site.module, norm))
            fused.set_submodule(site.norm, without_norm(norm))
    return fused


@torch.inference_mode()
def race(models: dict[str, nn.Module], images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds of each, the median over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            begin = time.perf_counter()
            model(images)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet18"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operators", nargs="*", default=OPERATORS)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    options = parser.parse_args()
    form = torch.contiguous_format if options.contiguous else torch.channels_last
    for name in options.models:
        torch.manual_seed(0)
        original = timm.create_model(name).eval()
        variants = {"original": original, "original, BatchNorm folded": with_norms_folded(original)}
        for operator in options.operators:
            converted = sphereify(original, operator=operator)
            if operator == "cosine":
                variants["cosine, not folded"] = converted.eval()
            variants[f"{operator}, folded"] = fold(converted)
        variants = {key: model.to(memory_format=form) for key, model in variants.items()}
        images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=form)
        found = race(variants, images, options.rounds)
        for key, seconds in found.items():
            ratios = [seconds / found[base] for base in ("original", "original, BatchNorm folded")]
            print(
                f"{name:24} {key:28} {seconds * 1e3:7.1f} ms   {ratios[0]:.2f} of the original, {ratios[1]:.2f} folded"
            )


if __name__ == "__main__":
    main()
