"""The first check of every function that takes a model."""

from torch import nn

from sphereify.errors import wrong_type


def check_module(model: object, name: str = "model", expected: str = "a torch.nn.Module") -> None:
    """Make sure that an argument is a module of torch's.

    Args:
        model: the argument.
        name: what to call it in the message.
        expected: what it should be, as a noun phrase.

    Raises:
        ArgumentTypeError: it is none.

    >>> check_module(nn.ReLU())
    """
    if not isinstance(model, nn.Module):
        raise wrong_type(name, model, expected)
