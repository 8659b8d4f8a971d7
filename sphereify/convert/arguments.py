"""The arguments of one forward pass, positional and by keyword: one type for all that run a model."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError, wrong_type


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of one forward pass.

    >>> ModelArguments.of({"input_ids": torch.zeros(2, 16, dtype=torch.long)}).described()
    'input_ids int64 2×16'
    """

    args: tuple[Any, ...] = ()
    """Positional arguments."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by keyword."""
    given_by: str = field(default="example_inputs", compare=False, repr=False)
    """The option that they came from, for messages."""

    @classmethod
    def of(cls, inputs: "Inputs") -> "ModelArguments":
        """The arguments that a user means by one tensor, a tuple, a mapping of keywords, or a pair (tuple, mapping).

        Anything else is one positional argument.

        Raises:
            ArgumentTypeError: a mapping whose keys are no names.

        >>> ModelArguments.of(((1, 2), {"scale": 3}))
        ModelArguments(args=(1, 2), kwargs={'scale': 3})
        """
        if isinstance(inputs, cls):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), _keywords(inputs))
        if isinstance(inputs, tuple):
            if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
                return cls(inputs[0], _keywords(inputs[1]))
            return cls(inputs)
        return cls((inputs,))

    def run(self, model: Callable[..., Any]) -> Any:
        """The output of a model for copies of these arguments, to which a forward may write."""
        copied = self.map(Tensor.clone)
        return model(*copied.args, **copied.kwargs)

    def map(self, change: Callable[[Tensor], Any]) -> "ModelArguments":
        """The arguments with each tensor changed, those in lists, tuples and dicts too."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return ModelArguments(args, kwargs)

    def to(self, place: Any) -> "ModelArguments":
        """The arguments with their tensors on a device."""
        return self.map(lambda tensor: tensor.to(place))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each argument with its name; the name of a positional one is empty."""
        yield from (("", value) for value in self.args)
        yield from self.kwargs.items()

    def values(self) -> list[Any]:
        """The arguments, positional ones first."""
        return [value for _, value in self.items()]

    @property
    def first(self) -> Any:
        """The first argument; None if there are none."""
        return next(iter(self.values()), None)

    def with_first(self, value: Any) -> "ModelArguments":
        """The arguments with another first one."""
        return self.with_values([value, *self.values()[1:]])

    def with_values(self, values: Any) -> "ModelArguments":
        """The arguments with as many other values, in the order of `values()`, under the same names."""
        values = tuple(values)
        count = len(self.args)
        return replace(self, args=values[:count], kwargs=dict(zip(self.kwargs, values[count:], strict=True)))

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, those in lists, tuples and dicts too."""
        return [leaf for leaf in torch.utils._pytree.tree_leaves(self.values()) if isinstance(leaf, Tensor)]

    def cut(self, split: Callable[[Tensor], tuple[Tensor, ...]]) -> "list[ModelArguments]":
        """The arguments in pieces, as `split` cuts each of them; all must be tensors."""
        return [self.with_values(piece) for piece in zip(*map(split, self.values()), strict=True)]

    def described(self) -> str:
        """Name, type and shape of each argument, for a line of text."""
        return ", ".join(f"{name} {_described(value)}".lstrip() for name, value in self.items()) or "no arguments"


Inputs: TypeAlias = Union[Tensor, "tuple[Any, ...]", "Mapping[str, Any]", ModelArguments, None]
"""Example inputs as a user gives them: one tensor, a tuple of arguments, a mapping of keywords (such as a tokenizer
returns), a pair of the two, or none."""


def described(arguments: ModelArguments, inputs: Inputs) -> str:
    """The arguments that a model ran with, in words: `inputs` are those that the user gave, if any."""
    return arguments.described() if inputs is not None else f"assumed inputs: {arguments.described()}"


def does_not_run(where: str, model: nn.Module, arguments: ModelArguments, reason: str) -> UsageError:
    """The error for arguments with which a model does not run.

    Args:
        where: the option or function that they came to.
        model: the model.
        arguments: its arguments.
        reason: the first line of what it raised.
    """
    advice = ""
    if re.search(r"unexpected keyword|missing \d+ required", reason) and (arguments.kwargs or not arguments.args):
        names = list(inspect.signature(model.forward).parameters)
        advice = f". Its arguments are {', '.join(names)}" if names else ""
        if len(names) == 1 and arguments.kwargs:
            advice += "; for one argument that is a dict, give a tuple: (inputs,)"
    return UsageError(
        f"{where}: {type(model).__name__} does not run with these inputs: {reason}; got {arguments.described()}{advice}"
    )


def _keywords(inputs: Mapping[Any, Any]) -> dict[str, Any]:
    for name in inputs:
        if not isinstance(name, str):
            raise wrong_type(
                "example_inputs: a key",
                name,
                "the name of an argument. For a model whose one argument is a dict, give a tuple: (inputs,)",
            )
    return dict(inputs)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {'×'.join(map(str, value.shape)) or 'number'}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return f"[{', '.join(_described(one) for one in value)}]"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
