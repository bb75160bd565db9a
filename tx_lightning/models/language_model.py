"""The decoder-only Transformer (GPT-2, Radford et al. 2019): ids in, logits of the next ids out.

Shapes: B batch, T length, D d_model, V vocabulary, N rows being continued.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tx_lightning.models.embeddings import Embedding, positions_for, token_table
from tx_lightning.nn.cache import KeyValueCache
from tx_lightning.nn.checks import MOST_LAYERS, check_range, check_size
from tx_lightning.nn.feed_forward import FeedForwardFactory, GELUFeedForward
from tx_lightning.nn.layers import EncoderLayer, LayeredNetwork, NormFactory, build_norm
from tx_lightning.nn.linear import Linear
from tx_lightning.nn.masks import causal_mask, combine
from tx_lightning.nn.positions import PositionsFactory


@dataclass
class LanguageModelState:
    """Everything a step needs besides the newest tokens; rows can be reordered.

    All rows have the same length.

    Attributes:
        caches: Keys and values of the window, one per layer.
        ids: (N, T), all tokens so far, also those that have left the window.
        slide: How many tokens are forgotten when the window is full; None makes that an error.
    """

    caches: list[KeyValueCache]
    ids: Tensor
    slide: int | None

    @property
    def window(self) -> int:
        """How many of the latest tokens the caches hold."""
        return self.caches[0].length

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows in place: row i becomes what row rows[i] was."""
        for cache in self.caches:
            cache.select(rows)
        self.ids = self.ids.index_select(0, rows)


