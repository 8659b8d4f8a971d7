"""The cost of a converted network, as ratios to its original: time, memory, and what the hardware allows.

    python -m benchmarks.speed --json speed.json                           # the table of five networks, on the CPU
    python -m benchmarks.speed --models resnet18 --columns training folded
    python -m benchmarks.speed --device cuda --dtype bfloat16 --batch 256  # on a GPU
    python -m benchmarks.speed --parts training --models resnet50 --compile
    python -m benchmarks.speed --parts layers inference memory roofline onnx

The table has a row for each network and a column for each way of running it (`columns`). With --json it is written
after each cell, and a call with the same setting measures what the file lacks. The other parts each show one thing in
detail.

All variants take turns within one process, so that a busy machine slows each of them alike. A ratio is the median over
the rounds of the ratio within a round; in brackets the quartiles.
"""

import argparse
import copy
import multiprocessing
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import columns, exported
from benchmarks.bench import Bench, create, made_naive, networks, ratio_texts, saved_bytes, with_norms_folded
from benchmarks.record import Record
from sphereify import fold, sphereify
from sphereify.nn import SphereConv2d, SphereLinear

PARTS = ("table", "layers", "training", "inference", "memory", "roofline", "onnx")
MODELS = ("resnet18", "resnet50", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_100")
LAYERS = {
    "7×7 stride 2, 3→64, 224": (nn.Conv2d(3, 64, 7, 2, 3, bias=False), (3, 224, 224)),
    "3×3, 64→64, 56": (nn.Conv2d(64, 64, 3, 1, 1, bias=False), (64, 56, 56)),
    "3×3, 256→256, 14": (nn.Conv2d(256, 256, 3, 1, 1, bias=False), (256, 14, 14)),
    "1×1, 256→64, 56": (nn.Conv2d(256, 64, 1, bias=False), (256, 56, 56)),
    "1×1, 64→256, 56": (nn.Conv2d(64, 256, 1, bias=False), (64, 56, 56)),
    "1×1 stride 2, 256→512, 56": (nn.Conv2d(256, 512, 1, 2, bias=False), (256, 56, 56)),
    "depthwise 3×3, 96, 56": (nn.Conv2d(96, 96, 3, 1, 1, groups=96, bias=False), (96, 56, 56)),
    "depthwise 7×7, 96, 28": (nn.Conv2d(96, 96, 7, 1, 3, groups=96, bias=False), (96, 28, 28)),
    "linear, 192→768, 197 tokens": (nn.Linear(192, 768, bias=False), (197, 192)),
}


def table(title: str, header: list[str], rows: Iterator[list[str]]) -> list[dict[str, object]]:
    """Print a table row by row, and return it with numbers for JSON."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    found = []
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
        found.append({name: as_number(cell) for name, cell in zip(header, row, strict=True)})
    return found


def as_number(cell: str) -> object:
    """A number, a median with its quartiles, or the text of a cell."""
    if match := re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", cell):
        median, low, high = map(float, match.groups())
        return {"median": median, "quartiles": [low, high]}
    return float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else cell


def layers(bench: Bench) -> Iterator[list[str]]:
    for name, (plain, shape) in LAYERS.items():
        x = bench.images(shape).requires_grad_()
        plain = bench.placed(copy.deepcopy(plain))
        variants = {"plain": plain}
        for operator in bench.options.operators:
            twin = SphereConv2d.from_conv if isinstance(plain, nn.Conv2d) else SphereLinear.from_linear
            variants[operator] = twin(copy.deepcopy(plain), operator=operator)  # type: ignore[operator]
            variants[operator].output_read_only = True
        if isinstance(plain, nn.Conv2d) and plain.groups == 1:
            variants["naive"] = made_naive(nn.Sequential(variants["cosine"]))

        def both(layer: nn.Module, x: Tensor = x) -> None:
            with bench.autocast():
                y = layer(x)
            y.backward(torch.ones_like(y))

        seconds = bench.race({key: (lambda layer=layer: both(layer)) for key, layer in variants.items()},  # type: ignore[misc]
                             bench.options.rounds)  # fmt: skip
        found = ratio_texts(seconds, "plain")
        yield [name, f"{statistics.median(seconds['plain']) * 1e3:.2f}",
               *(found.get(key, "") for key in (*bench.options.operators, "naive"))]  # fmt: skip


def training(bench: Bench) -> Iterator[list[str]]:
    for name in bench.options.models:
        made = networks(bench, name)
        if bench.options.compile:
            made.pop("naive (cosine)")
        seconds = bench.race({key: bench.step(network) for key, network in made.items()}, bench.options.rounds)
        found = ratio_texts(seconds, "original")
        yield [name, f"{statistics.median(seconds['original']) * 1e3:.0f}",
               *(found.get(key, "") for key in (*bench.options.operators, "naive (cosine)", "SphereNorm")),
               ratio_texts(seconds, "cosine").get("cosine, radius", "")]  # fmt: skip


def inference(bench: Bench) -> Iterator[list[str]]:
    for name in bench.options.models:
        original = create(name, bench.options.size).eval()
        variants = {"original": original, "original, BatchNorm folded": with_norms_folded(original)}
        for operator in bench.options.operators:
            converted = sphereify(original, operator=operator)
            variants[operator], variants[f"{operator}, folded"] = converted, fold(converted)
        runs = {key: bench.inference(network, bench.options.compile) for key, network in variants.items()}
        seconds = bench.race(runs, bench.options.rounds)
        for key in variants:
            yield [name, key, f"{statistics.median(seconds[key]) * 1e3:.1f}", ratio_texts(seconds, "original")[key],
                   ratio_texts(seconds, "original, BatchNorm folded")[key]]  # fmt: skip


def _peak(options: argparse.Namespace, name: str, variant: str) -> float:
    """Bytes at the peak of a training step: of the GPU's memory, or of a process that does nothing else."""
    bench = Bench(options)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = bench.step(networks(bench, name)[variant])
    for _ in range(2):
        step()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # what getrusage says is that of the parent too
    return 2**10 * int(status.split("VmHWM:")[1].split()[0])


def memory(bench: Bench) -> Iterator[list[str]]:
    for name in bench.options.models:
        made = networks(bench, name)
        first = None
        for key, network in made.items():
            saved = saved_bytes(bench, network)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(_peak, (bench.options, name, key))
            first = first or (saved, peak)
            yield [name, key, f"{saved / 2**20:.0f}", f"{saved / first[0]:.2f}",
                   f"{peak / 2**20:.0f}", f"{peak / first[1]:.2f}"]  # fmt: skip


def roofline(bench: Bench) -> Iterator[list[str]]:
    """The bytes that the angle needs beyond the products, once each, at the speed of a copy."""
    element = torch.tensor([], dtype=bench.dtype).element_size()
    block = torch.empty(2**26, device=bench.device)
    other = torch.empty_like(block)
    copies = bench.race({"copy": lambda: other.copy_(block)}, 5)["copy"]  # type: ignore[dict-item]
    bandwidth = 2 * block.nbytes / min(copies)
    for name in bench.options.models:
        original = create(name, bench.options.size)
        moved, flops = [], []

        def note(
            layer: nn.Module, args: tuple[Tensor, ...], y: Tensor, moved: list = moved, flops: list = flops
        ) -> None:
            x = args[0]
            # Forward: x for the norms, y read and written. Backward: the gradient, g and their product; x, its gradient
            # read and written.
            moved.append((x.numel() + 2 * y.numel() + 3 * y.numel() + 3 * x.numel()) * element)
            flops.append(6 * y.numel() * layer.weight[0].numel())

        for layer in original.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(note)
        step = bench.step(original)
        step()
        moved, flops = moved[:], flops[:]
        seconds = statistics.median(bench.race({"original": step}, 3)["original"])
        extra = sum(moved) / bandwidth
        yield [name, f"{sum(flops) / 1e9:.0f}", f"{sum(flops) / seconds / 1e9:.0f}", f"{sum(moved) / 1e9:.2f}",
               f"{bandwidth / 1e9:.0f}", f"{seconds * 1e3:.0f}", f"{1 + extra / seconds:.2f}"]  # fmt: skip


def onnx(bench: Bench) -> Iterator[list[str]]:
    yield from exported.rows(bench.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["table"])
    parser.add_argument("--columns", nargs="+", choices=list(columns.JOBS), default=list(columns.JOBS),
                        help="of the table")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"of timm; default: {' '.join(MODELS)}")
    parser.add_argument("--operators", nargs="+", default=["cosine", "linear", "sigmoid"])
    parser.add_argument("--radius", type=float, default=0.0, help="time the cosine with this pooled radius as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument("--compile", action="store_true", help="torch.compile all networks of the other parts")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime; more than 1 needs a quiet machine")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well, and take up what it has")
    options = parser.parse_args()
    if "cosine" not in options.operators:
        options.operators.insert(0, "cosine")
    bench = Bench(options)
    where = setting(bench)
    print(where)
    record = Record(options.json, where)
    operators = list(options.operators)
    headers = {
        "layers": ["layer", "plain, ms", *operators, "naive cosine"],
        "training": ["training step", "original, ms", *operators, "naive cosine", "SphereNorm", "radius, to cosine"],
        "inference": ["inference", "variant", "ms", "to the original", "to it with BatchNorm folded"],
        "memory": ["memory", "variant", "saved for backward, MiB", "ratio", "peak, MiB", "ratio"],
        "roofline": ["roofline", "GFLOP", "GFLOP/s reached", "extra GB", "GB/s of a copy", "original, ms", "allowed"],
        "onnx": ["ONNX Runtime", "variant", "batch", "ms", "to the original"],
    }
    for part in options.parts:
        if part == "table":
            columns.measure(bench, options.columns, record)
        else:
            title = "ONNX" if part == "onnx" else part.capitalize()
            record.put_part(part, table(title, headers[part], globals()[part](bench)))


def setting(bench: Bench) -> str:
    """What the numbers depend on beside the networks."""
    options = bench.options
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    layout = ("contiguous" if options.contiguous else "channels_last") + (", compiled" if options.compile else "")
    runtime = f"ONNX Runtime with {options.threads} thread{'s' * (options.threads > 1)}"
    return (
        f"torch {torch.__version__}, {device}, {options.dtype}, {layout}, batch {options.batch}, {options.size} px, "
        f"{', '.join(options.operators)}{f', radius {options.radius:g}' if options.radius else ''}, "
        f"{options.rounds} rounds, {runtime}"
    )


if __name__ == "__main__":
    main()
