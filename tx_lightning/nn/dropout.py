"""Dropout (Srivastava et al. 2014), fast on CPUs: torch's own draws there one random per element,
on one thread, and costs several matrix products (`benchmarks/kernels.py`); this one draws 16 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16


class Dropout(nn.Module):
    """Zero each element with probability p when training and scale the others by 1 / (1 - p).

    On CPU p is rounded to a multiple of 2^-16, and the scale fits the rounded value.

    Args:
        p: Between 0 and 1; 1 is excluded.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, but is {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout(x: Tensor, p: float) -> Tensor:
    """Drop, as `Dropout` does when training."""
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    y: Tensor = _CPUDropout.apply(x, p)  # type: ignore[no-untyped-call]
    return y


class _CPUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = min(round(p * _LEVELS), _LEVELS - 1)  # of the 2^16 values of 16 random bits
        size = (x.numel() + 3) // 4
        bits = torch.empty(size, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        levels = bits.view(torch.int16)[: x.numel()].view(x.shape)
        scale = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ge(levels, dropped - _LEVELS // 2, out=scale).mul_(_LEVELS / (_LEVELS - dropped))
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None
