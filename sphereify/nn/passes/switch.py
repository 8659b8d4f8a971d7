"""The state of a maker of passes in this process: switched on or off by the environment or a caller, or given up."""

import os
from contextlib import AbstractContextManager, ExitStack


class KernelFailure(RuntimeError):
    """A kernel could not be compiled or launched, or its results are wrong; the cause is attached."""


class Switch:
    """The switch of one maker.

    Attributes:
        on: False where the environment or a caller has switched the maker off.
        failed: True once a kernel could not be compiled or launched, or was wrong.
    """

    def __init__(self, variable: str):
        """A switch that is on unless an environment variable of that name says 0, off, false or no."""
        self.on = os.environ.get(variable, "1").lower() not in ("0", "off", "false", "no")
        self.failed = False

    def enabled(self, on: bool = True) -> AbstractContextManager:
        """Switch the maker on or off for the process: from now on, or inside `with`.

        >>> switch = Switch("SPHEREIFY_KERNELS")
        >>> with switch.enabled(False):
        ...     switch.on
        False
        """
        until_then = ExitStack()
        until_then.callback(setattr, self, "on", self.on)
        self.on = on
        return until_then
