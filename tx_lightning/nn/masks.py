"""The mask convention, stated here and nowhere else: True = may attend.

A boolean mask broadcasts to (B, H, T, S). Where a position scheme adds a bias to the scores, mask
and bias become one additive float mask, -inf where attending is forbidden.
"""

import torch
from torch import Tensor


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Return which keys are real tokens: ids (B, S) -> mask (B, 1, 1, S)."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Return a (T, S) mask in which the last query sees every key and no query sees its future.

    The corner is at the lower right: after S - T earlier keys, query t is token S - T + t.
    """
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return mask.tril(diagonal=key_length - query_length)


def additive_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Add a position bias (1, H, T, S) to a boolean mask: a float mask, -inf where forbidden."""
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
