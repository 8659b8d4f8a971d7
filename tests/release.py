"""What must be right before a release, one line each: `python -m tests.release`, or `make release-check`.

The working tree is clean, the version is that of the changelog's head and of the citation, and the head has a date; the
sdist and the wheel build and satisfy twine; the wheel, installed in an environment of its own, runs a first command.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIRST_COMMAND = ("inspect", "resnet18", "--skip-shortcuts")


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel, into a folder."""
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


class Installed:
    """A wheel in an environment of its own, which takes the other packages from that of this interpreter."""

    def __init__(self, wheel: Path, folder: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.packages = Path(
            _run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        )
        own = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index"]
        _run([*own, wheel])
        (self.packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after the packages of its own

    def run(self, *command: str | Path, folder: Path, **variables: str) -> str:
        """What a command of this environment prints, run in a folder outside of the repository."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program, *arguments = command
        return _run([self.bin / program, *arguments], cwd=folder, env={**environment, **variables})


def _run(command: Sequence[str | Path], **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


# ---- The checks


def tree(work: Path) -> str:
    """The working tree has no changes that are not committed."""
    changes = _run(["git", "status", "--porcelain"], cwd=ROOT).splitlines()
    return f"{len(changes)} changes are not committed, the first: {changes[0]}" if changes else ""


def version(work: Path) -> str:
    """pyproject.toml, the package, the head of CHANGELOG.md and CITATION.cff name one version."""
    package = (ROOT / "sphereify" / "__init__.py").read_text()
    found = {
        "pyproject.toml": _first(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text()),
        "sphereify/__init__.py": _first(r'^__version__ = "(.*)"$', package),
        "CHANGELOG.md": _first(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text()),
        "CITATION.cff": _first(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text()),
    }
    return "" if len(set(found.values())) == 1 else ", ".join(f"{file}: {number}" for file, number in found.items())


def date(work: Path) -> str:
    """The head of CHANGELOG.md has a date."""
    head = _first(r"^(## .*)$", (ROOT / "CHANGELOG.md").read_text())
    has_date = re.search(r"\d{4}-\d\d-\d\d", head)
    return "" if has_date else f"CHANGELOG.md: got {head!r}, expected '## VERSION (YYYY-MM-DD)'"


def files(work: Path) -> str:
    """The sdist and the wheel build."""
    build(work)
    return ""


def metadata(work: Path) -> str:
    """twine accepts what the package index would be given."""
    _run([sys.executable, "-m", "twine", "check", "--strict", *sorted(work.glob("*.*z")), *work.glob("*.whl")])
    return ""


def first_command(work: Path) -> str:
    """The wheel is installed, and runs the first command of the demo."""
    (wheel,) = work.glob("*.whl")
    printed = Installed(wheel, work / "environment").run("sphereify", *FIRST_COMMAND, folder=work)
    return "" if "17 convolutions converted, 3 shortcuts kept" in printed else f"printed:\n{printed}"


CHECKS: tuple[Callable[[Path], str], ...] = (tree, version, date, files, metadata, first_command)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "none"


def main() -> None:
    """Run all checks, and exit with 1 if one of them finds something."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            try:
                problem = check(Path(folder))
            except (RuntimeError, ValueError) as error:
                problem = str(error) or type(error).__name__
            failed += bool(problem)
            print(f"{'NOT YET' if problem else 'ok':<8} {check.__doc__}", flush=True)
            if problem:
                print(textwrap.indent(problem, " " * 9), flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
