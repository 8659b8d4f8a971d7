"""A fingerprint of a network's tensors, by which what was measured on it is told from what it has become since."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

FINGERPRINT_ATTRIBUTE = "loaded_fingerprint"
"""Attribute of a model that came from an artifact, with the fingerprint of the tensors that lie there."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short text that changes with any name, shape, dtype or value of the tensors, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_as_loaded(model: nn.Module, now: str | None) -> bool:
    """True unless a model has another fingerprint now than the artifact that it came from."""
    loaded = getattr(model, FINGERPRINT_ATTRIBUTE, None)
    return loaded is None or now is None or loaded == now
