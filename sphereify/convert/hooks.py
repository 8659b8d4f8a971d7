"""Hooks of a model: those that its forward may depend on, and what they refer to in a copy.

A hook may be part of a network, when it collects features that the forward reads, or a spectator of the user's, which
counts, prints or logs. A hook that refers to something of the model's is taken for a part of it.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

OF_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
"""Names of the tables with the hooks that a forward pass runs."""


def forward_hooks(model: nn.Module) -> dict[int, Any]:
    """The hooks that a forward pass runs, by id, without those with which torch computes a weight."""
    return {
        id(hook): hook
        for module in model.modules()
        for table in OF_FORWARD
        for hook in vars(module).get(table, {}).values()
        if not computes_weight(hook)
    }


def computes_weight(hook: Any) -> bool:
    """True for a hook of torch's that computes a weight, as old weight norms have them."""
    return type(hook).__module__.startswith("torch.nn.utils")


def hooks_of_forward(model: nn.Module) -> set[int]:
    """The hooks, by id, that refer to a module of the model or to an object that one of its modules holds."""
    parts = {id(module) for module in model.modules()}
    for module in model.modules():
        tables = (name for name in vars(module) if name.endswith("_hooks"))
        own = {name: value for name, value in vars(module).items() if name not in tables}
        parts |= {id(value) for value in own.values() if _is_shared(value)}
    return {key for key, hook in forward_hooks(model).items() if any(id(one) in parts for one in _referents(hook))}


def with_hooks(module: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of a call in place of the module's forward, between the hooks that would run there.

    A tracer makes one node of a leaf and does not run its hooks.
    """
    for key, hook in module._forward_pre_hooks.items():
        if computes_weight(hook):
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (changed := hook(module, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    result = call(args, kwargs)
    for key, hook in module._forward_hooks.items():
        with_kwargs = key in module._forward_hooks_with_kwargs
        changed = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
        result = result if changed is None else changed
    return result


def rebind_hooks(model: nn.Module, copies: dict[int, Any]) -> None:
    """Let the hooks of a copy refer to the copy: functions are not copied, and would write to the original.

    Args:
        model: the copy.
        copies: object of the original, by id -> its copy, as `copy.deepcopy` notes it.
    """
    for module in model.modules():
        for table in OF_FORWARD:
            hooks = vars(module).get(table, {})
            for key, hook in hooks.items():
                hooks[key] = _rebound(hook, copies)


def _is_shared(value: Any) -> bool:
    """True for an object by which a hook and a forward can talk to each other."""
    plain = (str, bytes, int, float, complex, tuple, type, types.FunctionType, types.ModuleType)
    return value is not None and not isinstance(value, plain)


def _referents(hook: Any, depth: int = 3) -> Iterator[Any]:
    """The objects that a hook refers to: its own, those in its closure, and globals that its code names."""
    yield hook
    if not depth:
        return
    if isinstance(hook, types.MethodType):
        inner = [hook.__self__, hook.__func__]
    elif isinstance(hook, types.FunctionType):
        defaults = (*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values())
        inner = [*_cells(hook).values(), *_globals(hook).values(), *defaults]
    elif isinstance(hook, functools.partial):
        inner = [hook.func, *hook.args, *hook.keywords.values()]
    elif isinstance(hook, weakref.ref):
        inner = [hook()]
    elif callable(hook) and not isinstance(hook, (nn.Module, type)):
        inner = [*getattr(hook, "__dict__", {}).values()]
    else:
        inner = []
    for one in inner:
        yield from _referents(one, depth - 1)


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of a function's closure that have a value."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not yet set
            continue
    return values


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function's code names."""
    return {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}


def _rebound(hook: Any, copies: dict[int, Any], depth: int = 3) -> Any:
    """A hook with the copies in place of what it refers to; the same hook where nothing of that was copied."""
    if depth and isinstance(hook, weakref.ref):
        copied = copies.get(id(hook()))
        return hook if copied is None else weakref.ref(copied)
    if depth and isinstance(hook, functools.partial):
        function = _rebound(hook.func, copies, depth - 1)  # deepcopy has seen to the arguments
        return hook if function is hook.func else functools.partial(function, *hook.args, **hook.keywords)
    if not isinstance(hook, types.FunctionType) or not depth:
        return copies.get(id(hook), hook)

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        new = {name: _rebound(value, copies, depth - 1) for name, value in values.items()}
        return {name: value for name, value in new.items() if value is not values[name]}

    cells, names = changed(_cells(hook)), changed(_globals(hook))
    defaults = tuple(_rebound(value, copies, depth - 1) for value in hook.__defaults__ or ())
    by_keyword = hook.__kwdefaults__ or {}
    new_by_keyword = changed(by_keyword)
    same_defaults = all(a is b for a, b in zip(defaults, hook.__defaults__ or (), strict=True))
    if same_defaults and not (cells or names or new_by_keyword):
        return hook
    closure = tuple(
        types.CellType(cells[name]) if name in cells else cell
        for name, cell in zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
    )
    variables = {**hook.__globals__, **names} if names else hook.__globals__
    function = types.FunctionType(hook.__code__, variables, hook.__name__, defaults or None, closure)
    function.__kwdefaults__ = {**by_keyword, **new_by_keyword} or None
    function.__qualname__ = hook.__qualname__
    function.__dict__.update(hook.__dict__)
    return function
