"""Every architecture of timm and torchvision through the conversion: `python -m tests.zoo [--only GLOB] [--jobs N]`.

With `--real`, the smallest variant of each of their model files instead, with real weights: a forward and a backward
pass, `verify` without a site that is never called for no known reason, and saved and loaded with identical outputs.

Without it:
Each is built on the meta device, planned and converted, operators and skip_shortcuts in turn. The number of sites must
be that of a walk of its own: modules by their classes, plus functional calls counted in a run. Prints a table of
outcomes and every refusal with its reason; the exit code is 1 if any architecture failed or was miscounted.
"""

import argparse
import copy
import fnmatch
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sphereify import apply_plan, load, plan_conversion, save, sphereify
from sphereify.choices import OPERATORS
from sphereify.convert.model_inputs import assumed_inputs
from sphereify.errors import SphereifyError
from sphereify.sources import Source, build_model

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Outcome:
    name: str
    what: str
    """converted, converted without trace, refused, failed, or miscounted"""
    detail: str
    seconds: float


def architectures() -> list[Source]:
    import timm
    import torchvision

    names = [Source("timm", name) for name in timm.list_models()]
    return names + [Source("torchvision", name) for name in torchvision.models.list_models()]


def convert(numbered: tuple[int, Source]) -> Outcome:
    number, source = numbered
    warnings.simplefilter("ignore")
    started = 0.0
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
        return Outcome(str(source), "failed", f"{type(error).__name__}: {str(error)[:300]}", 0.0)
    # The walk does not know which matrices are computed from parameters.
    told = [d for d in plan.decisions if d.call is None or d.call.kind != "product" or d.call.parameter is not None]
    found = Counter("call" if not d.type else "module" for d in told)
    if expected is not None and found != expected:
        return Outcome(str(source), "miscounted", f"plan {dict(found)}, walk {dict(expected)}", seconds)
    never = sum(d.called is False for d in plan.decisions)
    unknown = sum(d.called is None for d in plan.decisions)
    detail = f"{len(plan.converted)} converted, {len(plan.kept)} kept, {never} never called, {unknown} not known"
    traced = not any("not traced" in note and note.startswith(type(model).__name__) for note in plan.notes)
    return Outcome(str(source), "converted" if traced else "converted without trace", detail, seconds)


SMALL = (
    "atto",
    "femto",
    "pico",
    "xxs",
    "nano",
    "zepto",
    "micro",
    "tiny",
    "mini",
    "_t0",
    "_xs",
    "_b0",
    "18",
    "10",
    "small",
)
"""What names of small variants contain, smallest first."""


def smallest_of_each_file(sources: list[Source]) -> list[Source]:
    """For each module of timm and torchvision that defines models, the smallest of three that are named like it."""
    import timm
    import torchvision

    files: dict[str, list[Source]] = {}
    for source in sources:
        find = timm.model_entrypoint if source.library == "timm" else torchvision.models.get_model_builder
        if not source.name.startswith("test_"):
            files.setdefault(find(source.name).__module__, []).append(source)
    chosen = []
    for variants in files.values():
        ranked = sorted(variants, key=lambda s: next((i for i, word in enumerate(SMALL) if word in s.name), len(SMALL)))
        chosen.append(min(ranked[:3], key=lambda s: sum(p.numel() for p in build(s).parameters())))
    return chosen


