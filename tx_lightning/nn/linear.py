"""A linear layer that is Xavier-initialized and fast on CPUs.

torch multiplies float32 matrices on x86 with MKL, which uses AVX-512 on Intel's processors only;
oneDNN, which torch also ships, uses it on AMD's too. `linear` therefore calls oneDNN there, with
the same float32 arithmetic (`benchmarks/kernels.py` measures both). Everywhere else (CUDA,
autocast, other types, compiled code, other CPUs) it is `torch.nn.functional.linear`.

On request (`set_matmul_precision`), float32 products are taken of bfloat16 factors, which is
faster, on CPUs that have an instruction for it.

oneDNN makes a kernel for each shape, which takes a millisecond and half a MiB, and batches of text
have thousands of shapes. So it is only called for numbers of rows that are multiples of `ROWS`:
bfloat16 factors, which are copies anyway, get rows of zeros, and other float32 products go to MKL.

Shapes: I inputs, O outputs.
"""

import platform
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tx_lightning.nn.checks import check_size

MatmulPrecision = Literal["highest", "high", "medium"]

ROWS = 64


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_amd() -> bool:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return "AuthenticAMD" in platform.processor()


def _has_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # bool() is False


_ONEDNN = _has_onednn() and _is_amd()
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


def _takes_over(x: Tensor) -> bool:
    """Whether products of x are ours to choose: float32 on CPU, and not compiled."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T for matrices a (M, K) and b (N, K) by the fastest kernel there is.

    M may differ from call to call, the others should not.
    """
    if not _takes_over(a):
        return a @ b.t()
    if _rounded:
        return (_rounded_rows(a) @ b.bfloat16().t())[: len(a)].float()
    if _ONEDNN and len(a) % ROWS == 0 < len(a):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.t()


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b for matrices a (M, N) and b (M, K), as `matmul_transposed`."""
    if not _takes_over(a):
        return a.t() @ b
    if _rounded:
        return (_rounded_rows(a).t() @ _rounded_rows(b)).float()
    if _ONEDNN and len(a) % ROWS == 0 < len(a):
        return _onednn_outer_sum(a, b)
    return a.t() @ b


def _onednn_outer_sum(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] > b.shape[1]:  # oneDNN copies what it transposes: the less
        return _onednn_outer_sum(b, a).t()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a.t(), b.t(), None, "none", [], "")
    return product


def _rounded_rows(x: Tensor) -> Tensor:
    """(M, K) in bfloat16, with rows of zeros up to a multiple of ROWS."""
    rows = -(-len(x) // ROWS) * ROWS
    if rows == len(x):
        return x.bfloat16()
    padded = x.new_empty(rows, x.shape[1], dtype=torch.bfloat16)
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return padded


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: (..., I) -> (..., O), weight (O, I), bias (O,)."""
    if (
        not (_ONEDNN or _rounded)
        or not _takes_over(x)
        or weight.dtype != torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if not _rounded and len(flat) % ROWS:
        return F.linear(x, weight, bias)
    function = _RoundedLinear if _rounded else _OneDNNLinear
    y: Tensor = function.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type that matrix products of x are computed in: autocast's where it is enabled."""
    device = x.device.type
    if (
        x.dtype != torch.float64  # which autocast leaves alone
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


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
            outer_sum(grad, x) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class _RoundedLinear(torch.autograd.Function):
    """y = x W^T + b in float32, each product of bfloat16 factors: x (M, I), y (M, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n_rows = len(x)
        x, weight = _rounded_rows(x), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        y = (x @ weight.t())[:n_rows].float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rounded = _rounded_rows(grad)
        return (
            (rounded @ weight)[: len(grad)].float() if need_x else None,
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
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
