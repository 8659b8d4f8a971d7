"""`F.multi_head_attention_forward` with angular projections of queries, keys, values and outputs."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor, Tensor, Tensor | None, slice], Tensor]
"""(x, weight, bias, rows) -> the angular answer to F.linear(x, weight, bias), whose weight is `rows` of a parameter."""


def projections(args: tuple, kwargs: dict[str, Any]) -> list[tuple[Any, bool]]:
    """The weights of the projections in a call of `F.multi_head_attention_forward`, and whether each has a bias."""
    arguments = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    inputs = separate if arguments.get("use_separate_proj_weight") else ("in_proj_weight",)
    weights = [(arguments.get(name), arguments.get("in_proj_bias") is not None) for name in inputs]
    return [*weights, (arguments.get("out_proj_weight"), arguments.get("out_proj_bias") is not None)]


def attend(
    projection_of: Callable[[Tensor | None], Project | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of torch behind angular projections.

    Queries, keys and values are projected here. The attention itself is torch's, with the identity for its projections:
    masks, added keys and weights stay what they are, at the price of four products with an identity matrix.

    Args:
        projection_of: the angular map in place of a projection by its weight, or None where that stays plain.
        query, …, options: the arguments of `F.multi_head_attention_forward`.
    """
    separate = [options.pop(name, None) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if options.pop("use_separate_proj_weight", False):
        in_proj_weight = None  # torch does not look at it either
    together = projection_of(in_proj_weight)
    weights: Any = in_proj_weight.chunk(3) if in_proj_weight is not None else separate
    biases: Any = in_proj_bias.chunk(3) if in_proj_bias is not None else (None,) * 3
    projected = []
    for place, (x, weight, bias) in enumerate(zip((query, key, value), weights, biases, strict=True)):
        rows = slice(place * len(weight), (place + 1) * len(weight)) if together else slice(None)
        projected.append(_project(together or projection_of(weight), x, weight, bias, rows))
    identity = torch.eye(embed_dim_to_check, device=query.device, dtype=projected[0].dtype)
    output, attention = cast(Any, F.multi_head_attention_forward)(
        *projected, embed_dim_to_check, num_heads, None, None, bias_k, bias_v, add_zero_attn, dropout_p, identity, None,
        use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity,
        **options,
    )  # fmt: skip
    return _project(projection_of(out_proj_weight), output, out_proj_weight, out_proj_bias, slice(None)), attention


def _project(angular: Project | None, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    return F.linear(x, weight, bias) if angular is None else angular(x, weight, bias, rows)
