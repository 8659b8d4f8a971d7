"""Short texts and numbers that stand for a network's tensors, by which one network is told from another.

An artifact holds a fingerprint, by which what was measured on a network is told from what it has become since. The
folder of a comparison's run holds the checksum of the network with which it began.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.annotations import LOADED_FINGERPRINT


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short text that changes with any name, shape, dtype or value of the tensors, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """A CRC-32 that changes with the names, shapes, values and order of the tensors, wherever they lie."""
    number = 0
    for name, tensor in tensors.items():
        number = zlib.crc32(_bytes_of(tensor), zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), number))
    return number


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor's values, as a buffer."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def is_as_loaded(model: nn.Module, now: str | None) -> bool:
    """True unless a model has another fingerprint now than the artifact that it came from."""
    loaded = LOADED_FINGERPRINT.of(model)
    return loaded is None or now is None or loaded == now
