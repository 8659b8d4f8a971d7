"""Networks of libraries that the package does not know: `python -m tests.strangers [--only GLOB] [--jobs N]`.

Each network of `tests.architectures` whose library is installed is built from a small configuration and goes the whole
way. What is compared:

- plan: each parameter that data is multiplied with, by a count at the level of aten, is accounted for, converted or
  kept; what is said to be called or never called is so; and the plan without inputs is the same, or says that it
  was made without a run or without some of the arguments;
- scale: with every second filter of each converted layer times 3, outputs in evaluation stay what they are;
- gradients: each converted filter that the original trains gets a finite gradient, and `labels=` a finite loss;
- saved and loaded again, and folded, the outputs are the same; the model that was passed in is unchanged.

An outcome is right; friction, where a step was refused; wrong, where a
comparison failed; or crashed, where an error was raised that is not the package's own. The exit code is 1 if a network
was wrong or crashed.
"""

import argparse
import copy
import fnmatch
import importlib.metadata
import io
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sphereify import apply_plan, fold, load, plan_conversion, save
from sphereify.convert.plan import Decision
from sphereify.errors import SphereifyError
from tests.architectures import LIBRARIES, described, is_installed
from tests.architectures.architecture import Architecture
from tests.operands import products_of

RESULTS = ("right", "friction", "wrong", "crashed")
LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
EXACT, ROUNDED = 1e-6, 2e-3
"""Differences, relative to the largest output, that rounding explains in float64 and in fp32."""


@dataclass
class Outcome:
    library: str
    name: str
    wrong: list[str] = field(default_factory=list)
    friction: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    crashed: str = ""
    summary: str = ""
    seconds: float = 0.0

    @property
    def result(self) -> str:
        return "crashed" if self.crashed else "wrong" if self.wrong else "friction" if self.friction else "right"

    def __str__(self) -> str:
        problems = [*([self.crashed] if self.crashed else []), *self.wrong, *self.friction]
        said = "; ".join([*(problems or [self.summary]), *self.remarks])
        return f"{self.result:<8}  {self.library}/{self.name}: {said}  [{self.seconds:.1f} s]"


def names() -> list[tuple[str, str]]:
    """Each network as a library and a name, of the libraries that are installed."""
    return [
        (library, name) for library in LIBRARIES if is_installed(library) for name in described(library).ARCHITECTURES
    ]


def convert(library: str, name: str) -> Outcome:
    """One network, the whole way."""
    outcome, started = Outcome(library, name), time.perf_counter()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _Way(described(library).ARCHITECTURES[name], outcome).go()
    except Exception as error:
        outcome.crashed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    outcome.seconds = time.perf_counter() - started
    return outcome


