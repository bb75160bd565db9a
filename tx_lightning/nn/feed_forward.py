"""The position-wise feed-forward sublayer: (B, T, D) -> (B, T, D), one class per activation."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tx_lightning.described import Described
from tx_lightning.nn.checks import check_size
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.linear import Linear

FeedForwardFactory = Callable[[int, int], nn.Module]


class ReLUFeedForward(Described, nn.Module):
    """max(0, x W1 + b1) W2 + b2 (Vaswani et al. 2017, eq. 2).

    Args:
        d_model: Width of input and output.
        d_ff: Width in between.
        dropout: Dropout on the activations.
        bias: Whether b1 and b2 are there.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        _check(d_model, d_ff)
        self.inner = Linear(d_model, d_ff, bias=bias)
        self.outer = Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.relu(self.inner(x))))


class GELUFeedForward(Described, nn.Module):
    """GELU(x W1 + b1) W2 + b2 (Hendrycks & Gimpel 2016).

    Args:
        d_model: Width of input and output.
        d_ff: Width in between.
        dropout: Dropout on the activations.
        approximate: "none" for the exact function (BERT), "tanh" for its approximation (GPT-2).
        bias: Whether b1 and b2 are there.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        dropout: float = 0.0,
        approximate: str = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check(d_model, d_ff)
        self.inner = Linear(d_model, d_ff, bias=bias)
        self.activation = nn.GELU(approximate)
        self.outer = Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(self.activation(self.inner(x))))


class SwishFeedForward(Described, nn.Module):
    """SiLU(x W1 + b1) W2 + b2 (Ramachandran et al. 2017, with beta = 1); Marian's models use it.

    Args:
        d_model: Width of input and output.
        d_ff: Width in between.
        dropout: Dropout on the activations.
        bias: Whether b1 and b2 are there.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        _check(d_model, d_ff)
        self.inner = Linear(d_model, d_ff, bias=bias)
        self.outer = Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.silu(self.inner(x))))


class SwiGLUFeedForward(Described, nn.Module):
    """(SiLU(x W) * x V) W2, without biases (Shazeer 2020, eq. 6).

    It has three matrices: for the parameter count of the other two, set d_ff to 2/3 of theirs.

    Args:
        d_model: Width of input and output.
        d_ff: Width in between.
        dropout: Dropout on the gated activations.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check(d_model, d_ff)
        self.gate = Linear(d_model, d_ff, bias=False)
        self.inner = Linear(d_model, d_ff, bias=False)
        self.outer = Linear(d_ff, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.silu(self.gate(x)) * self.inner(x)))


def _check(d_model: int, d_ff: int) -> None:
    check_size("d_model", d_model)
    check_size("d_ff", d_ff)
