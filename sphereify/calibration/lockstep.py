"""Forward passes that pause at each layer, so that several of them can take turns.

While a pass is paused, only what it needs later is in memory, and no part of a network runs twice.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

_thread_state = threading.local()


class _Abandoned(BaseException):
    """The end of a pass whose caller does not wait for it any more."""


class Pass:
    """A function in a thread of its own, which runs only while the caller waits for its next event.

    Args:
        body: the function, which calls `active_pass().pause(event)` wherever the caller is to take over.
        number: the number of the batch that it runs on.
    """

    def __init__(self, body: Callable[[], Any], number: int):
        self.number = number
        self._body = body
        self._closed = False
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def advance(self) -> Any:
        """Run up to the next event and return it; None at the end. An error of the body is raised here."""
        if self._thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._thread = threading.Thread(target=self._run, args=(device,), daemon=True)
            self._thread.start()
        else:
            self._requests.put(True)
        kind, value = self._events.get()
        if kind == "error":
            raise value
        return value

    def pause(self, event: Any) -> None:
        """Hand an event to the caller and wait until it advances the pass. Called by the body."""
        if not self._closed:
            self._events.put(("event", event))
        if self._closed or not self._requests.get():
            raise _Abandoned  # again at the next layer, should the body have caught it

    def close(self) -> None:
        """End the pass wherever it is paused."""
        self._closed = True
        if self._thread is not None and self._thread.is_alive():
            self._requests.put(False)
            self._thread.join()

    def _run(self, device: int | None) -> None:
        _thread_state.active = self
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                self._body()
            self._events.put(("event", None))
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the caller, whose error it is
            self._events.put(("error", error))


def active_pass() -> Any:
    """The `Pass` that runs in this thread; None outside of one."""
    return getattr(_thread_state, "active", None)
