"""This process among those that torchrun started, as its environment says; without torchrun, it is the only one."""

import os


def world_size() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def is_first_process() -> bool:
    """True in the process that speaks for all."""
    return _number("RANK", 0) == 0


def _number(variable: str, without: int) -> int:
    """The value of a variable; `without` where it is missing or no number, which torchrun did not write then."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else without
