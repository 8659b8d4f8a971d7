"""Fixtures of the tests of training."""

from pathlib import Path

import pytest
import timm.optim

PICTURES = ("plot_run", "plot_comparison")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """An empty file in place of each picture, which takes longer to draw than a small run; not with `pictures`."""
    if "pictures" not in request.fixturenames:
        for name in PICTURES:
            monkeypatch.setattr(f"sphereify.plots.{name}", lambda rows, path: Path(path).touch())


@pytest.fixture
def pictures():
    """Pictures are drawn."""


@pytest.fixture
def optimizer(monkeypatch):
    """The parameter groups of the run's optimizer, and the rates at each of its steps."""
    seen: dict = {"rates": []}
    create = timm.optim.create_optimizer_v2

    def watched(*given, **settings):
        made = create(*given, **settings)
        seen["groups"] = made.param_groups
        made.register_step_pre_hook(lambda opt, *_: seen["rates"].append({group["lr"] for group in opt.param_groups}))
        return made

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", watched)
    return seen
