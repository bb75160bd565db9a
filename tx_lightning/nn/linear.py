"""A linear layer that is Xavier-initialized and fast on CPUs.

torch multiplies float32 matrices on x86 with MKL, which does not use AVX-512 on every processor
that has it; oneDNN, which torch also ships, does. `linear` therefore calls oneDNN where the CPU
has AVX-512, with the same float32 arithmetic (`benchmarks/kernels.py` measures both). Everywhere
else (CUDA, autocast, other types, compiled code, other CPUs) it is `torch.nn.functional.linear`.

On request (`set_matmul_precision`), float32 products are taken of bfloat16 factors, which is
faster, on CPUs that have an instruction for it.

Shapes: I inputs, O outputs.
"""

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MatmulPrecision = Literal["highest", "high", "medium"]

# One kernel is made per shape, which takes time, and the batches of an epoch have more shapes than
# the default of 1024 keeps. Read by oneDNN at its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _has_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # bool() is False


_ONEDNN = _has_onednn()
_BFLOAT16 = _has_bfloat16()
_rounded = False  # whether float32 products on CPUs are taken of bfloat16 factors


def set_matmul_precision(precision: MatmulPrecision, device: str) -> None:
    """Choose how the float32 matrices of this process are multiplied.

    Args:
        precision: "highest" is exact. On CUDA the others allow what torch says of
            `torch.set_float32_matmul_precision`: TF32. On CPUs "medium" rounds the factors and
            the result of each product in `linear` and the loss to bfloat16, where the processor has
            an instruction for that; all else stays as it is.
        device: "cpu", "cuda", ...
    """
    global _rounded  # noqa: PLW0603  # of the process, as torch's own switch
    _rounded = device == "cpu" and precision == "medium" and _BFLOAT16
    if device != "cpu":  # on CPUs torch's own switch would also reach its fused attention
        torch.set_float32_matmul_precision(precision)


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T for matrices a (M, K) and b (N, K), float32 on CPU, by the fastest kernel."""
    if _rounded:
        return (a.bfloat16() @ b.bfloat16().t()).float()
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
        not (_ONEDNN or _rounded)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    function = _RoundedLinear if _rounded else _OneDNNLinear
    y: Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
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


class _RoundedLinear(torch.autograd.Function):
    """y = x W^T + b in float32, each product of bfloat16 factors: x (M, I), y (M, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        y = (x @ weight.t()).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rounded = grad.bfloat16()
        return (
            (rounded @ weight).float() if need_x else None,
            (rounded.t() @ x).float() if need_weight else None,
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
