"""Everything that a GPU has to show, in one command and one file: the kernels are right, then speed and memory.

    python -m benchmarks.gpu --output gpu.json            # at most ten minutes
    python -m benchmarks.gpu --output gpu.json --quick    # the kernels alone, and two networks in bfloat16

Each step is a process with a time limit of its own, because a fault in a kernel makes a process unfit for the next. Its
result, or how it failed, is in the file when the next begins. What has failed, or found no time, is made up for by
another call with the same file. `--device cpu` tries the script itself, in Triton's interpreter:

    python -m benchmarks.gpu --output try.json --device cpu --models test_resnet --batch 2 --size 32 --rounds 2
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.columns import JOBS, as_text
from sphereify.files import write_text

ROOT = Path(__file__).parents[1]
MODELS = ("resnet50", "convnext_tiny", "vit_small_patch16_224", "mobilenetv3_large_100")
KERNELS = "tests/nn/passes/kernels_against_reference.py"
MODES = {"eager": ("training", "forward", "folded", "memory"), "compiled": ("compiled",)}
"""The columns of `speed` that are measured in each mode."""


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]
    seconds: float
    """At most."""
    gives: str = "text"
    """"text", "json" on stdout, or "file" for JSON in the file that takes the place of FILE in the command."""


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """The steps, the most important first."""
    python = sys.executable
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        yield Step("nvidia-smi", ("nvidia-smi",), 20)
    yield Step("doctor", (python, "-m", "sphereify", "doctor", "--json"), 120, "json")
    selection = ("-k", "grouped_and_strided") if not on_gpu else ("-k", "not any_") if options.quick else ()
    which = "kernels, some tests" if selection else "kernels"
    yield Step(which, (python, "-m", "pytest", "-p", "no:cacheprovider", KERNELS, *selection), 150)
    yield Step("self-check", (python, "-c", SELF_CHECK, options.device), 120, "json")
    models = options.models[:1] + options.models[2:3] if options.quick else options.models
    dtypes = ["bfloat16"] if options.quick else ["bfloat16", "float16"]
    for mode, columns in MODES.items():
        for dtype in dtypes:
            for model in models:
                command = (
                    python, "-m", "benchmarks.speed", "--device", options.device, "--dtype", dtype, "--models", model,
                    "--batch", str(options.batch), "--size", str(options.size), "--rounds", str(options.rounds),
                    "--columns", *columns, "--json", "FILE",
                )  # fmt: skip
                yield Step(f"{mode}, {dtype}, {model}", command, 120 if mode == "eager" else 240, "file")


SELF_CHECK = """
import json, sys, time
import torch
from sphereify.nn.passes import self_check, triton
seconds = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for layout in self_check.LAYOUTS:
        kind = self_check.Kind(torch.device(sys.argv[1]), dtype, torch.float32, layout)
        for when in ("first", "again"):
            began = time.perf_counter()
            self_check.check(triton, kind)
            seconds[f"{kind}, {when}"] = round(time.perf_counter() - began, 3)
print(json.dumps(seconds))
"""
"""How long the check before the first use takes, with the compilation and without it."""


def run(step: Step, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a step for at most so many seconds: its exit code (None where time ran out), what it printed and gave."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    is_interpreted = not options.device.startswith("cuda") and step.name in ("kernels, some tests", "self-check")
    environment["TRITON_INTERPRET"] = str(int(is_interpreted))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [str(file) if word == "FILE" else word for word in step.command]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # so that a compiler's processes end with it
        )  # fmt: skip
        code: int | None = None
        try:
            out, err = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        took = time.perf_counter() - began
        found: dict[str, Any] = {"exit_code": code, "seconds": round(took, 1), "allowed_seconds": round(seconds, 1)}
        text = file.read_text() if step.gives == "file" and file.exists() else out if step.gives == "json" else ""
        try:
            found["result"] = json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            found["result"] = None
        if step.gives != "json" or found["result"] is None:
            found["output"] = out[-4000:]
        found["errors"] = err[-4000:]
        return found


def networks_of(found: dict[str, Any]) -> dict[str, Any]:
    """The cells of a step by network and column."""
    return (found.get("result") or {}).get("networks", {})


def failures(found: dict[str, Any]) -> list[str]:
    """The cells of a step that failed, by network and column."""
    networks = (found.get("result") or {}).get("networks", {})
    return [
        f"{name}: {column}" for name, cells in networks.items() for column, cell in cells.items() if "error" in cell
    ]


def is_done(found: dict[str, Any] | None) -> bool:
    """True for a step that has nothing more to tell: it ended well, and no cell failed."""
    return found is not None and found.get("exit_code") == 0 and not failures(found)


def how_it_ended(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return str(found["skipped"])
    if found["exit_code"] is None:
        return "out of time"
    if found["exit_code"] != 0:
        return f"exit code {found['exit_code']}"
    return f"failed: {', '.join(failures(found))}" if failures(found) else "ok"


def show(data: dict[str, Any]) -> None:
    """Print how each step ended, and the cells of all networks."""
    for name, found in data["steps"].items():
        print(f"{name}: {how_it_ended(found)}" + (f", {found['seconds']:.0f} s" if "seconds" in found else ""))
    for mode, jobs in MODES.items():
        columns = [column for job in jobs for column in JOBS[job][1]]
        print(f"\n| {mode} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for name, found in data["steps"].items():
            for network, cells in networks_of(found).items() if name.startswith(mode) else ():
                texts = (as_text(cells[column]) if column in cells else "" for column in columns)
                print(f"| {network}, {name.split(', ')[1]} | {' | '.join(texts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no step begins or goes on")
    parser.add_argument("--quick", action="store_true", help="two networks in bfloat16, and fewer tests of the kernels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    setting = f"{options.device}, batch {options.batch}, {options.size} px, {options.rounds} rounds"
    data: dict[str, Any] = {"setting": setting, "steps": {}}
    if options.output.exists():
        data = json.loads(options.output.read_text())
        if data.get("setting") != setting:
            raise SystemExit(
                f"{options.output}: was measured with another setting: {data.get('setting')}\nnow: {setting}\n"
                f"Name another file with --output, or remove this one."
            )
    end = time.perf_counter() + 60 * options.minutes
    for step in steps(options):
        if is_done(data["steps"].get(step.name)):
            continue
        left = end - time.perf_counter()
        if left < 10:
            data["steps"].setdefault(step.name, {"skipped": "no time was left"})
        else:
            print(f"{step.name} …", file=sys.stderr, flush=True)
            try:
                data["steps"][step.name] = run(step, min(step.seconds, left), options)
            except OSError as error:  # no such program
                data["steps"][step.name] = {"skipped": str(error)}
        write_text(options.output, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    show(data)


if __name__ == "__main__":
    main()
