"""Large grids of parameters, of which `make test` runs a part."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def grid(cases: Iterable[Any], usual: Callable[..., bool]) -> list[Any]:
    """The cases, marked `exhaustive` but for those of which `usual(*case)` is true."""
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(case if usual(*values) else pytest.param(*values, marks=pytest.mark.exhaustive))
    return marked
