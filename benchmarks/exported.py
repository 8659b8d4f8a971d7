"""Networks as ONNX files, timed in ONNX Runtime: the original from torch.onnx, the converted ones from `export`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench import create, ratio_texts
from sphereify import export, sphereify

BATCHES = (1, 8)
TURN = 0.05
"""Seconds that one turn of a network takes at least; the fastest run within it counts."""


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """For each network, variant and batch size: milliseconds, and the ratio to the original."""
    for name in options.models:
        for batch, seconds in races(name, options):
            found = ratio_texts(seconds, "original")
            for key, times in seconds.items():
                yield [name, key, str(batch), f"{statistics.median(times) * 1e3:.2f}", found[key]]


def races(name: str, options: argparse.Namespace) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """For each batch size the seconds of each variant of a network in each round."""
    with tempfile.TemporaryDirectory() as folder:
        files = written(name, options, Path(folder))
        for batch in BATCHES:
            yield batch, race({key: runner(path, batch, options) for key, path in files.items()}, options.rounds)


def written(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The files of the original and of each variant, which take any batch size."""
    original = as_trained(create(name, options.size).eval())
    x = torch.randn(2, 3, options.size, options.size)
    files = {"original": folder / "original.onnx"}
    torch.onnx.export(
        original, (x,), files["original"], dynamo=True, dynamic_shapes=({0: "batch"},), external_data=False,
        verbose=False,
    )  # fmt: skip
    variants: dict[str, dict[str, Any]] = {operator: {"operator": operator} for operator in options.operators}
    if options.radius:
        variants["cosine, radius"] = {"operator": "cosine", "radius": options.radius}
    for key, settings in variants.items():
        files[key] = folder / f"{key}.onnx"
        export(sphereify(original, **settings).eval(), files[key], x)
    return files


@torch.no_grad()
def as_trained(network: nn.Module) -> nn.Module:
    """The network with biases and statistics that are not 0 and 1, which exporters would leave out."""
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.add_(0.1 * torch.randn(len(value)))
    return network


def runner(path: Path, batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """Runs a file once on random images."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    x: Tensor = torch.randn(batch, 3, options.size, options.size)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def race(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the fastest run of each file in each round; they take turns, and the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(fastest(run))
    return {name: found[1:] for name, found in seconds.items()}


def fastest(run: Callable[[], None]) -> float:
    times: list[float] = []
    while sum(times) < TURN or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
