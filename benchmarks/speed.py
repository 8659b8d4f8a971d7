"""The cost of a converted network, as ratios to its original: time, memory, and what the hardware allows.

    python -m benchmarks.speed                                             # on the CPU
    python -m benchmarks.speed --device cuda --dtype bfloat16 --batch 256  # on a GPU
    python -m benchmarks.speed --parts training --models resnet50 --compile
    python -m benchmarks.speed --parts onnx --models resnet18 vit_tiny_patch16_224 --json speed.json

All variants take turns within one process, so that a busy machine slows each of them alike. A ratio is the median over
the rounds of the ratio within a round; in brackets the quartiles.
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import re
import statistics
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import exported
from sphereify import fold, param_groups, sphereify
from sphereify.convert.graph import read_graph
from sphereify.convert.rewrite import without_norm
from sphereify.nn import SphereConv2d, SphereLinear

PARTS = ("layers", "training", "inference", "memory", "roofline", "onnx")
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


def naive(layer: SphereConv2d, x: Tensor) -> Tensor:
    """SphereConv left to autograd: a dense convolution with ones for the patch norms, one operation after another."""
    geometry = (layer.stride, layer.padding, layer.dilation)
    ones = torch.ones_like(layer.weight[:1])
    length = (F.conv2d(x * x, ones, None, *geometry) + layer.eps).sqrt()
    filters = layer.weight / (layer.weight.square().sum((1, 2, 3), keepdim=True) + layer.eps).sqrt()
    cos = (F.conv2d(x, filters, None, *geometry) / length).clamp(-1 + 1e-6, 1 - 1e-6)
    name, k = layer.operator.name, getattr(layer.operator, "k", None)
    if name == "cosine":
        return cos
    theta = cos.acos()
    if name == "linear":
        return 1 - theta * (2 / math.pi)
    return ((math.pi / 2 - theta) / (2 * k)).tanh() / math.tanh(math.pi / (4 * k))


def made_naive(converted: nn.Module) -> nn.Module:
    network = copy.deepcopy(converted)
    for layer in network.modules():
        if isinstance(layer, SphereConv2d) and layer.groups == 1:
            layer.forward = types.MethodType(naive, layer)  # type: ignore[method-assign]
    return network


def with_norms_folded(model: nn.Module) -> nn.Module:
    """The plain network with each BatchNorm folded into the convolution before it, as torch does it."""
    fused = copy.deepcopy(model).eval()
    for site in read_graph(fused).sites:
        norm = fused.get_submodule(site.norm) if site.norm and site.owns_norm else None
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            fused.set_submodule(site.name, fuse_conv_bn_eval(site.module, norm))
            fused.set_submodule(site.norm, without_norm(norm))
    return fused


class Bench:
    """The device, the dtype and the inputs that all measurements share."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.layout = torch.contiguous_format if options.contiguous else torch.channels_last

    def images(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(self.options.batch, *shape, device=self.device)
        return x.to(memory_format=self.layout) if x.dim() == 4 else x

    def placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device).to(memory_format=self.layout)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def step(self, network: nn.Module) -> Callable[[], None]:
        """A training step: forward, loss, backward, SGD."""
        network = self.placed(network).train()
        x = self.images((3, self.options.size, self.options.size))
        classes = torch.arange(len(x), device=self.device) % 10
        groups = param_groups(network, weight_decay=1e-4)
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        run = torch.compile(network) if self.options.compile else network

        def step() -> None:
            with self.autocast():
                loss = F.cross_entropy(run(x).float(), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def inference(self, network: nn.Module, compiled: bool) -> Callable[[], None]:
        network = self.placed(network).eval()
        x = self.images((3, self.options.size, self.options.size))
        run = torch.compile(network) if compiled else network

        def infer() -> None:
            with torch.inference_mode(), self.autocast():
                run(x)

        return infer

    def race(self, variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
        """Seconds of each task in each round; the first two rounds warm up."""
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds + 2):
            for name, run in variants.items():
                self.wait()
                began = time.perf_counter()
                run()
                self.wait()
                seconds[name].append(time.perf_counter() - began)
        return {name: found[2:] for name, found in seconds.items()}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, str]:
    found = {}
    for name, times in seconds.items():
        quotients = sorted(a / b for a, b in zip(times, seconds[base], strict=True))
        low, middle, high = statistics.quantiles(quotients, n=4)
        found[name] = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    return found


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
        found = ratios(seconds, "plain")
        yield [name, f"{statistics.median(seconds['plain']) * 1e3:.2f}",
               *(found.get(key, "") for key in (*bench.options.operators, "naive"))]  # fmt: skip