class _Way:
    """The steps with one network; each appends to the outcome what it finds."""

    def __init__(self, architecture: Architecture, outcome: Outcome):
        self.architecture = architecture
        self.outcome = outcome
        torch.manual_seed(0)
        self.model = self.build()
        self.inputs = architecture.inputs()

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        return self.architecture.build()

    def go(self) -> None:
        expected = self.outputs(self.model)
        with self.refusals("plan"):
            self.plan = plan_conversion(self.model, example_inputs=self.inputs)
        if self.outcome.friction:
            return
        self.outcome.summary = self.plan.summary()
        self.compare_sites()
        self.compare_without_inputs()
        self.converted = apply_plan(self.model, self.plan)
        if difference(self.outputs(self.model), expected) > 0:
            self.outcome.wrong.append("the model that was passed in has changed")
        self.check_scale()
        self.check_gradients()
        if self.architecture.labels is not None:
            self.check_labels(self.architecture.labels())
        with self.refusals("save and load"):
            self.check_artifact()
        with self.refusals("fold"):
            self.check_folded()

    @contextmanager
    def refusals(self, step: str) -> Iterator[None]:
        try:
            yield
        except SphereifyError as error:
            self.outcome.friction.append(f"{step}: {error}")

    # ------------------------------------------------------------------------------------------------- what is compared

    def compare_sites(self) -> None:
        first = {id(p): name for name, p in self.model.named_parameters()}
        own: dict[str, list[Decision]] = {}
        for decision in self.plan.decisions:
            for parameter in self.parameters_of(decision, self.model):
                own.setdefault(first[id(parameter)], []).append(decision)
        computed = [d for d in self.plan.decisions if d.call is not None and d.call.parameter is None]
        inputs = self.prepared(self.model)  # before the count begins: what is made under it is a constant
        products, multiplied = products_of(copy.deepcopy(self.model), lambda model: self.run(model, inputs))
        for behind in sorted(products, key=sorted):
            decisions = [decision for name in behind for decision in own.get(name, [])]
            inside = [d for d in computed if any(name.startswith(d.module) for name in behind)]
            if not decisions and not inside:
                self.outcome.wrong.append(f"not in the plan: {', '.join(sorted(behind))}")
            elif len(behind) == 1 and not inside and all(_said_not_to_run(d) for d in decisions):
                self.outcome.wrong.append(f"runs, and is said not to: {decisions[0].name} ({decisions[0].reason})")
        for name, decisions in own.items():
            for decision in decisions:
                runs = decision.called and decision.call is None and decision.kind in LAYERS
                if runs and name.endswith("weight") and name not in multiplied:
                    self.outcome.wrong.append(f"never multiplied, and said to be called: {decision.name}")

    def compare_without_inputs(self) -> None:
        try:
            plan = plan_conversion(self.model)
        except SphereifyError as error:
            self.outcome.friction.append(f"without inputs: {error}")
            return
        given = {d.name: d for d in self.plan.decisions}
        assumed = {d.name: d for d in plan.decisions}
        differ = [
            name
            for name in given.keys() | assumed.keys()
            if name not in given or name not in assumed or _decided(given[name]) != _decided(assumed[name])
        ]
        if not differ:
            return
        name = min(differ)
        sides = [f"{d.action} ({d.reason})" if (d := side.get(name)) else "nothing" for side in (given, assumed)]
        if why := next((note for note in plan.notes if re.search(": (not run|run without)", note)), ""):
            self.outcome.remarks.append(f"without inputs {len(differ)} decisions differ, and the plan says: {why}")
        else:
            said = f"without inputs {len(differ)} decisions differ: {name}: {sides[0]}, without {sides[1]}"
            self.outcome.wrong.append(said)

    def check_scale(self) -> None:
        # With the default eps, which is added to the squared length of a filter, lengths matter a little.
        exact = replace(self.plan, decisions=[replace(d, eps=d.eps and 1e-12) for d in self.plan.decisions])
        self.expect_same("with filters times 3", apply_plan(self.model, exact), self.with_filters_times_3)

    @torch.no_grad()
    def with_filters_times_3(self, model: nn.Module) -> nn.Module:
        seen: set[int] = set()
        for decision in self.plan.converted:
            for parameter, dim in _filters(decision, model):
                if id(parameter) not in seen and self.is_free(parameter, model):
                    seen.add(id(parameter))
                    shape = [-1 if d == dim else 1 for d in range(parameter.dim())]
                    parameter.mul_((1 + 2 * (torch.arange(parameter.shape[dim]) % 2)).view(shape))
        return model

    def check_gradients(self) -> None:
        before, after = self.gradients(self.model), self.gradients(self.converted)
        if before is None:
            return
        if after is None:
            self.outcome.wrong.append("no backward pass, where the original has one")
            return
        for decision in self.plan.converted:
            for parameter, _ in _filters(decision, self.converted):
                name = next(name for name, p in self.converted.named_parameters() if p is parameter)
                original, gradient = before.get(name), after.get(name)
                if original is not None and not original.isfinite().all():
                    continue
                if gradient is not None and not gradient.isfinite().all():
                    self.outcome.wrong.append(f"gradient not finite: {name}")
                elif original is not None and original.abs().max() > 0 and (gradient is None or not gradient.any()):
                    self.outcome.wrong.append(f"no gradient, where the original has one: {name}")

    def check_labels(self, labels: Any) -> None:
        keywords = {**self.inputs, **labels}
        for model in (self.model, self.converted):  # what the original refuses is no fault of the conversion
            torch.manual_seed(0)
            loss = copy.deepcopy(model).train()(**keywords).loss
            loss.backward()
        if not loss.isfinite():
            self.outcome.wrong.append("the loss from labels is not finite")

    def check_artifact(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(self.converted, folder)
            again = load(folder, factory=self.build)
        if difference(self.outputs(self.converted), self.outputs(again)) > 0:
            self.outcome.wrong.append("other outputs after saving and loading")

    def check_folded(self) -> None:
        fold(self.converted, self.inputs)
        self.expect_same("folded", self.converted, fold)

    # -------------------------------------------------------------------------------------------------- how it is run

    def prepared(self, model: nn.Module) -> Any:
        """The inputs, copied and in the model's precision."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        change = lambda t: t.to(dtype) if t.dtype == torch.float32 else t  # noqa: E731
        return torch.utils._pytree.tree_map_only(Tensor, change, copy.deepcopy(self.inputs))

    def run(self, model: nn.Module, inputs: Any = None) -> Any:
        torch.manual_seed(0)
        inputs = self.prepared(model) if inputs is None else inputs
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """The outputs in evaluation, of a copy, so that nothing that a pass leaves behind stays."""
        with torch.no_grad():
            return list(tensors_in(self.run(copy.deepcopy(model).eval())))

    def expect_same(self, what: str, model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
        """Compare a model with a changed one, in float64, or in fp32 where its forward fixes a dtype."""
        try:
            before, tolerance = copy.deepcopy(model).double(), EXACT
            expected = self.outputs(before)
        except Exception:
            before, tolerance = model, ROUNDED
            expected = self.outputs(before)
        if (differ := difference(expected, self.outputs(change(copy.deepcopy(before))))) > tolerance:
            self.outcome.wrong.append(f"{what} outputs differ by {differ:.1e}")

    def gradients(self, model: nn.Module) -> dict[str, Tensor | None] | None:
        """The gradients of a random projection of the outputs, in training if the model returns outputs then."""
        for training in (True, False):
            network = copy.deepcopy(model).train(training)
            try:
                outputs = [t for t in tensors_in(self.run(network)) if t.requires_grad and t.is_floating_point()]
                generator = torch.Generator().manual_seed(0)
                sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()  # type: ignore[union-attr]
            except Exception:
                continue
            return {name: p.grad for name, p in network.named_parameters()}
        return None

    def parameters_of(self, decision: Decision, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that a decision is about."""
        if decision.call is not None and decision.call.parameter is not None:
            return [model.get_parameter(decision.call.parameter)]
        if decision.call is not None:
            return []
        return list(model.get_submodule(decision.name).parameters())

    def is_free(self, parameter: nn.Parameter, model: nn.Module) -> bool:
        """True if nothing but converted layers uses the parameter."""
        all_names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter}
        layers = [name for d in self.plan.converted for name in (d.name, *d.aliases)]
        return len(all_names) == 1 or all(name.rpartition(".")[0] in layers for name in all_names)


