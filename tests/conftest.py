"""Settings and fixtures that all tests share."""

import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

# The same examples in each run of a commit: what fails once fails again, and what passes stays passed.
settings.register_profile("default", max_examples=20, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=200)
# New examples in each run, for those who look for a counterexample.
settings.register_profile("search", settings.get_profile("thorough"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: `run("convert", "resnet18", …)` returns (exit code, stdout, stderr)."""
    from sphereify import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sphereify", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        return (code, *capsys.readouterr())

    return run