def networks(bench: Bench, name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    original = timm.create_model(name)
    made: dict[str, nn.Module] = {"original": original}
    for operator in bench.options.operators:
        made[operator] = sphereify(original, operator=operator)
    if bench.options.radius:
        made["cosine, radius"] = sphereify(original, operator="cosine", radius=bench.options.radius)
    made["naive (cosine)"] = made_naive(made["cosine"])
    if any(isinstance(module, nn.BatchNorm2d) for module in original.modules()):
        made["SphereNorm"] = sphereify(original, operator="cosine", norm="replace")
    return made


def training(bench: Bench) -> Iterator[list[str]]:
    for name in bench.options.models:
        made = networks(bench, name)
        if bench.options.compile:
            made.pop("naive (cosine)")
        seconds = bench.race({key: bench.step(network) for key, network in made.items()}, bench.options.rounds)
        found = ratios(seconds, "original")
        yield [name, f"{statistics.median(seconds['original']) * 1e3:.0f}",
               *(found.get(key, "") for key in (*bench.options.operators, "naive (cosine)", "SphereNorm")),
               ratios(seconds, "cosine").get("cosine, radius", "")]  # fmt: skip


def inference(bench: Bench) -> Iterator[list[str]]:
    for name in bench.options.models:
        torch.manual_seed(0)
        original = timm.create_model(name).eval()
        variants = {"original": original, "original, BatchNorm folded": with_norms_folded(original)}
        for operator in bench.options.operators:
            converted = sphereify(original, operator=operator)
            variants[operator], variants[f"{operator}, folded"] = converted, fold(converted)
        runs = {key: bench.inference(network, bench.options.compile) for key, network in variants.items()}
        seconds = bench.race(runs, bench.options.rounds)
        for key in variants:
            yield [name, key, f"{statistics.median(seconds[key]) * 1e3:.1f}", ratios(seconds, "original")[key],
                   ratios(seconds, "original, BatchNorm folded")[key]]  # fmt: skip


def saved_bytes(bench: Bench, network: nn.Module) -> int:
    """Bytes that autograd keeps of a forward for the backward, without parameters."""
    network = bench.placed(network).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(network.parameters(), network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), bench.autocast():
        output = network(bench.images((3, bench.options.size, bench.options.size)))
    del output
    return sum(kept.values())


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
        torch.manual_seed(0)
        original = timm.create_model(name)
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["resnet18"],
                        help="of timm; usual: resnet18 resnet50 convnext_atto vit_tiny_patch16_224")  # fmt: skip
    parser.add_argument("--operators", nargs="+", default=["cosine", "linear", "sigmoid"])
    parser.add_argument("--radius", type=float, default=0.0, help="time the cosine with this pooled radius as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument("--compile", action="store_true", help="torch.compile all networks")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime; more than 1 needs a quiet machine")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()
    if "cosine" not in options.operators:
        options.operators.insert(0, "cosine")
    bench = Bench(options)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    layout = ("contiguous" if options.contiguous else "channels_last") + (", compiled" if options.compile else "")
    where = f"torch {torch.__version__}, {device}, {options.dtype}, {layout}, batch {options.batch}, {options.size} px"
    print(where)
    operators = list(options.operators)
    headers = {
        "layers": ["layer", "plain, ms", *operators, "naive cosine"],
        "training": ["training step", "original, ms", *operators, "naive cosine", "SphereNorm", "radius, to cosine"],
        "inference": ["inference", "variant", "ms", "to the original", "to it with BatchNorm folded"],
        "memory": ["memory", "variant", "saved for backward, MiB", "ratio", "peak, MiB", "ratio"],
        "roofline": ["roofline", "GFLOP", "GFLOP/s reached", "extra GB", "GB/s of a copy", "original, ms", "allowed"],
        "onnx": ["ONNX Runtime", "variant", "batch", "ms", "to the original"],
    }
    found: dict[str, object] = {"setting": where}
    for part in options.parts:
        found[part] = table("ONNX" if part == "onnx" else part.capitalize(), headers[part], globals()[part](bench))
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
