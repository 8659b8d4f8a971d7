"""Symbolic traces by torch.fx: an angular layer is one node of a graph, as torch's layers are."""

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from sphereify.errors import UnsupportedModelError


def one_node(forward: Callable) -> Callable:
    """Make the forward of a module a leaf of every torch.fx tracer, whichever classes the tracer itself knows."""

    @functools.wraps(forward)
    def traceable(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = tracer_of(args, kwargs)
        if tracer is None:
            return forward(self, *args, **kwargs)
        if self is tracer.root:
            raise UnsupportedModelError(
                f"{type(self).__name__} is one node of a torch.fx graph and has no graph of its own: trace a model "
                f"that holds it"
            )
        return node_of(self, tracer, args, kwargs)

    return traceable


def tracer_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The torch.fx tracer that records a call with these arguments; None outside of traces."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, fx.Proxy):
            return value.tracer
        if isinstance(value, tuple) and (tracer := tracer_of(value, {})) is not None:
            return tracer
    return None


def node_of(module: nn.Module, tracer: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Proxy:
    """The call of a module as one node of the tracer's graph."""
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)  # type: ignore[no-any-return]