def run_for_real(numbered: tuple[int, Source]) -> Outcome:
    number, source = numbered
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        model = build_model(source)
        inputs = real_inputs(model, source)
        converted = sphereify(model, operator=OPERATORS[number % 4], example_inputs=inputs)
        plan = converted.conversion_plan
        unexplained = [d.name for d in plan.verify(converted, inputs).kept
                       if d.called is False and "never called" not in d.reason]  # fmt: skip
        converted.eval()
        loss = sum(t.float().square().mean() for t in tensors_of(converted(*inputs)) if t.requires_grad)
        loss.backward()
        infinite = [n for n, p in converted.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        with tempfile.TemporaryDirectory() as folder:
            save(converted, folder)
            again = load(folder)
        with torch.no_grad():
            same = all(map(torch.equal, tensors_of(converted(*inputs)), tensors_of(again(*inputs))))
    except Exception as error:
        return Outcome(str(source), "failed", f"{type(error).__name__}: {str(error)[:300]}", 0.0)
    problems = [f"never called: {unexplained[:3]}"] * bool(unexplained) + [f"not finite: {infinite[:3]}"] * bool(
        infinite
    )
    problems += ["outputs differ after loading"] * (not same)
    seconds = time.perf_counter() - started
    return Outcome(str(source), "failed" if problems else "ran", "; ".join(problems) or plan.summary(), seconds)


def real_inputs(model: nn.Module, source: Source) -> tuple[Any, ...]:
    """Two inputs of the smallest usual size; detection takes a list of images, optical flow a pair."""
    name = type(model).__module__
    if "detection" in name:
        return ([torch.rand(3, 96, 96)],)
    if "optical_flow" in name:
        return (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config:
        inputs = next(inputs for inputs in assumed_inputs(model) if _takes(model, inputs))
        return tuple(torch.randn(t.shape) for t in inputs)
    least = None if config.get("fixed_input_size") else config.get("min_input_size")
    return (torch.randn(2, *(least or config["input_size"])),)


def _takes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta").eval()(*inputs)
    except Exception:
        return False
    return True


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def build(source: Source) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_model(source)
    except Exception:  # some constructors compute with values
        return build_model(source)


def walk(model: nn.Module) -> Counter | None:
    """Sites counted without the package: layers by class, and functional calls with other weights than a layer's."""
    layers = {id(m): m for m in model.modules() if isinstance(m, LAYERS)}
    calls = _Calls(model, layers)
    for training in (False, True):
        try:
            calls.run(training)
        except Exception:
            continue
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

    def run(self, training: bool) -> None:
        mode = [(m, m.training) for m in self.model.modules()]
        handles = [h for m in self.model.modules() for h in (
            m.register_forward_pre_hook(lambda m, _: self.running.append(m), prepend=True),
            m.register_forward_hook(lambda *_: self.running.pop() and None),
        )]  # fmt: skip
        state = {n: p.to("meta") for n, p in self.model.named_parameters()}
        self.own = {id(p): n for n, p in state.items()}
        self.of_layers = {id(state[n]) for n in self._layer_weights()}
        buffers = {n: b.to("meta").clone() for n, b in self.model.named_buffers()}
        self.fixed = {id(t): t for t in (*state.values(), *buffers.values())}  # held, for an id dies with its tensor
        inputs = assumed_inputs(self.model)[-1]
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

    PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm,
                torch.baddbmm, torch.einsum)  # fmt: skip

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
            else:
                for written in (tensor, tensor._base):
                    self.fixed.pop(id(written), None)
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="glob over names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--real", action="store_true", help="run the smallest variant of each model file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    named = [s for s in architectures() if fnmatch.fnmatchcase(str(s), options.only)]
    chosen = list(enumerate(smallest_of_each_file(named) if options.real else named))
    started = time.perf_counter()
    outcomes = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=100) as pool:
        for outcome in pool.imap_unordered(run_for_real if options.real else convert, chosen, chunksize=4):
            outcomes.append(outcome)
            if outcome.what in ("failed", "miscounted", "refused"):
                print(f"{outcome.what}: {outcome.name}: {outcome.detail}", flush=True)
    slowest = max(outcomes, key=lambda o: o.seconds)
    for what, count in Counter(o.what for o in outcomes).most_common():
        print(f"{count:>5}  {what}")
    print(f"{len(outcomes)} architectures in {time.perf_counter() - started:.0f} s; "
          f"slowest plan: {slowest.name}, {slowest.seconds:.1f} s")  # fmt: skip
    bad = sum(o.what in ("failed", "miscounted") for o in outcomes)
    print(f"{len(outcomes) - bad} passed, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