class LanguageModel(LayeredNetwork):
    """A causal Transformer language model; its defaults are the 124 million parameters of GPT-2.

    Initialized as GPT-2 (Radford et al. 2019, section 2.3): matrices and embeddings normal with
    standard deviation init_std, biases 0, and the projections that end a residual sublayer scaled
    by 1 / sqrt(2 n_layers), so that the residual stream does not grow with depth.

    Args:
        vocab_size: Rows of the embedding table.
        d_model: Width of the residual stream.
        n_heads: Attention heads per layer.
        n_layers: Layers.
        d_ff: Width of the feed-forward sublayers; null for 4 d_model.
        context_length: Longest sequence; what was generated may be longer.
        dropout: Dropout on embeddings and on each sublayer's output.
        attention_dropout: Dropout on attention weights; above 0 it is slow on CPUs for sequences
            of more than 128 tokens.
        pre_norm: Norms before the sublayers instead of after the residual sums.
        positions: The position scheme, one line of YAML; null for `LearnedPositions` of
            context_length.
        norm: The norm: `torch.nn.LayerNorm` or `torch.nn.RMSNorm`.
        feed_forward: `GELUFeedForward`, `ReLUFeedForward`, `SwishFeedForward` or
            `SwiGLUFeedForward`.
        bias: Whether the projections of the attention have biases.
        tie_output: The output projection is the embedding table.
        init_std: Standard deviation of the initial weights. GPT-2's 0.02 suits its width of 768; a
            narrower network learns much faster from 0.02 sqrt(768 / d_model), which keeps the
            variance of what a matrix returns.

    Raises:
        ValueError: The position scheme is shorter than context_length.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 768,
        n_heads: int = 12,
        n_layers: int = 12,
        d_ff: int | None = None,
        context_length: int = 1024,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        pre_norm: bool = True,
        positions: PositionsFactory | None = None,
        norm: NormFactory = nn.LayerNorm,
        feed_forward: FeedForwardFactory = GELUFeedForward,
        bias: bool = True,
        tie_output: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_size("n_layers", n_layers, most=MOST_LAYERS)
        check_range("init_std", init_std, 0, 1)
        self.context_length = context_length
        self.embedding = Embedding(token_table(vocab_size, d_model, std=init_std), dropout=dropout)
        self.positions = positions_for(
            positions,
            d_model,
            n_heads,
            bidirectional=False,
            length=context_length,
            name="context_length",
        )
        self.positions.match_tokens(init_std)

        def layer() -> EncoderLayer:
            return EncoderLayer(
                d_model,
                n_heads,
                4 * d_model if d_ff is None else d_ff,
                dropout=dropout,
                attention_dropout=attention_dropout,
                pre_norm=pre_norm,
                norm=norm,
                feed_forward=feed_forward,
                bias=bias,
            )

        self.layers = cast(list[EncoderLayer], nn.ModuleList(layer() for _ in range(n_layers)))
        self.final_norm = build_norm(norm, d_model) if pre_norm else nn.Identity()
        self.output = Linear(d_model, vocab_size, bias=False)
        if tie_output:
            self.output.weight = self.embedding.tokens.weight
        self._initialize(n_layers, init_std)

    def _initialize(self, n_layers: int, std: float) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_a_sublayer = name.endswith(("self_attention.output", "feed_forward.outer"))
                scale = 1 / math.sqrt(2 * n_layers) if ends_a_sublayer else 1.0
                nn.init.normal_(module.weight, std=std * scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of what follows each of the ids (B, T)."""
        return self.output(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        """Return what the output projection is applied to, (B, T, D).

        Raises:
            ValueError: The sequence is longer than context_length.
        """
        if ids.shape[1] > self.context_length:
            raise ValueError(
                f"a sequence of {ids.shape[1]} tokens exceeds "
                f"context_length={self.context_length}: raise it or cut the text into shorter parts"
            )
        return self._transform(ids, [None for _ in self.layers], start=0)

    @property
    def output_weight(self) -> Tensor:
        """The output projection, (V, D)."""
        return self.output.weight

    @property
    def d_model(self) -> int:
        """D."""
        return self.embedding.tokens.embedding_dim

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.tokens.num_embeddings

    def start(self, n_rows: int, slide: int | None = None) -> LanguageModelState:
        """Prepare N empty rows.

        Args:
            n_rows: N.
            slide: How many of the oldest tokens to forget when context_length tokens are held and
                one more comes; the rest of the window is then computed anew. 1 keeps as much as
                there is room for, at the price of a whole window per token; half of context_length
                is cheap. None for an error instead.

        Raises:
            ValueError: slide is not between 1 and context_length.
        """
        if slide is not None and not 1 <= slide <= self.context_length:
            raise ValueError(
                f"slide must be between 1 and context_length={self.context_length}; it is {slide}"
            )
        return LanguageModelState(
            caches=[KeyValueCache() for _ in self.layers],
            ids=torch.empty(n_rows, 0, dtype=torch.long, device=self.output.weight.device),
            slide=slide,
        )

    def prefill(self, ids: Tensor, state: LanguageModelState) -> Tensor:
        """Read ids (N, T) at once; return the logits (N, V) of what follows the last one.

        Where they do not fit in the context with what the state holds, the latest context_length
        tokens are kept.

        Raises:
            ValueError: There are no ids; or they do not fit, and the state has no slide.
        """
        if ids.shape[1] == 0:
            raise ValueError("prefill needs at least one token per row; ids has length 0")
        return self._read(ids, state, kept=self.context_length)

    def step(self, tokens: Tensor, state: LanguageModelState) -> Tensor:
        """Return the logits (N, V) of what follows the newest tokens (N,); the state moves on.

        Raises:
            ValueError: The context is full, and the state has no slide.
        """
        return self._read(tokens[:, None], state, kept=self.context_length + 1 - (state.slide or 0))

    def _read(self, ids: Tensor, state: LanguageModelState, kept: int) -> Tensor:
        """Move on by ids (N, T); where they do not fit, compute the latest `kept` tokens anew."""
        fits = state.window + ids.shape[1] <= self.context_length
        if not fits and state.slide is None:
            raise ValueError(
                f"the context of {self.context_length} tokens is full: it holds {state.window}, "
                f"and {ids.shape[1]} more came; generate less, or start with a slide to forget the "
                "oldest tokens"
            )
        state.ids = torch.cat((state.ids, ids), dim=1)
        if not fits:
            state.caches = [KeyValueCache() for _ in state.caches]
            ids = state.ids[:, -kept:]
        x = self._transform(ids, state.caches, start=state.window)
        return self.output(x[:, -1])

    def _transform(self, ids: Tensor, caches: Sequence[KeyValueCache | None], start: int) -> Tensor:
        """Transform ids (B, T) that stand after `start` cached ones: -> (B, T, D)."""
        length = ids.shape[1]
        x = self.embedding(ids, self.positions, start)
        bias = self.positions.bias(length, start + length)
        causal = bias is None and start == 0  # the kernels' own mask, and the fastest
        future = None
        if not causal and length > 1:  # one query sees every key
            future = causal_mask(length, start + length, x.device)
        mask, score_bias = combine(future, bias, x)
        for layer, cache in zip(self.layers, caches, strict=True):
            if cache is not None:
                layer.self_attention.reserve(x, cache)
            x = layer(
                x,
                mask=mask,
                score_bias=score_bias,
                causal=causal,
                positions=self.positions,
                cache=cache,
            )
        return self.final_norm(x)
