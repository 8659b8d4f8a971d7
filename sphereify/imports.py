"""Importing a Python file by its path, with the modules that lie beside it, as `python FILE` finds them."""

import importlib
import importlib.util
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType


def import_file(file: Path) -> ModuleType:
    """The module in a file, run anew.

    Its folder goes to the front of `sys.path`, so that it can import its neighbours, then and later. A neighbour comes
    before a module of the same name that another file brought from its own folder. In a package, the file also imports
    by names relative to it.

    Raises:
        Exception: whatever the code of the file raises.
    """
    file = file.resolve()
    package = _package_of(file)
    root = file.parents[package.count(".") + 1] if package else file.parent
    for folder in dict.fromkeys((str(root), str(file.parent))):
        _come_first(folder)
    _forget_neighbours_of_others(file)
    name = _module_name(file, package)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle looks for the classes of the file
    spec.loader.exec_module(module)
    return module


_folders: list[str] = []
"""Folders of the files that were imported so far."""


def _come_first(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    if folder not in _folders:
        _folders.append(folder)
    importlib.invalidate_caches()


def _forget_neighbours_of_others(file: Path) -> None:
    """Drop modules that came from the folder of another file and have the name of a neighbour of this one."""
    neighbours = {path.stem for path in file.parent.glob("*.py")} - {file.stem}
    packages = {path.parent.name for path in file.parent.glob("*/__init__.py")}
    for name in (neighbours | packages) & set(sys.modules):
        home = Path(getattr(sys.modules[name], "__file__", None) or "").resolve()
        home = home.parent.parent if home.name == "__init__.py" else home.parent
        if home != file.parent and str(home) in _folders:
            for inner in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[inner]


def _package_of(file: Path) -> str:
    """The dotted name of the package that a file belongs to; empty without one, or if its name is taken."""
    names: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent
    if not names or not file.stem.isidentifier():
        return ""
    taken = sys.modules.get(names[0]) or importlib.util.find_spec(names[0])
    origin = getattr(taken, "__file__", None) or getattr(taken, "origin", None)
    return ".".join(names) if taken is None or _is(origin, folder / names[0] / "__init__.py") else ""


def _module_name(file: Path, package: str) -> str:
    """The name for a file as a module: its own, unless another file or a package has it."""
    if package:
        return f"{package}.{file.stem}"
    stem = re.sub(r"\W", "_", file.stem)  # a dot would name a package
    taken = sys.modules.get(stem)
    same = taken is not None and _is(getattr(taken, "__file__", None), file)
    spec = importlib.util.find_spec(stem) if taken is None else None
    free = taken is None and (spec is None or _is(spec.origin, file))
    return stem if same or free else f"{stem}_{zlib.crc32(str(file).encode()):08x}"


def _is(place: str | None, file: Path) -> bool:
    return place is not None and Path(place).resolve() == file
