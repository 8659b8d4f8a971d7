"""The shared library of `kernels.cpp`: compiled once on a machine for its processor, and kept in the user's cache.

It takes about three seconds and the C++ compiler that CXX names, or g++. The folder is SPHEREIFY_CACHE, or `sphereify`
in XDG_CACHE_HOME or ~/.cache; where it cannot be written, each process compiles for itself.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from sphereify.files import replacing
from sphereify.nn.arcsine import ARCSINE_IN_RIGHT_ANGLES, SINE_OF_RIGHT_ANGLES

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""Sums are reordered only where the source says so, and NaN and infinities stay what they are."""
OF_PROCESSOR = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"),
}
"""Further flags by the instructions that torch itself uses here; the compiler's own choice for others."""

_WORD, _INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_SHAPE = (_WORD,) * 4
FUNCTIONS = {
    "normalize_filters": (_POINTER, _WORD, _WORD, _FLOAT, _POINTER, _POINTER, _INT),
    "filter_gradient": (_POINTER, _POINTER, _POINTER, _WORD, _WORD, _INT),
    "sum_squares": (_POINTER, _INT, _WORD, _WORD, _WORD, _INT, _FLOAT, _POINTER, _INT),
    "box_sum": (_POINTER, _WORD, _POINTER, _INT, _INT, _FLOAT, _POINTER, _INT),
    "curve": (_INT, _INT, *_SHAPE, _POINTER, _POINTER, _POINTER, _WORD, _POINTER, _POINTER, _POINTER, _INT),
    "folded": (_INT, _INT, *_SHAPE, _POINTER, _POINTER, _POINTER, _WORD, _POINTER, _POINTER, _INT, _INT),
    "curve_backward": (
        _INT, _INT, *_SHAPE, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _WORD, _POINTER,
        _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT,
    ),
    "subtract_radial": (_POINTER, _POINTER, _POINTER, _INT, _WORD, _WORD, _POINTER, _INT),
    "subtract_rows": (_POINTER, _POINTER, _POINTER, _WORD, _WORD, _INT),
}  # fmt: skip
"""The functions of the library and their arguments, in the order of `kernels.cpp`."""


@cache
def compiler() -> str | None:
    """The path of the C++ compiler, or None where there is none or another system than Linux."""
    return shutil.which(os.environ.get("CXX") or "g++") if sys.platform == "linux" else None


@cache
def load() -> dict[str, Callable[..., None]]:
    """The functions of the library, which is compiled if it is not in the folder.

    Raises:
        OSError: there is no compiler, or the library cannot be loaded.
        RuntimeError: the compiler failed, with what it said.
    """
    flags = (*FLAGS, *OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()))
    source = _source()
    name = f"kernels-{hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:16]}.so"
    try:
        path = _folder() / name
        if not path.exists():
            with replacing(path) as aside:
                _compile(source, flags, aside)
        return _opened(path)
    except OSError:  # a folder that cannot be written, or from which nothing may be executed
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            _compile(source, flags, path)
            return _opened(path)  # stays loaded without its file


def _source() -> str:
    coefficients = {"ARCSINE": ARCSINE_IN_RIGHT_ANGLES, "SINE": SINE_OF_RIGHT_ANGLES}
    tables = [
        f"constexpr float {name}[] = {{{', '.join(f'{value:.9e}f' for value in values)}}};\n"
        for name, values in coefficients.items()
    ]
    return "".join(tables) + SOURCE.read_text(encoding="utf-8")


def _folder() -> Path:
    if folder := os.environ.get("SPHEREIFY_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sphereify"


def _compile(source: str, flags: tuple[str, ...], path: Path) -> None:
    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler")
    command = [found, *flags, "-x", "c++", "-", "-o", str(path)]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{found} ended with {done.returncode}: {done.stderr.strip()}")


def _opened(path: Path) -> dict[str, Callable[..., None]]:
    library = ctypes.CDLL(str(path))
    functions = {name: getattr(library, name) for name in FUNCTIONS}
    for name, function in functions.items():
        function.argtypes, function.restype = FUNCTIONS[name], None
    return functions
