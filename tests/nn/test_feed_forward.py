"""Each feed-forward is the formula of its paper."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tx_lightning.nn import (
    GELUFeedForward,
    ReLUFeedForward,
    SwiGLUFeedForward,
    SwishFeedForward,
)

CLASSES = [ReLUFeedForward, GELUFeedForward, SwishFeedForward, SwiGLUFeedForward]


@pytest.mark.parametrize(
    ("block", "activation"),
    [
        (ReLUFeedForward(8, 12), lambda x: x.clamp(min=0)),
        (GELUFeedForward(8, 12), lambda x: x * torch.special.ndtr(x)),
        (GELUFeedForward(8, 12, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (SwishFeedForward(8, 12), lambda x: x / (1 + (-x).exp())),
    ],
    ids=["relu", "gelu", "gelu-tanh", "swish"],
)
def test_one_activation_between_two_matrices(
    block: ReLUFeedForward | GELUFeedForward | SwishFeedForward,
    activation: Callable[[Tensor], Tensor],
) -> None:
    nn.init.normal_(block.inner.bias)
    nn.init.normal_(block.outer.bias)
    x = torch.randn(2, 3, 8)
    hidden = activation(x @ block.inner.weight.t() + block.inner.bias)
    expected = hidden @ block.outer.weight.t() + block.outer.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_the_two_gelus_differ() -> None:
    x = torch.randn(2, 3, 8)
    exact, approximate = GELUFeedForward(8, 12), GELUFeedForward(8, 12, approximate="tanh")
    approximate.load_state_dict(exact.state_dict())
    assert not torch.equal(exact(x), approximate(x))
    torch.testing.assert_close(exact(x), approximate(x), rtol=0, atol=2e-3)


def test_swiglu() -> None:
    block, x = SwiGLUFeedForward(8, 12), torch.randn(2, 3, 8)
    gate, inner = x @ block.gate.weight.t(), x @ block.inner.weight.t()
    expected = (gate * gate.sigmoid() * inner) @ block.outer.weight.t()
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in block.named_parameters()} == {
        "gate.weight",
        "inner.weight",
        "outer.weight",
    }


def test_swiglu_at_two_thirds_has_the_parameters_of_relu() -> None:
    def matrices(block: nn.Module) -> int:
        return sum(p.numel() for p in block.parameters() if p.dim() == 2)

    assert matrices(SwiGLUFeedForward(24, 64)) == matrices(ReLUFeedForward(24, 96))


@pytest.mark.parametrize("block", CLASSES)
def test_positions_do_not_see_each_other(block: Callable[[int, int], nn.Module]) -> None:
    x, feed_forward = torch.randn(2, 5, 8), block(8, 12)
    torch.testing.assert_close(feed_forward(x)[:, 2:3], feed_forward(x[:, 2:3]))


@pytest.mark.parametrize("block", CLASSES)
def test_dropout_is_on_the_inner_activations(block: type[ReLUFeedForward]) -> None:
    x, feed_forward = torch.randn(1, 1, 8), block(8, 12, dropout=0.5)
    widths: list[int] = []
    feed_forward.dropout.register_forward_hook(lambda _, __, y: widths.append(y.shape[-1]))
    assert not torch.equal(feed_forward(x), feed_forward(x))
    assert widths == [12, 12]
    feed_forward.eval()
    assert torch.equal(feed_forward(x), feed_forward(x))


@pytest.mark.parametrize("block", CLASSES)
def test_wrong_width(block: Callable[[int, int], nn.Module]) -> None:
    with pytest.raises(RuntimeError):
        block(8, 12)(torch.randn(2, 3, 9))


@pytest.mark.parametrize("block", [ReLUFeedForward, GELUFeedForward, SwishFeedForward])
def test_without_biases_only_matrices_are_left(block: Callable[..., nn.Module]) -> None:
    made = block(8, 12, bias=False)
    assert [tuple(p.shape) for p in made.parameters()] == [(12, 8), (8, 12)]
    assert torch.equal(made(torch.zeros(1, 1, 8)), torch.zeros(1, 1, 8))
