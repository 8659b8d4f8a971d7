"""Architectures of timm and torchvision through the conversion: `python -m tests.zoo [--all] [--only GLOB] [--jobs N]`.

First every architecture is built on the meta device, without values, which costs little. Architectures of one structure
differ in depth, widths and image size only; the smallest of each structure (with `--all`: every one) is planned and
converted, operators and skip_shortcuts in turn. The number of sites must be that of an independent walk: modules by
their classes, plus functional calls counted in a run.

Then the smallest architecture of each model file runs with real weights, unless it has more than 150 million: a
forward and a backward pass, `verify` with a reason for each site that is never called, and saved and loaded with
identical outputs.

Prints a table of outcomes and every refusal with its reason; the exit code is 1 if any architecture failed or was
miscounted.
"""

import argparse
import fnmatch
import hashlib
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sphereify import apply_plan, load, plan_conversion, save, sphereify
from sphereify.choices import OPERATORS
from sphereify.convert.assumed_inputs import assumed_inputs
from sphereify.errors import SphereifyError
from sphereify.sources import Source, build_model

LARGEST_RUN = 150_000_000
"""Parameters of the largest network that runs with real weights: each process holds three copies and a gradient."""

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    """ran, converted, converted without trace, refused, failed, or miscounted"""
    detail: str
    seconds: float


# -------------------------------------------------------------------------------------------- every architecture, built


@dataclass(frozen=True)
class Survey:
    """What is known of an architecture once it is built."""

    source: Source
    structure: str
    modules: int
    parameters: int
    file: str
    """The module of timm or torchvision that defines it."""


def architectures() -> list[Source]:
    import timm
    import torchvision

    names = [Source("timm", name) for name in timm.list_models()]
    return names + [Source("torchvision", name) for name in torchvision.models.list_models()]


def survey(source: Source) -> Survey | Outcome:
    import timm
    import torchvision

    try:
        model = build(source)
    except Exception as error:
        return failure(source, error)
    find = timm.model_entrypoint if source.library == "timm" else torchvision.models.get_model_builder
    size = sum(p.numel() for p in model.parameters())
    return Survey(source, structure_of(model), len(list(model.modules())), size, find(source.name).__module__)


def structure_of(model: nn.Module) -> str:
    """A digest of which modules stand in which, under which names, and of what neither width nor depth changes."""
    parts = {
        (class_name(parent), "" if name.isdigit() else name, class_name(child), *kind_of(child))
        for parent in model.modules()
        for name, child in parent.named_children()
    }
    parts |= {(class_name(m), name, p is None) for m in model.modules() for name, p in m._parameters.items()}
    return hashlib.sha256(repr(sorted(map(repr, parts))).encode()).hexdigest()


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """The kind of a layer's geometry, and switches of any module."""
    switches = tuple((n, v) for n, v in sorted(vars(module).items()) if isinstance(v, bool | str) and n != "training")
    if not isinstance(module, nn.modules.conv._ConvNd):
        return switches
    groups = "depthwise" if module.groups == module.in_channels > 1 else module.groups > 1
    windows = (max(numbers) > 1 for numbers in (module.kernel_size, module.stride, module.dilation))
    padding = module.padding if isinstance(module.padding, str) else any(module.padding)
    return (*switches, *windows, groups, padding)


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def smallest_of_each(attribute: str, surveys: Iterable[Survey], size: str) -> list[Source]:
    """The smallest of those that share an attribute; the largest come first, so that all processes end together."""
    smallest: dict[str, Survey] = {}
    for one in sorted(surveys, key=attrgetter(size)):
        smallest.setdefault(getattr(one, attribute), one)
    return [one.source for one in reversed(smallest.values())]


class _WithoutValues(TorchFunctionMode):
    """Leaves out what fills a tensor of the meta device in place: there are no values, and the shape stays."""

    FILLS = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.clamp_,
        torch.Tensor.erfinv_,
        torch.Tensor.mul_,
        torch.Tensor.add_,
        torch.Tensor.fill_,
        torch.Tensor.zero_,
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in self.FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build(source: Source) -> nn.Module:
    try:
        with torch.device("meta"), _WithoutValues():
            return build_model(source)
    except Exception:  # some constructors compute with values
        return build_model(source)


# --------------------------------------------------------------------------------------------- converted without values


