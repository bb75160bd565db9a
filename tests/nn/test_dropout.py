"""Our dropout draws 16 random bits per element on CPUs: the statistics must be those of torch."""

import math

import pytest
import torch

from tx_lightning.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_rate_scale_and_expectation(p: float) -> None:
    n = 200_000
    y = Dropout(p)(torch.ones(n))
    deviation = math.sqrt(p * (1 - p) / n)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * deviation)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - p)]), rtol=1e-3, atol=0)
    assert y.mean().item() == pytest.approx(1, abs=4 * deviation / (1 - p))


def test_the_scale_fits_the_rounded_probability() -> None:
    p = 0.3
    rounded = round(p * 2**16) / 2**16
    assert Dropout(p)(torch.ones(64)).max().item() == pytest.approx(1 / (1 - rounded), rel=1e-6)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 1000])
def test_elements_are_independent(lag: int) -> None:
    n, p = 200_000, 0.5
    dropped = (Dropout(p)(torch.ones(n)) == 0).float() - p
    correlation = (dropped[lag:] * dropped[:-lag]).mean().item() / (p * (1 - p))
    assert abs(correlation) < 4 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (5, 3), (2, 3, 4)])
def test_gradient_has_the_mask_of_the_forward_pass(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape).add(1).requires_grad_()
    y = Dropout(0.4)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (y / x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    x = torch.ones(10_000, dtype=dtype, requires_grad=True)
    y = Dropout(0.5)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == grad.dtype == dtype
    assert y.unique().tolist() == [0, 2]
    assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_input_that_is_not_contiguous() -> None:
    x = (torch.arange(12.0) + 1).view(3, 4).t().requires_grad_()
    y = Dropout(0.5)(x)
    assert all(b in (0, 2 * a) for a, b in zip(x.flatten(), y.flatten(), strict=True))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (y / x).detach())


def test_seed_gives_the_mask_and_calls_differ() -> None:
    x, dropout = torch.ones(100), Dropout(0.5)
    torch.manual_seed(7)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(7)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_identity_in_evaluation_and_at_zero() -> None:
    x = torch.ones(8)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_almost_everything_dropped() -> None:
    y = Dropout(1 - 1e-9)(torch.ones(1000))
    assert y.isfinite().all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_probability_outside_its_range(p: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, but is {p}"):
        Dropout(p)
