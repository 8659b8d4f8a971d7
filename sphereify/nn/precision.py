"""Dtypes, autocast and memory layouts: in which precision angles are computed, and how tensors lie in memory."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sphereify.errors import UsageError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes in which the angular maps multiply."""
LARGEST_HALF = 6e4
"""A little below 65504, the largest number of fp16."""

# ---- Dtypes


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, angles and sums of tensors of `dtype` are computed: fp32 at least."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, without an operation where it has that dtype: torch.export would record the operation."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def accumulated(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which sums over it are computed."""
    return cast(tensor, accumulate_dtype(tensor.dtype))


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which torch's own convolution would multiply x and weight, under autocast too.

    Raises:
        UsageError: x and weight differ in dtype outside of autocast, or have none of `DTYPES`.
    """
    device = x.device.type
    if autocast_is_on(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    if x.dtype is not weight.dtype:
        raise UsageError(
            f"got x of {x.dtype} and weight of {weight.dtype}, expected one dtype. Try x.to(weight.dtype)."
        )
    if x.dtype not in DTYPES:
        raise UsageError(f"got tensors of {x.dtype}, expected one of {', '.join(str(d) for d in DTYPES)}")
    return x.dtype


def fit_into(dtype: torch.dtype, x: Tensor, fan_in: int, longest: Tensor | None = None) -> Tensor:
    """x in `dtype`, where each sample whose inner products with the filters could exceed fp16's range is divided down.

    The angles of such a sample stay as they are, and so do all other samples. ε is not divided: it then counts for
    patches that are six orders of magnitude below the largest of the sample, where fp16 has no digits left either.

    Args:
        dtype: the dtype of the products.
        x: (B, ...).
        fan_in: number of elements of a filter.
        longest: the norm of the longest filter, a tensor without dimensions; None where filters have norm 1.
    """
    if dtype is not torch.float16 or x.numel() == 0:
        return cast(x, dtype)
    peak = x.detach().to(torch.float32).abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
    if longest is not None:
        peak = peak * longest
    return (x / (peak * (math.sqrt(fan_in) / LARGEST_HALF)).clamp_min(1)).to(dtype)


# ---- Autocast

# Computed at import: torch.compile cannot follow the question in torch 2.11.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")
    if torch.amp.is_autocast_available(device)
)


def autocast_is_on(device: str) -> bool:
    """True if autocast is active for a type of device; devices without autocast (meta) have it off."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> AbstractContextManager:
    """A context without autocast, which on CUDA would compute sums of squares in half precision."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


# ---- Memory

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The layout with adjacent channels, by the number of dimensions of a tensor."""


def is_channels_last(tensor: Tensor) -> bool:
    """True if the channels of a (B, C, H, W) or (B, C, D, H, W) tensor are adjacent in memory."""
    return tensor.dim() in CHANNELS_LAST and tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.dim()])


def is_dense(tensor: Tensor) -> bool:
    """True if the elements of a tensor fill its memory in one of the two layouts, contiguous or channels_last."""
    return tensor.is_contiguous() or is_channels_last(tensor)


def is_plain(tensor: Tensor) -> bool:
    """True if a tensor is what lies in its memory: it is of no subclass and not wrapped by torch.func or autograd.

    Autograd wraps gradients that it computes for a batch at once: `is_grads_batched`, `jacobian(vectorize=True)`.
    Sparse tensors, zeros without memory, and tensors that are the negative of what is stored are not plain either.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def has_values(tensor: Tensor) -> bool:
    """True if the values of a tensor can be looked at: torch.compile does not record it, nor vmap go through it."""
    return not torch.compiler.is_compiling() and is_plain(tensor)


def in_transform() -> bool:
    """True inside a transformation of `torch.func`, such as `grad` or `vmap`."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """True inside `torch.func.jvp`, `jacfwd`, `hessian` or a `dual_level`, where tensors may carry tangents.

    Every operation has to be one that torch can differentiate there, in any order of the two modes: torch runs the rule
    for tangents of an `autograd.Function` once and loses the derivatives of what the rule computes.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0  # type: ignore[attr-defined]


def runs_eagerly(*tensors: Tensor) -> bool:
    """True if operations on these tensors run at once and nothing records them, so that tensors can be overwritten.

    False while torch.compile or a tracer records the operations, for tensors inside vmap and tensor subclasses, in
    forward mode, and where gradients are recorded, as in a backward that is to be differentiated again.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not in_forward_mode()
        and not torch._C._get_tracing_state()
        and all(map(is_plain, tensors))
    )


# ---- Several processes


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over processes (a DTensor, as FSDP makes parameters); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