def convert(numbered: tuple[int, Source]) -> Outcome:
    number, source = numbered
    started = time.perf_counter()
    try:
        model = build(source)
        expected = walk(model)
        started = time.perf_counter()
        plan = plan_conversion(model, operator=OPERATORS[number % 4], skip_shortcuts=bool(number // 4 % 2))
        seconds = time.perf_counter() - started
        apply_plan(model, plan, inplace=True)
    except SphereifyError as error:
        return Outcome(str(source), "refused", str(error), time.perf_counter() - started)
    except Exception as error:
        return failure(source, error)
    # The walk does not know which matrices are computed from parameters.
    comparable = [
        d for d in plan.decisions if d.call is None or d.call.kind != "product" or d.call.parameter is not None
    ]
    counted = Counter("call" if not d.type else "module" for d in comparable)
    if expected is not None and counted != expected:
        return Outcome(str(source), "miscounted", f"plan {dict(counted)}, walk {dict(expected)}", seconds)
    never = sum(d.called is False for d in plan.decisions)
    unknown = sum(d.called is None for d in plan.decisions)
    detail = f"{len(plan.converted)} converted, {len(plan.kept)} kept, {never} never called, {unknown} not known"
    traced = not any(line.startswith(f"{type(model).__name__}: not traced") for line in plan.details)
    return Outcome(str(source), "converted" if traced else "converted without trace", detail, seconds)


def failure(source: Source, error: Exception) -> Outcome:
    return Outcome(str(source), "failed", f"{type(error).__name__}: {str(error)[:300]}", 0.0)


def walk(model: nn.Module) -> Counter | None:
    """Sites counted without the package: layers by class, and functional calls with other weights than a layer's."""
    layers = {id(m): m for m in model.modules() if isinstance(m, LAYERS)}
    for arguments in assumed_inputs(model):
        calls = _Calls(model, layers)
        for training in (False, True):
            try:
                calls.run(training, arguments.args)
            except Exception:
                continue
        if calls.succeeded:
            break
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    packed = sum(len([n for n, _ in m.named_parameters(recurse=False) if n.endswith("proj_weight")]) for m in attention)
    if not calls.succeeded:
        return None if not packed else Counter(module=len(layers), call=packed)
    return +Counter(module=len(layers), call=len(calls.seen) + packed)


class _Calls(TorchFunctionMode):
    FUNCTIONS = (F.linear, torch.addmm, torch.Tensor.addmm, F.conv1d, F.conv2d, F.conv3d)

    def __init__(self, model: nn.Module, layers: dict[int, nn.Module]):
        super().__init__()
        self.model = model
        self.layers = layers
        self.seen: set[Any] = set()
        self.running: list[nn.Module] = []
        self.succeeded = False

    def run(self, training: bool, inputs: tuple[Any, ...]) -> None:
        mode = [(m, m.training) for m in self.model.modules()]
        handles = [
            h
            for m in self.model.modules()
            for h in (
                m.register_forward_pre_hook(lambda m, _: self.running.append(m), prepend=True),
                m.register_forward_hook(lambda *_: self.running.pop() and None),
            )
        ]
        state = {n: p.to("meta") for n, p in self.model.named_parameters()}
        self.own = {id(p): n for n, p in state.items()}
        self.of_layers = {id(state[n]) for n in self._layer_weights()}
        buffers = {n: b.to("meta").clone() for n, b in self.model.named_buffers()}
        self.fixed = {id(t): t for t in (*state.values(), *buffers.values())}  # held, for an id dies with its tensor
        self.running.clear()
        try:
            with torch.no_grad(), self:
                torch.func.functional_call(self.model.train(training), {**state, **buffers}, inputs)
            self.succeeded = True
        finally:
            for handle in handles:
                handle.remove()
            for module, was in mode:
                module.training = was

    def _layer_weights(self) -> list[str]:
        by_id = {id(p): n for n, p in self.model.named_parameters()}
        return [by_id[id(p)] for m in self.layers.values() for p in m.parameters(recurse=True) if id(p) in by_id]

    PRODUCTS = (
        torch.matmul,
        torch.Tensor.matmul,
        torch.mm,
        torch.Tensor.mm,
        torch.bmm,
        torch.Tensor.bmm,
        torch.baddbmm,
        torch.einsum,
    )

    SELECTIONS = ("__getitem__", "index_select", "expand")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        operands = tensors_of((args, kwargs))
        of_data = any(id(t) not in self.fixed for t in operands)
        for operand in operands if func in self.PRODUCTS and of_data else ():
            for tensor in (operand, getattr(operand, "_base", None)):
                if id(tensor) in self.own and operand.dim() > 1 and id(tensor) not in self.of_layers:
                    self.seen.add(self.own[id(tensor)])
        if func in self.FUNCTIONS and of_data:
            weight = args[2 if "addmm" in func.__name__ else 1] if len(args) > 1 else kwargs["weight"]
            weight = weight if id(weight) in self.own or weight._base is None else weight._base
            inside = self.running[-1]
            if id(inside) not in self.layers and id(weight) not in self.of_layers:
                self.seen.add(self.own.get(id(weight), id(inside)))
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result) or operands[:1]:  # an assignment returns nothing and writes into the first
            if not of_data:
                self.fixed[id(tensor)] = tensor
                selects = getattr(func, "__name__", "") in self.SELECTIONS and operands[0].dim() > 2
                if selects and id(operands[0]) in self.own:  # a matrix of a stack; rows of a table are features
                    self.own[id(tensor)] = self.own[id(operands[0])]
            else:
                for written in (tensor, tensor._base):
                    self.fixed.pop(id(written), None)
        return result


# ------------------------------------------------------------------------------------------------ run with real weights


def run_for_real(numbered: tuple[int, Source]) -> Outcome:
    number, source = numbered
    if any(kind in source.name for kind in ("rcnn", "retinanet", "fcos")):  # which enlarge images to 800 pixels
        regions = {"box_detections_per_img": 4, "rpn_post_nms_top_n_test": 50} if "rcnn" in source.name else {}
        source = replace(source, arguments={"min_size": 96, "max_size": 96, **regions})
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        inputs = real_inputs(source)
        converted = sphereify(build_model(source), operator=OPERATORS[number % 4], example_inputs=inputs)
        plan = converted.conversion_plan
        unexplained = [
            d.name for d in plan.verify(converted, inputs).kept if d.called is False and "called" not in d.reason
        ]
        converted.eval()
        outputs = tensors_of(converted(*inputs))
        sum(t.float().square().mean() for t in outputs if t.requires_grad).backward()
        infinite = [n for n, p in converted.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        converted.zero_grad(set_to_none=True)
        with tempfile.TemporaryDirectory() as folder:
            save(converted, folder)
            again = load(folder)
        same = all(map(torch.equal, outputs, tensors_of(again(*inputs))))
    except Exception as error:
        return failure(source, error)
    problems = [f"never called: {unexplained[:3]}"] * bool(unexplained)
    problems += [f"not finite: {infinite[:3]}"] * bool(infinite) + ["outputs differ after loading"] * (not same)
    seconds = time.perf_counter() - started
    return Outcome(str(source), "failed" if problems else "ran", "; ".join(problems) or plan.summary(), seconds)


def real_inputs(source: Source) -> tuple[Any, ...]:
    """Random inputs of the smallest size that a model takes; detection takes a list of images, optical flow a pair."""
    model = build(source).to("meta")
    name = type(model).__module__
    if "detection" in name:
        return ([torch.rand(3, 96, 96)],)
    if "optical_flow" in name:
        return (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    usual = [arguments.args for arguments in assumed_inputs(model)]
    images = [inputs for inputs in usual if inputs[0].dim() > 3]
    smaller = [tuple(t[..., :size, :size] for t in inputs) for size in (64, 128) for inputs in images]
    return tuple(torch.randn(t.shape) for t in next(inputs for inputs in [*smaller, *usual] if takes(model, inputs)))


def takes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            for training in (True, False):
                model.train(training)(*inputs)
    except Exception:
        return False
    return True


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------------ all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="convert every architecture, not one of each structure")
    parser.add_argument("--only", default="*", help="glob over names")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    named = [source for source in architectures() if fnmatch.fnmatchcase(str(source), options.only)]
    outcomes = []
    context = multiprocessing.get_context("spawn")
    # An executor notices a worker that the system has killed, where a multiprocessing.Pool waits for it for ever.
    with ProcessPoolExecutor(options.jobs, context, initializer=_start_worker) as pool:

        def run(what: str, task: Callable[[Any], Any], items: list[Any]) -> list[Any]:
            started, results = time.perf_counter(), []
            for future in as_completed([pool.submit(task, item) for item in items]):
                results.append(result := future.result())
                if isinstance(result, Outcome) and result.result in ("failed", "miscounted", "refused"):
                    print(f"{result.result}: {result.name}: {result.detail}", flush=True)
            print(f"{what}: {len(items)} architectures in {time.perf_counter() - started:.0f} s", flush=True)
            outcomes.extend(result for result in results if isinstance(result, Outcome))
            return results

        surveys = [result for result in run("built", survey, named) if isinstance(result, Survey)]
        surveys.sort(key=lambda one: named.index(one.source))
        chosen = named if options.all else smallest_of_each("structure", surveys, "modules")
        run("converted", convert, list(enumerate(chosen)))
        real = [one for one in surveys if not one.source.name.startswith("test_")]
        smallest = smallest_of_each("file", real, "parameters")
        large = {str(one.source) for one in real if one.parameters > LARGEST_RUN}
        run("run", run_for_real, list(enumerate(source for source in smallest if str(source) not in large)))
        print("too large to run:", *(str(source) for source in smallest if str(source) in large))
    for result, count in Counter(outcome.result for outcome in outcomes).most_common():
        print(f"{count:>5}  {result}")
    slowest = max((o for o in outcomes if o.result.startswith("converted")), key=lambda o: o.seconds, default=None)
    if slowest is not None:
        print(f"slowest plan: {slowest.name}, {slowest.seconds:.1f} s")
    bad = sum(outcome.result in ("failed", "miscounted") for outcome in outcomes)
    print(f"{len(outcomes) - bad} passed, {bad} failed")
    return 1 if bad else 0


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
