"""A linear layer that is Xavier-initialized and fast on CPUs.

torch multiplies float32 matrices on x86 with MKL, which does not use AVX-512 on every processor
that has it; oneDNN, which torch also ships, does. `linear` therefore calls oneDNN where the CPU
has AVX-512, with the same float32 arithmetic (`benchmarks/kernels.py` measures both). Everywhere
else (CUDA, autocast, other types, compiled code, other CPUs) it is `torch.nn.functional.linear`.

Shapes: I inputs, O outputs.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# One kernel is made per shape, which takes time, and the batches of an epoch have more shapes than
# the default of 1024 keeps. Read by oneDNN at its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


_ONEDNN = _has_onednn()


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T for matrices a (M, K) and b (N, K), float32 on CPU, by the fastest kernel."""
    if _ONEDNN:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.t()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b, (N, K), for a (M, N), b (M, K). oneDNN copies what it transposes: the less."""
    if a.shape[1] <= b.shape[1]:
        return matmul_transposed(a.t(), b.t())
    return matmul_transposed(b.t(), a.t()).t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: (..., I) -> (..., O), weight (O, I), bias (O,)."""
    if (
        not _ONEDNN
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b with each of its three products done by oneDNN: x (M, I), y (M, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            matmul_transposed(grad, weight.t()) if need_x else None,
            _outer(grad, x) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class Linear(nn.Linear):
    """`torch.nn.Linear`, initialized Xavier uniform with zero bias, through `linear`.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether to add a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
