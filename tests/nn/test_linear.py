"""`linear` is torch.nn.functional.linear with all its gradients, whichever kernel does the work."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tx_lightning.nn import linear as module
from tx_lightning.nn.linear import (
    Linear,
    MatmulPrecision,
    linear,
    matmul_transposed,
    outer_sum,
    set_matmul_precision,
)

SHAPES = [(6,), (5, 6), (1, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6), (64, 6), (2, 32, 2, 6)]
needs_onednn = pytest.mark.skipif(
    not module._has_onednn(), reason="torch has no oneDNN for AVX-512"
)


def run(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor]:
    """Return the output and the gradients of a loss that weighs each of its elements."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(inputs[0], inputs[1], inputs[2] if bias is not None else None)
    factors = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * factors).sum(), inputs)]


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["mkl", "onednn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of Intel's, and on one of AMD's."""
    monkeypatch.setattr(module, "_ONEDNN", request.param)


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calling the oneDNN product becomes an error."""
    monkeypatch.setattr(module, "_OneDNNLinear", None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, ...], bias: bool, kernel: None) -> None:
    x, weight = torch.randn(shape), torch.randn(7, 6)
    b = torch.randn(7) if bias else None
    torch.testing.assert_close(run(linear, x, weight, b), run(F.linear, x, weight, b))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(32, 6, 2).transpose(1, 2),
        torch.randn(64, 12)[:, ::2],
        torch.randn(6).expand(64, 6),
    ],
    ids=["transposed", "strided", "expanded"],
)
def test_equals_torch_on_input_that_is_not_contiguous(x: Tensor, kernel: None) -> None:
    weight, bias = torch.randn(12, 6)[::2], torch.randn(6)
    torch.testing.assert_close(run(linear, x, weight, bias), run(F.linear, x, weight, bias))


@pytest.mark.parametrize("rows", [4, 64])
def test_gradient_that_is_not_contiguous(rows: int, kernel: None) -> None:
    x, weight = torch.randn(rows, 6), torch.randn(7, 6)
    grad = torch.ones(1).expand(rows, 7)  # what .sum() sends back
    for function in (linear, F.linear):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(a, w).backward(grad)
        assert a.grad is not None
        assert w.grad is not None
        torch.testing.assert_close(a.grad, weight.sum(0).expand(rows, 6))
        torch.testing.assert_close(w.grad, x.sum(0).expand(7, 6))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen: str, kernel: None) -> None:
    tensors = {"x": torch.randn(64, 6), "weight": torch.randn(7, 6), "bias": torch.randn(7)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    linear(**tensors).square().sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


@needs_onednn
def test_onednn_is_called_for_few_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch, no_onednn: None
) -> None:
    """It keeps a kernel for each shape, half a MiB."""
    monkeypatch.setattr(module, "_ONEDNN", True)
    weight = torch.randn(7, 6)
    with pytest.raises(AttributeError):
        linear(torch.randn(2, 32, 6), weight)
    x = torch.randn(65, 6)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_fall_back(dtype: torch.dtype, no_onednn: None) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((64, 6), (7, 6), (7,)))
    ours, theirs = run(linear, x, weight, bias), run(F.linear, x, weight, bias)
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_autocast_falls_back(no_onednn: None) -> None:
    x, weight = torch.randn(64, 6), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, weight), rtol=0.05, atol=0.1)


def test_cpus_without_onednn_fall_back(monkeypatch: pytest.MonkeyPatch, no_onednn: None) -> None:
    monkeypatch.setattr(module, "_ONEDNN", False)
    a, b = torch.randn(64, 6), torch.randn(7, 6)
    torch.testing.assert_close(linear(a, b), a @ b.t())
    torch.testing.assert_close(matmul_transposed(a, b), a @ b.t())


@pytest.mark.parametrize("rows", [4, 128])
@pytest.mark.parametrize("grad", [True, False])
def test_matmul_transposed_of_transposed_matrices(grad: bool, rows: int, kernel: None) -> None:
    a, b = torch.randn(6, rows).t(), torch.randn(6, 7).t()
    with nullcontext() if grad else torch.inference_mode():
        torch.testing.assert_close(matmul_transposed(a, b), a @ b.t())


@pytest.mark.parametrize("rows", [0, 1, 4, 128])
@pytest.mark.parametrize("widths", [(6, 7), (7, 6)])
def test_outer_sum(widths: tuple[int, int], rows: int, kernel: None) -> None:
    a, b = (torch.randn(rows, width) for width in widths)
    torch.testing.assert_close(outer_sum(a, b), a.t() @ b)


def test_xavier_uniform_with_zero_bias() -> None:
    layer = Linear(200, 100)
    bound = math.sqrt(6 / (200 + 100))
    assert 0.99 * bound < layer.weight.abs().max().item() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert layer.bias.count_nonzero() == 0
    assert Linear(3, 2, bias=False).bias is None


def test_layer_applies_linear() -> None:
    layer, x = Linear(6, 7), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 factors, also where the CPU has no instruction for them."""
    monkeypatch.setattr(module, "_BFLOAT16", True)
    monkeypatch.setattr(module, "_rounded", False)
    set_matmul_precision("medium", "cpu")


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16().double() @ b.bfloat16().double()).float()


@pytest.mark.parametrize("rows", [1, 50, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_medium_precision_rounds_the_factors_of_each_product(
    bias: bool, rows: int, rounded: None
) -> None:
    x, weight = torch.randn(rows, 60), torch.randn(70, 60)
    b = torch.randn(70) if bias else None
    y, *grads = run(linear, x, weight, b)
    factors = torch.linspace(-1, 1, y.numel()).view(y.shape)
    expected = [
        rounded_product(x, weight.t()),
        rounded_product(factors, weight),
        rounded_product(factors.t(), x),
    ]
    if b is not None:
        expected[0] += b
        expected.append(factors.sum(0))
    for ours, theirs in zip([y, *grads], expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=0.01)
    assert not torch.allclose(y, F.linear(x, weight, b), rtol=1e-4)
    product = matmul_transposed(x, weight)
    torch.testing.assert_close(product, rounded_product(x, weight.t()), rtol=2**-8, atol=0.01)
    torch.testing.assert_close(outer_sum(factors, x), expected[2], rtol=2**-8, atol=0.01)


@pytest.mark.parametrize(
    ("precision", "device"), [("highest", "cpu"), ("high", "cpu"), ("highest", "cuda")]
)
def test_other_precisions_are_exact_on_cpus(
    precision: MatmulPrecision, device: str, rounded: None
) -> None:
    set_matmul_precision(precision, device)
    x, weight = torch.randn(50, 60), torch.randn(70, 60)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_medium_precision_is_exact_without_the_instruction(
    rounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BFLOAT16", False)
    set_matmul_precision("medium", "cpu")
    x, weight = torch.randn(50, 60), torch.randn(70, 60)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_precision_on_cuda_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_matmul_precision("high", "cuda")
    set_matmul_precision("medium", "cpu")
    set_matmul_precision("highest", "cpu")
    assert asked == ["high"]
