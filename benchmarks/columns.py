"""The table of a converted network's cost: a row for each network, a column for each way of running it.

A cell has the ratio to the original of each variant, a median with its quartiles, and what the hardware allows
(`traffic`). A job measures the cells of columns that share an original; one that fails leaves the reason in its cells.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import nn

from benchmarks import exported
from benchmarks.bench import Bench, create, has_batch_norm, ratios, saved_bytes, with_norms_folded
from benchmarks.record import Cell, Record
from benchmarks.traffic import Traffic, bandwidth, traffic
from sphereify import fold, sphereify
from sphereify.errors import first_line

SPHERE_NORM = "SphereNorm"


class Network:
    """A network and how it is measured; it is made when the first number is."""

    def __init__(self, bench: Bench, name: str, bandwidth: float):
        self.bench, self.name, self.bandwidth = bench, name, bandwidth
        self.element = torch.tensor([], dtype=bench.dtype).element_size()
        self._traffic: dict[str, Traffic] = {}

    @cached_property
    def original(self) -> nn.Module:
        return create(self.name, self.bench.options.size)

    @property
    def has_batch_norm(self) -> bool:
        return has_batch_norm(self.original)

    def variant(self, name: str) -> nn.Module:
        """The network with an operator, or with SphereNorm instead of BatchNorm."""
        if name == SPHERE_NORM:
            return sphereify(self.original, operator="cosine", norm="replace")
        return sphereify(self.original, operator=name)

    def allowed(self, name: str, part: str, seconds: float) -> float:
        """What the hardware allows a variant beside the original, which takes `seconds` for an image."""
        counts = [self._traffic_of("original"), self._traffic_of(name if name == SPHERE_NORM else "cosine")]
        plain, angular = (getattr(count, part) for count in counts)
        return 1 + (angular - plain) * self.element / self.bandwidth / seconds

    def _traffic_of(self, name: str) -> Traffic:
        if name not in self._traffic:
            size = self.bench.options.size
            network = copy.deepcopy(self.original) if name == "original" else self.variant(name)
            self._traffic[name] = traffic(network.eval(), torch.zeros(1, 3, size, size))
        return self._traffic[name]

    def cell(
        self, seconds: dict[str, list[float]], names: list[str], part: str = "training", base: str = "original",
        batch: int | None = None,
    ) -> Cell:  # fmt: skip
        """The cell of these variants.

        Args:
            seconds: of `base` and of each variant, in each round.
            names: of the variants.
            part: "training" or "forward".
            base: what is 1.
            batch: images; default: the option.
        """
        time = statistics.median(seconds[base])
        found = ratios(seconds, base)
        return {
            "original_ms": time * 1e3,
            "ratios": {name: {"median": found[name][0], "quartiles": list(found[name][1:])} for name in names},
            "allowed": self.allowed(names[0], part, time / (batch or self.bench.options.batch)),
        }

    # ---- The jobs: (column, cell), in their order

    def training(self) -> Iterator[tuple[str, Cell]]:
        yield from self._steps("training", list(self.bench.options.operators), SPHERE_NORM, compiled=False)

    def compiled(self) -> Iterator[tuple[str, Cell]]:
        yield from self._steps("training, compiled", ["cosine"], f"{SPHERE_NORM}, compiled", compiled=True)

    def _steps(self, column: str, names: list[str], norm: str, compiled: bool) -> Iterator[tuple[str, Cell]]:
        torch._dynamo.reset()  # counts compilations by the code of a class, which networks have in common
        all_names = [*names, SPHERE_NORM] if self.has_batch_norm else names
        made = {"original": copy.deepcopy(self.original), **{name: self.variant(name) for name in all_names}}
        steps = {key: self.bench.step(network, compiled) for key, network in made.items()}
        seconds = self.bench.race(steps, self.bench.options.rounds)
        yield column, self.cell(seconds, names)
        yield norm, self.cell(seconds, [SPHERE_NORM]) if self.has_batch_norm else {"note": "no BatchNorm"}

    def forward(self) -> Iterator[tuple[str, Cell]]:
        names = list(self.bench.options.operators)
        made = {"original": copy.deepcopy(self.original), **{name: self.variant(name) for name in names}}
        yield "forward", self.cell(self._inference(made), names, "forward")

    def folded(self) -> Iterator[tuple[str, Cell]]:
        names = list(self.bench.options.operators)
        made = {"original": with_norms_folded(self.original),
                **{name: fold(self.variant(name).eval()) for name in names}}  # fmt: skip
        yield "folded", self.cell(self._inference(made), names, "forward")

    def _inference(self, made: dict[str, nn.Module]) -> dict[str, list[float]]:
        runs = {key: self.bench.inference(network, False) for key, network in made.items()}
        return self.bench.race(runs, self.bench.options.rounds)

    def onnx(self) -> Iterator[tuple[str, Cell]]:
        for batch, seconds in exported.races(self.name, self.bench.options):
            yield f"ONNX, batch {batch}", self.cell(seconds, list(self.bench.options.operators), "forward", batch=batch)

    def memory(self) -> Iterator[tuple[str, Cell]]:
        """Bytes that are saved for the backward, and on a GPU at the peak of a training step."""
        names = [*self.bench.options.operators, *([SPHERE_NORM] if self.has_batch_norm else [])]
        saved, peak = {}, {}
        for name in ("original", *names):
            network = copy.deepcopy(self.original) if name == "original" else self.variant(name)
            saved[name] = saved_bytes(self.bench, network)
            if self.bench.device.type == "cuda":
                network.zero_grad()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step = self.bench.step(network, False)
                step()
                step()
                peak[name] = torch.cuda.max_memory_allocated() - before
                del step
            del network
        cell: Cell = {"original_MiB": saved["original"] / 2**20,
                      "ratios": {name: {"median": saved[name] / saved["original"]} for name in names}}  # fmt: skip
        if peak:
            cell["peak_MiB"] = {name: value / 2**20 for name, value in peak.items()}
        yield "saved for the backward", cell


JOBS: dict[str, tuple[Callable[[Network], Iterator[tuple[str, Cell]]], tuple[str, ...]]] = {
    "training": (Network.training, ("training", SPHERE_NORM)),
    "compiled": (Network.compiled, ("training, compiled", f"{SPHERE_NORM}, compiled")),
    "forward": (Network.forward, ("forward",)),
    "folded": (Network.folded, ("folded",)),
    "onnx": (Network.onnx, tuple(f"ONNX, batch {batch}" for batch in exported.BATCHES)),
    "memory": (Network.memory, ("saved for the backward",)),
}
"""Each job, and the columns that it fills."""


def measure(bench: Bench, jobs: list[str], record: Record) -> None:
    """Fill the record with what it lacks, and print the table, a row for each network when it is finished."""
    columns = [column for job in jobs for column in JOBS[job][1]]
    missing = [name for name in bench.options.models if not all(record.has(name, JOBS[job][1]) for job in jobs)]
    speed = bandwidth(bench) if missing else 0.0
    if missing:
        record.data["copied_GB_per_s"] = speed / 1e9
    print(
        f"\nRatios to the original: {' / '.join(bench.options.operators)}; compiled: cosine, to the original compiled; "
        f"folded: to the\noriginal with its BatchNorm folded. In brackets what the hardware allows.\n\n"
        f"| network | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}",
        flush=True,
    )
    for name in bench.options.models:
        network = Network(bench, name, speed)
        for job in jobs:
            if not record.has(name, JOBS[job][1]):
                print(f"{name}: {job} …", file=sys.stderr, flush=True)
                _run(job, network, record)
        cells = record.cells(name)
        print(f"| {name} | {' | '.join(as_text(cells[column]) for column in columns)} |", flush=True)


def _run(job: str, network: Network, record: Record) -> None:
    measured, columns = JOBS[job]
    try:
        for column, cell in measured(network):
            record.put(network.name, column, cell)
    except Exception as error:
        for column in columns:
            if not record.has(network.name, (column,)):
                record.put(network.name, column, {"error": first_line(error)})
    if network.bench.device.type == "cuda":
        torch.cuda.empty_cache()


def as_text(cell: Cell) -> str:
    """The medians of a cell, with what is allowed in brackets."""
    if "error" in cell:
        return "failed: " + cell["error"].replace("|", "/")[:60]
    if "note" in cell:
        return ""
    text = " / ".join(f"{ratio['median']:.2f}" for ratio in cell["ratios"].values())
    return text + (f" ({cell['allowed']:.2f})" if "allowed" in cell else "")
