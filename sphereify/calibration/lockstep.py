"""Forward passes that stand still at each layer, so that a layer can be set from what it receives before it runs.

Every batch has a pass of its own through the converted network and through the original. The passes take turns; while
they stand still, only what a pass needs later is in memory, and no part of a network runs twice.
"""

import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sphereify.convert.operations import ADD, word

_current = threading.local()


class _Abandoned(BaseException):
    """Unwinds a pass that nobody waits for any more."""


class Pass:
    """A function in a thread of its own, which runs only while the caller waits for it to stand still."""

    def __init__(self, body: Callable[[], Any], number: int):
        self._body = body
        self.number = number
        self.closed = False
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.calls: Counter[str] = Counter()
        """How often each module has been called."""
        self.layer_calls: Counter[str] = Counter()
        """The same of converted layers."""
        self.seen: dict[Place, weakref.ref[Tensor]] = {}
        """What went in and out of modules, as far as it is still in use."""
        self.where: dict[int, tuple[weakref.ref[Tensor], Place]] = {}
        """The same the other way round: by tensor, where it was last."""
        self.pending: list[Pending] = []

    def advance(self) -> Any:
        """Run up to the next event; None at the end. What the body raises is raised here."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(_device(),), daemon=True)
            self._thread.start()
        else:
            self._asked.put(True)
        kind, value = self._told.get()
        if kind == "raised":
            raise value
        return value

    def stand_still(self, event: Any) -> None:
        """Called by the body: hand an event to the caller, and wait."""
        if not self.closed:
            self._told.put(("event", event))
        if self.closed or not self._asked.get():
            raise _Abandoned  # again at the next layer, should the body have caught it

    def tell(self, pending: "Pending") -> None:
        """Stand still with an output whose use is known."""
        self.pending.remove(pending)
        self.stand_still(pending)

    def close(self) -> None:
        """End the pass wherever it stands."""
        self.closed = True
        if self._thread is not None and self._thread.is_alive():
            self._asked.put(False)
            self._thread.join()

    def _run(self, device: int | None) -> None:
        _current.passing = self
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                self._body()
            self._told.put(("event", None))
        except _Abandoned:
            pass
        except BaseException as error:  # told to the caller, whose error it is
            self._told.put(("raised", error))

    def note(self, place: "Place", tensor: Tensor) -> None:
        reference = weakref.ref(tensor)
        self.seen[place] = reference
        self.where[id(tensor)] = (reference, place)

    def place_of(self, tensor: Tensor) -> "Place | None":
        reference, place = self.where.get(id(tensor), (None, None))
        return place if reference is not None and reference() is tensor else None

    def at(self, place: "Place | None") -> Tensor | None:
        """What the tensor of the other network's place is in this one, if it is still in use."""
        reference = self.seen.get(place) if place is not None else None
        return reference() if reference is not None else None


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def current() -> Pass | None:
    """The pass that this thread is, if it is one."""
    return getattr(_current, "passing", None)


@dataclass(frozen=True)
class Place:
    """The input or the output of one call of a module."""

    module: str
    call: int
    side: str


@dataclass
class Pending:
    """An output of the original, on its way to what uses it."""

    site: str
    call: int
    received: torch.Size
    """Shape of the layer's input."""
    tensor: Tensor
    rows: Callable[[Tensor], Tensor]
    """Takes the positions that are used from a tensor of the output's shape."""
    drawn: Tensor | None
    """These positions; None for all."""
    inside: bool = False
    """Whether the normalization that follows is at work on it."""
    normalized: Tensor | None = None
    """Rows after that normalization."""
    total: Tensor | None = None
    """Rows of the sum, if what first uses it adds it to something."""
    other: Place | None = None
    """Where the other summand comes from."""
    rectified: bool = False
    """Whether a ReLU is what uses it."""

    def __post_init__(self) -> None:
        self.shape = self.tensor.shape
        self.raw = self.rows(self.tensor)


@dataclass(frozen=True)
class Received:
    """The converted network stands before a layer."""

    site: str
    call: int
    arguments: tuple[Any, ...]


_HARMLESS = {"size", "dim", "numel", "is_floating_point", "get_device", "is_contiguous", "ndimension", "getattr"}
"""These read what a tensor is, not what it holds."""
_RECTIFIERS = {"relu", "relu_"}


class Follow(TorchFunctionMode):
    """In a pass through the original: tells when a pending output is first used, unless that is an addition.

    Then the sum is what is pending: it is used as the output would have been.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        passing = current()
        if passing is None or not passing.pending or word(func) in _HARMLESS:
            return func(*args, **kwargs)
        operands = list(_flat((*args, *kwargs.values())))
        used = [p for p in passing.pending if not p.inside and any(p.tensor is value for value in operands)]
        summed = []
        for pending in used:
            other = _other_summand(func, args, kwargs, pending)
            if other is None:
                pending.rectified = word(func) in _RECTIFIERS
                passing.tell(pending)
            else:
                summed.append((pending, passing.place_of(other)))
        result = func(*args, **kwargs)
        for pending, place in summed:
            pending.tensor, pending.total, pending.other = result, pending.rows(result), place
        return result


def _other_summand(func: Any, args: tuple, kwargs: dict[str, Any], pending: Pending) -> Tensor | None:
    """What an output is added to for the first time, if this call adds it to something of its own shape."""
    if word(func) not in ADD or len(args) != 2 or kwargs or pending.total is not None:
        return None
    other = args[1] if args[0] is pending.tensor else args[0]
    return other if isinstance(other, Tensor) and other.shape == pending.shape else None


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
