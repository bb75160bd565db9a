"""The mask convention, stated here and nowhere else: True = may attend.

A mask is boolean and broadcasts to (B, H, T, S). What a position scheme adds to the scores is a
tensor of its own, `score_bias`, because a mask of 0.0 and 1.0 would pass for one and hide nothing.
The two are combined once for all layers, see `combine`.
"""

import torch
from torch import Tensor

from tx_lightning.nn.linear import product_dtype


def check_mask(mask: Tensor | None, name: str = "mask") -> None:
    """Refuse a mask that is not boolean; its values are not read, so no device has to finish.

    Args:
        mask: What was passed.
        name: The argument it was passed as.

    Raises:
        ValueError: The mask has another type.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"{name} has type {mask.dtype}, but a mask is boolean and True where a query may "
            f"attend: pass {name}.bool(), or score_bias for what is added to the scores"
        )


def check_score_bias(score_bias: Tensor | None) -> None:
    """Refuse a score bias that is not floating point, such as a mask.

    Raises:
        ValueError: It has another type.
    """
    if score_bias is not None and not score_bias.is_floating_point():
        raise ValueError(
            f"score_bias has type {score_bias.dtype}, but it is added to the scores and must be "
            "floating point: pass a mask as mask, with .bool() unless it is boolean"
        )


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Return which keys are real tokens: ids (B, S) -> mask (B, 1, 1, S)."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Return a (T, S) mask in which the last query sees every key and no query sees its future.

    The corner is at the lower right: after S - T earlier keys, query t is token S - T + t.
    """
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return mask.tril(diagonal=key_length - query_length)


def additive_mask(mask: Tensor | None, score_bias: Tensor) -> Tensor:
    """Return a score bias, (1, H, T, S) or (B, H, T, S), that is -inf where the mask forbids.

    Raises:
        ValueError: The mask is not boolean.
    """
    check_mask(mask)
    return score_bias if mask is None else score_bias.masked_fill(~mask, float("-inf"))


def combine(
    mask: Tensor | None, score_bias: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the (mask, score_bias) that all layers of a stack share; at most one is not None.

    The bias is cast here, once, to the type of the queries that the layers compute from x; a kernel
    would cast it in every layer.

    Args:
        mask: Boolean, or None.
        score_bias: What the position scheme adds to the scores, or None.
        x: What the first layer reads.

    Raises:
        ValueError: The mask is not boolean.
    """
    if score_bias is None:
        check_mask(mask)
        return mask, None
    return None, additive_mask(mask, score_bias.to(product_dtype(x)))
