"""The fused projection and loss against torch's cross-entropy on all logits."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tx_lightning import losses
from tx_lightning.losses import linear_cross_entropy
from tx_lightning.nn.linear import matmul_transposed

N, D, V = 11, 8, 13


class Result(NamedTuple):
    loss: Tensor
    nll: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,))


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Result:
    loss, nll = linear_cross_entropy(hidden, weight, targets, smoothing)
    return Result(loss, nll, *torch.autograd.grad(loss, (hidden, weight)))


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Result:
    logits = hidden @ weight.t()
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    nll = F.cross_entropy(logits, targets, reduction="sum").detach()
    return Result(loss, nll, *torch.autograd.grad(loss, (hidden, weight)))


@pytest.fixture(params=[1, 2, 3, N - 1, N, 100], ids=lambda rows: f"{rows} rows a chunk")
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", {"cpu": request.param * V})


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(dtype: torch.dtype, smoothing: float) -> None:
    hidden, weight, targets = inputs(dtype)
    result = ours(hidden, weight, targets, smoothing)
    expected = reference(hidden, weight, targets, smoothing)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_equals_torch(dtype: torch.dtype, smoothing: float) -> None:
    hidden, weight, targets = inputs(dtype)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    result = linear_cross_entropy(hidden, weight, targets, smoothing, bias)
    logits = hidden @ weight.t() + bias
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    nll = F.cross_entropy(logits, targets, reduction="sum").detach()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, theirs in [
        (result.loss, loss),
        (result.nll, nll),
        (
            torch.autograd.grad(result.loss * 3 / 7, (hidden, weight, bias)),
            torch.autograd.grad(loss * 3 / 7, (hidden, weight, bias)),
        ),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bias_alone_is_trained(smoothing: float) -> None:
    hidden, weight, targets = (t.detach() for t in inputs(torch.float64))

    def loss(bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, smoothing, bias).loss

    assert torch.autograd.gradcheck(loss, torch.randn(V, dtype=torch.float64, requires_grad=True))


def test_a_frozen_bias_acts_all_the_same() -> None:
    hidden, weight, targets = inputs()
    bias = torch.randn(V)
    loss = linear_cross_entropy(hidden, weight, targets, 0.1, bias).loss
    wider = torch.cat((weight, bias[:, None]), dim=1)
    ones = torch.ones(N, 1)
    expected = linear_cross_entropy(torch.cat((hidden, ones), dim=1), wider, targets, 0.1).loss
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
    )


def test_a_bias_in_bfloat16_and_autocast() -> None:
    hidden, weight, targets = inputs()
    bias = torch.randn(V, requires_grad=True)
    logits = hidden @ weight.t() + bias
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, bias)
    narrow = bias.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 0.1, bias).loss
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, 0.1, narrow).loss
    for actual, leaf in ((loss, bias), (half, narrow)):
        torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.1)
        (ours,) = torch.autograd.grad(actual, leaf)
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.float(), gradient, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_those_of_finite_differences(smoothing: float) -> None:
    hidden, weight, targets = inputs(torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, smoothing).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_loss_by_hand() -> None:
    """Two classes with probabilities 3/4 and 1/4, the first is right, a fifth is smoothed away."""
    log = torch.tensor([3.0, 1.0]).log()[:, None]
    loss, nll = linear_cross_entropy(torch.ones(1, 1), log, torch.tensor([0]), 0.2)
    expected = -(0.9 * torch.tensor(0.75).log() + 0.1 * torch.tensor(0.25).log())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, -torch.tensor(0.75).log())


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_is_close(smoothing: float) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    result = ours(hidden, weight, targets, smoothing)
    assert [t.dtype for t in result] == [torch.float32] * 2 + [torch.bfloat16] * 2
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = reference(wide[0], wide[1], targets, smoothing)
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast_is_close(smoothing: float) -> None:
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(hidden, weight, targets, smoothing)
    expected = reference(hidden, weight, targets, smoothing)
    assert all(t.dtype == torch.float32 for t in result)
    torch.testing.assert_close(result, expected, rtol=0.03, atol=0.1)
    assert not torch.equal(result.loss, expected.loss)  # the products are in bfloat16


@pytest.mark.usefixtures("_chunks")
def test_the_sum_is_the_sum_of_its_parts() -> None:
    hidden, weight, targets = inputs()
    whole = ours(hidden, weight, targets, 0.1)
    loss = torch.zeros(())
    for i in range(N):
        loss = loss + linear_cross_entropy(hidden[i : i + 1], weight, targets[i : i + 1], 0.1).loss
    torch.testing.assert_close(loss, whole.loss)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(gradients, (whole.hidden_grad, whole.weight_grad))


def test_no_tokens() -> None:
    """An empty share of a batch takes part in the backward pass all the same."""
    hidden, weight, _ = inputs()
    empty = hidden.detach()[:0].requires_grad_()
    loss, nll, hidden_grad, weight_grad = ours(empty, weight, torch.empty(0, dtype=torch.long), 0.1)
    assert loss.item() == nll.item() == 0
    assert hidden_grad.shape == (0, D)
    assert weight_grad.shape == (V, D)
    assert weight_grad.count_nonzero() == 0


def test_upstream_factor_scales_the_gradients() -> None:
    hidden, weight, targets = inputs()
    plain = ours(hidden, weight, targets, 0.1)
    loss = linear_cross_entropy(hidden, weight, targets, 0.1).loss
    gradients = torch.autograd.grad(loss * 3 / 7, (hidden, weight))
    torch.testing.assert_close(gradients[0], plain.hidden_grad * 3 / 7)
    torch.testing.assert_close(gradients[1], plain.weight_grad * 3 / 7)


def test_nll_has_no_gradient() -> None:
    result = linear_cross_entropy(*inputs(), 0.1)
    assert result.loss.requires_grad
    assert not result.nll.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(
    context: type[torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, 0.1)
    shapes = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape[0], b.shape[0]))
        return matmul_transposed(a, b)

    monkeypatch.setattr(losses, "matmul_transposed", counted)
    with context():
        result = linear_cross_entropy(hidden, weight, targets, 0.1)
        biased = linear_cross_entropy(hidden, weight, targets, 0.1, torch.randn(V).requires_grad_())
    assert shapes == [(N, V)] * 2
    assert not result.loss.requires_grad
    assert not biased.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach())
    torch.testing.assert_close(result.nll, expected.nll)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_hidden_or_weight(frozen: int) -> None:
    hidden, weight, targets = inputs()
    expected = ours(hidden, weight, targets, 0.1)
    (hidden, weight)[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, 0.1).loss.backward()
    gradients = [hidden.grad, weight.grad]
    assert gradients[frozen] is None
    torch.testing.assert_close(gradients[1 - frozen], expected[3 - frozen])


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs()
    result = ours(hidden, (1e4 * weight).detach().requires_grad_(), targets, 0.1)
    assert all(t.isfinite().all() for t in result)
