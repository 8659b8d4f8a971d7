"""What the benchmarks of speed share: networks and their variants, steps to time, and races between them."""

import argparse
import copy
import itertools
import math
import statistics
import time
import types
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sphereify import param_groups, sphereify
from sphereify.convert.graph import read_graph
from sphereify.convert.rewrite import without_norm
from sphereify.nn import SphereConv2d

# ---- Networks


def create(name: str, size: int) -> nn.Module:
    """A network of timm for images of that size, with the same random weights each time."""
    torch.manual_seed(0)
    settings = timm.get_pretrained_cfg(name)
    return timm.create_model(name, **({"img_size": size} if settings and settings.fixed_input_size else {}))


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


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


def networks(bench: "Bench", name: str) -> dict[str, nn.Module]:
    """The original of that name and its variants."""
    original = create(name, bench.options.size)
    made: dict[str, nn.Module] = {"original": original}
    for operator in bench.options.operators:
        made[operator] = sphereify(original, operator=operator)
    if bench.options.radius:
        made["cosine, radius"] = sphereify(original, operator="cosine", radius=bench.options.radius)
    made["naive (cosine)"] = made_naive(made["cosine"])
    if has_batch_norm(original):
        made["SphereNorm"] = sphereify(original, operator="cosine", norm="replace")
    return made


# ---- Timing


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

    def step(self, network: nn.Module, compiled: bool | None = None) -> Callable[[], None]:
        """A training step: forward, loss, backward, SGD; compiled if `compiled` or, without it, the option says so."""
        network = self.placed(network).train()
        x = self.images((3, self.options.size, self.options.size))
        classes = torch.arange(len(x), device=self.device) % 10
        groups = param_groups(network, weight_decay=1e-4)
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        run = torch.compile(network) if (self.options.compile if compiled is None else compiled) else network

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


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """The median and the quartiles of the ratio to `base` within a round."""
    return {name: spread([a / b for a, b in zip(times, seconds[base], strict=True)]) for name, times in seconds.items()}


def ratio_texts(seconds: dict[str, list[float]], base: str) -> dict[str, str]:
    """The same as text: the median, in brackets the quartiles."""
    return {name: "{:.2f} [{:.2f}, {:.2f}]".format(*found) for name, found in ratios(seconds, base).items()}


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
