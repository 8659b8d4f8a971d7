"""Quantized tensors: those that hold integers and scales in place of the numbers that they stand for."""

from torch import Tensor


def is_quantized(tensor: Tensor) -> bool:
    """True for a tensor of a class with a `dequantize` of its own, as torchao's.

    Such a tensor may call itself fp32, but the numbers that it stands for must be computed from what it holds.
    """
    return type(tensor).dequantize is not Tensor.dequantize
