"""Causality: convolutions whose output at one time may depend on nothing later, seen in a forward pass.

A pooled radius looks at every position of its input, and would leak the future into such a layer. Three signs are
noted: an input padded in front only, along an axis, by all that the kernel reaches back; an output of which the end is
cut off that symmetric padding has added; and a layer that is called again and again with a longer sequence.
"""

import itertools
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.nn.functional_calls import Arguments
from sphereify.nn.geometry import per_axis

GROWING = "it is called with growing inputs"
PADS = (F.pad, torch._C._nn.pad, torch.constant_pad_nd)


class CausalityWitness:
    """A record of the signs of causality, by the name of the weight that a convolution multiplies with."""

    def __init__(self) -> None:
        self.causal: dict[str, str] = {}
        """Weight -> the sign, as a noun phrase."""
        self._fronts: dict[int, list[int]] = {}  # by the id of a padded tensor: zeros in front of each axis of space
        self._excess: dict[int, tuple[str, list[int]]] = {}  # by the id of an output: the weight, and what may be cut
        self._lengths: dict[str, list[int]] = defaultdict(list)
        self._alive: list[Any] = []  # an id is only good while its tensor lives

    def note_result(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Note a padding, or a cut at the end of a convolution's output."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        if func in PADS:
            sides = args[1] if len(args) > 1 else kwargs.get("pad", ())
            pairs = list(zip(sides[::2], sides[1::2], strict=False))  # the last axis first
            if any(front > 0 and behind == 0 for front, behind in pairs):
                fronts = [front if behind == 0 else 0 for front, behind in reversed(pairs)]
                self._remember(self._fronts, result, [0] * (result.dim() - 2 - len(fronts)) + fronts)
        elif id(args[0]) in self._excess and getattr(func, "__name__", "") in ("__getitem__", "narrow"):
            weight, excess = self._excess[id(args[0])]
            lost = [a - b for a, b in zip(args[0].shape[2:], result.shape[2:], strict=False)]
            if result.dim() == args[0].dim():
                starts = _starts(func.__name__, args, kwargs)[2:]
                if any(e and cut >= e and start == 0 for e, cut, start in zip(excess, lost, starts, strict=True)):
                    self.causal[weight] = "the end of its output is cut off"

    def note_convolution(self, weight: str, call: Arguments, result: Any) -> None:
        """Note a convolution's padding, and its place among the calls of one layer."""
        dim = call.weight.dim() - 2
        padding, dilation = call.geometry[1], per_axis(call.geometry[2], dim)
        reach = [d * (k - 1) for d, k in zip(dilation, call.weight.shape[2:], strict=True)]
        own = [0] * dim if isinstance(padding, str) else list(per_axis(padding, dim))
        fronts = self._fronts.get(id(call.x), [0] * dim)
        if any(r and front >= r and p == 0 for r, front, p in zip(reach, fronts[-dim:], own, strict=True)):
            self.causal[weight] = "its input is padded in front only"
        if any(r and p >= r for r, p in zip(reach, own, strict=True)):
            excess = [p if r and p >= r else 0 for r, p in zip(reach, own, strict=True)]
            self._remember(self._excess, result, (weight, excess))
        if dim == 1:
            lengths = self._lengths[weight]
            lengths.append(call.x.shape[-1])
            if len(lengths) > 1 and all(a < b for a, b in itertools.pairwise(lengths)):
                self.causal.setdefault(weight, GROWING)
            elif self.causal.get(weight) == GROWING:
                del self.causal[weight]

    def _remember(self, table: dict[int, Any], tensor: Any, value: Any) -> None:
        table[id(tensor)] = value
        self._alive.append(tensor)


def _starts(name: str, args: tuple, kwargs: dict[str, Any]) -> list[int]:
    """The first index on each axis of a tensor from which `narrow` or an index takes a part of as many axes."""
    dim = args[0].dim()
    starts = [0] * dim
    if name == "narrow":
        arguments = dict(zip(("dim", "start"), args[1:], strict=False)) | kwargs
        starts[arguments["dim"]] = arguments["start"]
        return starts
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    place = next((i for i, one in enumerate(index) if one is Ellipsis), len(index))
    before, after = index[:place], index[place + 1 :]
    for axis, one in [*enumerate(before), *((dim - len(after) + i, one) for i, one in enumerate(after))]:
        starts[axis] = (one.start or 0) if isinstance(one, slice) else 0
    return starts
