"""An examination of this machine: what the passes of the angular maps can use here, whether they are right, how fast.

Which passes there are, and what is compared, is in `nn.passes.self_check`.
"""

import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product

import torch

from sphereify.errors import first_line
from sphereify.nn.passes import compiled, cpu, reference, self_check, triton
from sphereify.nn.passes.protocol import Passes
from sphereify.nn.passes.self_check import Case, Deviation, Kind
from sphereify.nn.passes.switch import KernelFailure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMED_DTYPES = (torch.float32, torch.bfloat16)
TIMED = Case("linear", channels=64, filters=64, batch=8, size=(28, 28), beta=True, shift=True)
TIMED_TEXT = "a 3×3 convolution of 64 channels with β and γ, linear operator, 8 images of 28×28 pixels, channels last"
SECONDS_EACH, FEWEST, MOST = 0.1, 3, 50
"""A pass is timed for so many seconds, with at least and at most so many calls."""


@dataclass
class PassReport:
    """One pass of one maker on one device."""

    maker: str
    """"reference", "blocks" (ATen on the CPU), "compiled" (loops on the CPU) or "Triton"."""
    device: str
    name: str
    deviation: float = 0.0
    """The largest difference from the reference in float64 on the CPU, as a share of the largest value."""
    allowed: float = 1.0
    """The largest deviation that rounding explains."""
    where: str = ""
    """The dtype and layout for which the deviation comes closest to what is allowed, or exceeds it most."""
    agrees: bool = True
    microseconds: dict[str, float] = field(default_factory=dict)
    """The median time of a call, by dtype."""
    error: str = ""
    """The reason why a kernel does not run, whose name then stands in place of the pass."""


@dataclass
class Examination:
    """The findings of `examine`."""

    environment: dict[str, str]
    timed: str
    """The layer whose passes were timed."""
    passes: list[PassReport]

    @property
    def wrong(self) -> list[PassReport]:
        """The passes that do not agree with the reference, or do not run."""
        return [report for report in self.passes if not report.agrees]


def examine() -> Examination:
    """Compare the passes of each maker that is usable here with the reference, and time them; takes some seconds.

    The first time on a machine, kernels are compiled.
    """
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    passes = [report for device in devices for name, maker in makers(device).items()
              for report in _examine(name, maker, device)]  # fmt: skip
    return Examination(environment(), TIMED_TEXT, passes)


def makers(device: torch.device) -> dict[str, Passes]:
    """The makers of the passes that can serve on a device, the reference first."""
    usable: dict[str, Passes] = {"reference": reference}
    if device.type == "cpu":
        usable["blocks"] = cpu
        if compiled.serves():
            usable["compiled"] = compiled
    if triton.serves(device):
        usable["Triton"] = triton
    return usable


def environment() -> dict[str, str]:
    """The parts of the environment that the passes depend on, by name, as text."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    is_there = find_spec("triton") is not None
    if not is_there:
        kernels = "not used, Triton is not installed"
    elif not triton.serves(torch.device("cuda")):
        kernels = "switched off (SPHEREIFY_KERNELS)"
    elif triton.serves(torch.device("cpu")):
        kernels = "in Triton's interpreter (TRITON_INTERPRET)"
    else:
        kernels = "in use" if gpus else "not used without a GPU"
    return {
        "torch": torch.__version__,
        "Triton": _version("triton") if is_there else "not installed",
        "CPU": f"{torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none: torch sees no CUDA device, so the CPU alone is examined",
        "kernels": kernels,
        "compiled passes": compiled.state(),
        "C compiler": _compiler("CC", "gcc", "clang", "cc") or "none was found; Triton needs one",
        "C++ compiler": _compiler("CXX", "g++", "clang++", "c++") or "none was found; the compiled passes need one",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # installed under another name
        return "installed"


def _compiler(variable: str, *names: str) -> str | None:
    """The path of the compiler that an environment variable names, or of the first of these that is there."""
    named = os.environ.get(variable, "").split()  # with arguments
    return next(filter(None, map(shutil.which, named[:1] or names)), None)


# ---- One maker on one device


def _examine(name: str, maker: Passes, device: torch.device) -> Iterator[PassReport]:
    reports = {each: PassReport(name, str(device), each) for each in self_check.PASSES}
    try:
        for dtype, layout in product(_served(maker, DTYPES), self_check.LAYOUTS):
            kind = Kind(device, dtype, torch.float32, layout)
            with _exact_convolutions(device):
                for deviation in self_check.deviations(maker, kind):
                    _note(reports[deviation.name], deviation, kind)
        is_interpreted = maker is triton and device.type == "cpu"  # whose times say nothing
        for dtype in () if is_interpreted else _served(maker, TIMED_DTYPES):
            for each, seconds in _times(maker, Kind(device, dtype, torch.float32, "channels_last")):
                reports[each].microseconds[str(dtype).removeprefix("torch.")] = round(seconds * 1e6, 1)
    except KernelFailure as failure:
        reason = first_line(failure.__cause__ or failure)
        yield PassReport(name, str(device), f"kernel {failure}", agrees=False, error=reason)
    yield from (report for report in reports.values() if report.where)


def _served(maker: Passes, dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """The dtypes that a maker serves itself."""
    return [dtype for dtype in dtypes if maker is not compiled or dtype is torch.float32]


def _exact_convolutions(device: torch.device) -> AbstractContextManager:
    """A context without TF32, in which cuDNN would compute the sums over windows of the reference on a GPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext()


def _note(report: PassReport, deviation: Deviation, kind: Kind) -> None:
    """Keep the worst of the deviations in a report."""
    if not report.where or deviation.deviation / deviation.allowed > report.deviation / report.allowed:
        report.deviation, report.allowed = deviation.deviation, deviation.allowed
        report.where = f"{str(kind.dtype).removeprefix('torch.')}, {kind.layout.replace('_', ' ')}"
        report.agrees = deviation.agrees


def _times(maker: Passes, kind: Kind) -> Iterator[tuple[str, float]]:
    """The median seconds of a call of each pass."""
    operands = self_check.make_operands(TIMED, kind).each(lambda t: t.to(kind.device))
    for name, run in self_check.PASSES.items():
        times: list[float] = []
        with torch.no_grad():
            run(maker, operands.each(torch.clone))  # compiles, and finds the memory
            while len(times) < FEWEST or (sum(times) < SECONDS_EACH and len(times) < MOST):
                fresh = operands.each(torch.clone)  # a pass may overwrite its arguments
                _wait(kind.device)
                began = time.perf_counter()
                run(maker, fresh)
                _wait(kind.device)
                times.append(time.perf_counter() - began)
        yield name, statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
