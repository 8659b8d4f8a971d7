"""The shared library of `kernels.cpp`: compiled once on a machine for its processor, and kept in the user's cache.

It takes about three seconds and the C++ compiler that CXX names, with its arguments, or g++. The folder is
SPHEREIFY_CACHE, or `sphereify` in XDG_CACHE_HOME or ~/.cache; where it cannot be written, each process compiles for
itself. A library that is not whole, after a full disk or a failed copy, is compiled again.
"""

import ctypes
import hashlib
import os
import shlex
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

FOLDER = Path(__file__).parent
SOURCE = "kernels.cpp"
HEADERS = ("curves.h", "windows.h")
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
def compiler() -> tuple[str, ...] | None:
    """The path of the C++ compiler, and the arguments that CXX gives it; None where there is none, or not on Linux.

    CXX is read as make does: "ccache g++", "g++ -m64".
    """
    named = os.environ.get("CXX", "").split()
    program, *arguments = named or ["g++"]
    path = shutil.which(program) if sys.platform == "linux" else None
    return None if path is None else (path, *arguments)


@cache
def load() -> dict[str, Callable[..., None]]:
    """The functions of the library, which is compiled if it is not in the folder.

    Raises:
        OSError: there is no compiler, or the library cannot be loaded.
        RuntimeError: the compiler failed, with what it said.
    """
    flags = (*FLAGS, *OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()))
    source = _source()
    name = _file_name(source, flags)
    try:
        path = _folder() / name
        if not _is_whole(path):
            with replacing(path) as aside:
                _compile(source, flags, aside)
                aside.write_bytes(_sealed(aside.read_bytes()))
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
    return "".join(tables) + _text(SOURCE)


def _file_name(source: str, flags: tuple[str, ...]) -> str:
    """The name of the library, another one for each source, header and flag."""
    everything = (source, *(_text(name) for name in HEADERS), flags)
    return f"kernels-{hashlib.sha256(repr(everything).encode()).hexdigest()[:16]}.so"


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _folder() -> Path:
    """The folder of libraries.

    Raises:
        FileNotFoundError: the user has no home.
    """
    if folder := os.environ.get("SPHEREIFY_CACHE"):
        return Path(os.path.expanduser(folder)).absolute()
    caches = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not caches.is_absolute():
        raise FileNotFoundError(f"no folder for caches: {caches}")
    return caches / "sphereify"


SEAL = hashlib.sha256().digest_size


def _sealed(content: bytes) -> bytes:
    """A library with its hash behind it, where the loader does not look."""
    return content + hashlib.sha256(content).digest()


def _is_whole(path: Path) -> bool:
    """True if a library is there as `_sealed` made it: the loader does not check, and may crash on a part of one."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return len(content) > SEAL and _sealed(content[:-SEAL]) == content


def _compile(source: str, flags: tuple[str, ...], path: Path) -> None:
    program = compiler()
    if program is None:
        raise FileNotFoundError("no C++ compiler")
    command = [*program, *flags, "-I", str(FOLDER), "-x", "c++", "-", "-o", str(path)]
    # In UTF-8 whatever the locale is, which may not have the letters of the comments.
    done = subprocess.run(command, input=source, encoding="utf-8", errors="replace", capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(program)} ended with {done.returncode}: {done.stderr.strip()}")


def _opened(path: Path) -> dict[str, Callable[..., None]]:
    library = ctypes.CDLL(str(path))
    functions = {name: getattr(library, name) for name in FUNCTIONS}
    for name, function in functions.items():
        function.argtypes, function.restype = FUNCTIONS[name], None
    return functions
