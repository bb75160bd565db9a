"""Encoder and decoder blocks: their forward is their equation.

Shapes: B batch, T target or own length, S source length, D d_model.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tx_lightning.described import Described
from tx_lightning.nn.attention import MultiHeadAttention
from tx_lightning.nn.cache import KeyValueCache, KeyValues
from tx_lightning.nn.checks import check_share, check_size
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.feed_forward import FeedForwardFactory
from tx_lightning.nn.masks import check_mask
from tx_lightning.nn.positions import Positions

NormFactory = Callable[[int], nn.Module]

# Training, validation and the steps of decoding, with masks and without, batches of one sentence
# and of several: torch would give up at 8 and go on uncompiled.
_COMPILED_VARIANTS = 64


def build_norm(norm: NormFactory, d_model: int) -> nn.Module:
    """Build a norm of (B, T, D).

    Raises:
        ValueError: It cannot be applied to that, or does not keep its shape.
    """
    built = norm(d_model)
    like = next(built.parameters(), torch.empty(0))
    x = torch.zeros(1, 2, d_model, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            shape = built.eval()(x).shape
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"norm: {type(built).__name__} is no norm of (B, T, D): {why}") from error
    if shape != x.shape:
        raise ValueError(
            f"norm: {type(built).__name__} makes {tuple(shape)} of {tuple(x.shape)}; a norm keeps "
            "the shape"
        )
    return built.train()


class LayeredNetwork(Described, nn.Module):
    """A network of `EncoderLayer`s and `DecoderLayer`s; the base class of all networks."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer with `torch.compile`, to which all arguments are passed.

        Layers of a kind share the compiled code (regional compilation), and training, evaluation
        and decoding use it. Weights keep their names.
        """
        if "recompile_limit" in signature(torch.compile).parameters:  # not in older versions
            kwargs.setdefault("recompile_limit", _COMPILED_VARIANTS)
        self.compile_layers(partial(torch.compile, *args, **kwargs))

    def compile_layers(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile each layer with a function that compiles a function."""
        for module in self.modules():
            if isinstance(module, EncoderLayer | DecoderLayer):
                module._compiled_call_impl = compiler(module._call_impl)


class Residual(nn.Module):
    """A sublayer with its residual connection, dropout and norm.

    Post-norm is norm(x + dropout(sublayer(x))) (Vaswani et al. 2017, section 3.1); pre-norm is
    x + dropout(sublayer(norm(x))) (Xiong et al. 2020), which needs a norm after the last layer.

    Args:
        d_model: Width of the residual stream.
        norm: Builds the norm from the width.
        dropout: Dropout on the sublayer's output.
        pre_norm: Whether the norm stands before the sublayer.
    """

    def __init__(self, d_model: int, *, norm: NormFactory, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        check_size("d_model", d_model)
        self.norm = build_norm(norm, d_model)
        self.dropout = Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each in a residual. Also a decoder without a memory.

    Args:
        d_model: Width of the residual stream.
        n_heads: Number of attention heads.
        d_ff: Width of the feed-forward sublayer.
        dropout: Dropout on each sublayer's output.
        attention_dropout: Dropout on the attention weights.
        pre_norm: Whether norms stand before the sublayers.
        norm: Builds a norm from the width.
        feed_forward: Builds the feed-forward sublayer from d_model and d_ff.
        bias: Whether the projections of the attention have biases.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        dropout: float,
        attention_dropout: float,
        pre_norm: bool,
        norm: NormFactory,
        feed_forward: FeedForwardFactory,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_share("attention_dropout", attention_dropout)
        self.self_attention = MultiHeadAttention(
            d_model, n_heads, dropout=attention_dropout, bias=bias
        )
        self.feed_forward = feed_forward(d_model, d_ff)
        self.attention_residual = Residual(d_model, norm=norm, dropout=dropout, pre_norm=pre_norm)
        self.feed_forward_residual = Residual(
            d_model, norm=norm, dropout=dropout, pre_norm=pre_norm
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        causal: bool = False,
        positions: Positions | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Transform x (B, T, D) -> (B, T, D).

        Args:
            x: The residual stream.
            mask: Boolean, True = may attend; broadcasts to (B, H, T, T).
            score_bias: Added to the attention scores; see `masks.combine`.
            causal: Whether no query sees its future.
            positions: The scheme that rotates queries and keys.
            cache: Earlier keys and values.

        Raises:
            ValueError: The mask is not boolean.
        """

        def attend(x: Tensor) -> Tensor:
            return self.self_attention(
                x,
                mask=mask,
                score_bias=score_bias,
                causal=causal,
                positions=positions,
                cache=cache,
            )

        x = self.attention_residual(x, attend)
        return self.feed_forward_residual(x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the encoder's memory, feed-forward.

    Args:
        d_model: Width of the residual stream.
        n_heads: Number of attention heads.
        d_ff: Width of the feed-forward sublayer.
        dropout: Dropout on each sublayer's output.
        attention_dropout: Dropout on the attention weights.
        pre_norm: Whether norms stand before the sublayers.
        norm: Builds a norm from the width.
        feed_forward: Builds the feed-forward sublayer from d_model and d_ff.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        dropout: float,
        attention_dropout: float,
        pre_norm: bool,
        norm: NormFactory,
        feed_forward: FeedForwardFactory,
    ) -> None:
        super().__init__()
        check_share("attention_dropout", attention_dropout)
        self.self_attention = MultiHeadAttention(d_model, n_heads, dropout=attention_dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, dropout=attention_dropout)
        self.feed_forward = feed_forward(d_model, d_ff)
        self.self_residual, self.cross_residual, self.feed_forward_residual = (
            Residual(d_model, norm=norm, dropout=dropout, pre_norm=pre_norm) for _ in range(3)
        )

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeyValues,
        *,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        causal: bool = False,
        memory_mask: Tensor | None = None,
        positions: Positions | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Transform x (B, T, D) over a memory (B, S, D) -> (B, T, D).

        Args:
            x: The residual stream.
            memory: What cross-attention attends to.
            mask: Boolean, True = may attend; broadcasts to (B, H, T, T).
            score_bias: Added to the scores of self-attention; see `masks.combine`.
            causal: Whether no query of self-attention sees its future.
            memory_mask: Boolean, True = may attend; broadcasts to (B, H, T, S).
            positions: The scheme that rotates queries and keys of self-attention.
            cache: Earlier keys and values of self-attention.

        Raises:
            ValueError: A mask is not boolean.
        """
        check_mask(memory_mask, "memory_mask")

        def attend(x: Tensor) -> Tensor:
            return self.self_attention(
                x,
                mask=mask,
                score_bias=score_bias,
                causal=causal,
                positions=positions,
                cache=cache,
            )

        def attend_memory(x: Tensor) -> Tensor:
            return self.cross_attention(x, memory, mask=memory_mask)

        x = self.self_residual(x, attend)
        x = self.cross_residual(x, attend_memory)
        return self.feed_forward_residual(x, self.feed_forward)
