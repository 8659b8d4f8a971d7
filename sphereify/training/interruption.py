"""Signals that ask a run to stop: the step ends, a checkpoint is written, and then the run is left."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """A signal that has asked to stop, if any."""

    signal = 0
    """Its number; 0 while none has come."""

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal: the first is noted, the second stops at once.

        Raises:
            KeyboardInterrupt: a second signal.
        """
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Receive SIGINT and SIGTERM within the block. Outside of the main thread, which alone may ask for them, no signal
    is received."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if request.signal:  # it came after the last step: the run is complete, but its caller is to stop
        signal.raise_signal(request.signal)
