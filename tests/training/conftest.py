"""Fixtures of the tests of training."""

import pytest
import timm.optim


@pytest.fixture
def optimizer(monkeypatch):
    """What the loop's optimizer is made of, and the rate at each of its steps."""
    seen: dict = {"rates": []}
    create = timm.optim.create_optimizer_v2

    def watched(*given, **settings):
        made = create(*given, **settings)
        seen["groups"] = made.param_groups
        made.register_step_pre_hook(lambda opt, *_: seen["rates"].append({group["lr"] for group in opt.param_groups}))
        return made

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", watched)
    return seen