def _filters(decision: Decision, model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters whose lengths must not matter, each with the dimension that counts the filters."""
    if decision.call is not None:
        name = decision.call.parameter
        return [(model.get_parameter(name), 1 if decision.call.transposed else 0)] if name else []
    own = dict(model.get_submodule(decision.name).named_parameters())
    named = ("weight", "weight_g", "parametrizations.weight.original0", "parametrizations.weight.original")
    found = next((own[name] for name in named if name in own), None)
    return [] if found is None or found.dim() < 2 or found.shape[0] < 2 else [(found, 0)]


def _decided(decision: Decision) -> tuple[Any, ...]:
    return decision.action, decision.head, decision.rescale, decision.norm


def _said_not_to_run(decision: Decision) -> bool:
    return decision.called is False and "its weight is" not in decision.reason


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest output; what is not finite must agree."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        if not a.is_floating_point():
            largest = max(largest, 0.0 if torch.equal(a, b) else float("inf"))
        elif not torch.equal(a, b):
            same = (a == b) | (a.isnan() & b.isnan())
            scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 1.0
            gap = (a - b).abs().masked_fill(same, 0).nan_to_num(float("inf"), float("inf"))
            largest = max(largest, float(gap.max()) / max(scale, 1e-12))
    return largest


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in an output, in whatever containers and data classes."""
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from tensors_in([getattr(leaf, one.name) for one in fields(leaf)])
        elif isinstance(leaf, dict):
            yield from tensors_in(list(leaf.values()))


# ---------------------------------------------------------------------------------------------------------- all of them


def run_all(chosen: list[tuple[str, str]], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """The outcomes of all networks; one whose process was killed is found by a process of its own."""
    outcomes, left = _run(chosen, jobs, report)
    for one in left:
        found, killed = _run([one], 1, report)
        if killed:
            found = [Outcome(*one, crashed="its process was killed")]
            report(found[0])
        outcomes += found
    return outcomes


def _run(
    chosen: list[tuple[str, str]], jobs: int, report: Callable[[Outcome], None]
) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """The outcomes of some networks, and those that were left when a process ended."""
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        futures: dict[Future[Outcome], tuple[str, str]] = {}
        try:
            futures |= {pool.submit(convert, *one): one for one in chosen}
            for future in as_completed(futures):
                outcomes.append(future.result())
                report(outcomes[-1])
        except BrokenProcessPool:
            pass
    done = {(outcome.library, outcome.name) for outcome in outcomes}
    return outcomes, [one for one in chosen if one not in done]


def table(outcomes: list[Outcome]) -> str:
    """The numbers of outcomes by library, as Markdown."""
    lines = [f"| library | {' | '.join(RESULTS)} |", f"|---|{'---|' * len(RESULTS)}"]
    counts = {library: Counter(o.result for o in outcomes if o.library == library) for library in LIBRARIES}
    for library, count in counts.items():
        if count:
            lines.append(f"| {_with_version(library)} | {' | '.join(str(count[result]) for result in RESULTS)} |")
    total = Counter(o.result for o in outcomes)
    return "\n".join([*lines, f"| all {len(outcomes)} | {' | '.join(str(total[result]) for result in RESULTS)} |"])


def _with_version(library: str) -> str:
    if library == "by_hand":
        return "by hand"
    distributions = importlib.metadata.packages_distributions().get(library, [library])
    return f"{distributions[0]} {importlib.metadata.version(distributions[0]).partition('+')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob over LIBRARY/NAME")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started = time.perf_counter()
    chosen = [one for one in names() if fnmatch.fnmatchcase("/".join(one), options.only)]
    outcomes = run_all(chosen, options.jobs, lambda outcome: print(outcome, flush=True))
    for library in LIBRARIES:
        if not is_installed(library):
            print(f"{library}: not installed (pip install '.[strangers]')")
    print(f"\n{table(outcomes)}\n\n{len(outcomes)} networks in {time.perf_counter() - started:.0f} s")
    return 1 if any(outcome.result in ("wrong", "crashed") for outcome in outcomes) else 0


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
