"""Settings and fixtures that all tests share."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """A Hugging Face Hub on loopback, an empty cache, and a token that may write; see `tests.hub_server`."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN, serving

    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # What the library read from the environment when it was imported, for timm, which asks for itself.
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield hub
