"""The encoder-decoder Transformer (Vaswani et al. 2017): ids in, logits out.

Shapes: B batch, S source length, T target length, D d_model, V vocabulary, N rows being decoded.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from tx_lightning.models.embeddings import Embedding, pad_with, token_table
from tx_lightning.nn.cache import KeyValueCache, KeyValues
from tx_lightning.nn.checks import MOST_LAYERS, check_size
from tx_lightning.nn.feed_forward import FeedForwardFactory, ReLUFeedForward
from tx_lightning.nn.layers import (
    DecoderLayer,
    EncoderLayer,
    LayeredNetwork,
    NormFactory,
    build_norm,
)
from tx_lightning.nn.linear import Linear
from tx_lightning.nn.masks import causal_mask, combine, padding_mask
from tx_lightning.nn.positions import Positions, PositionsFactory, SinusoidalPositions


@dataclass
class Memory:
    """What the encoder made of the source.

    Attributes:
        states: (B, S, D).
        mask: (B, 1, 1, S), True where the source has a token; None where nothing is padded.
    """

    states: Tensor
    mask: Tensor | None


@dataclass
class DecoderState:
    """Everything a decoding step needs besides the newest tokens; rows can be reordered.

    Attributes:
        caches: Keys and values of the target so far, one per layer.
        memories: Projected memory, one per layer, each (N, H, S, K).
        memory_mask: (N, 1, 1, S), or None where nothing is padded.
    """

    caches: list[KeyValueCache]
    memories: list[KeyValues]
    memory_mask: Tensor | None

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows in place: row i becomes what row rows[i] was.

        As long as their number stays, rows stay with their sentence, and so do the memories.
        """
        for cache in self.caches:
            cache.select(rows)
        if len(rows) == len(self.memories[0].keys):
            return
        self.memories = [memory.select(rows) for memory in self.memories]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, rows)


class Encoder(nn.Module):
    """A stack of encoder layers over a padded source; pre-norm stacks end in a norm."""

    def __init__(
        self, layers: list[EncoderLayer], positions: Positions, final_norm: nn.Module
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.positions = positions
        self.final_norm = final_norm

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        length = x.shape[1]
        mask, score_bias = combine(mask, self.positions.bias(length, length), x)
        for layer in self.layers:
            x = layer(x, mask=mask, score_bias=score_bias, positions=self.positions)
        return self.final_norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers. Padding stands at the right, so that causality hides it."""

    def __init__(
        self, layers: list[DecoderLayer], positions: Positions, final_norm: nn.Module
    ) -> None:
        super().__init__()
        self.layers = cast(list[DecoderLayer], nn.ModuleList(layers))
        self.positions = positions
        self.final_norm = final_norm

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Transform a whole target, (B, T, D) -> (B, T, D), no position seeing its future."""
        length = x.shape[1]
        bias = self.positions.bias(length, length)
        future = None if bias is None else causal_mask(length, length, x.device)
        mask, score_bias = combine(future, bias, x)
        for layer in self.layers:
            x = layer(
                x,
                memory.states,
                mask=mask,
                score_bias=score_bias,
                causal=bias is None,  # the kernels' own mask, and the fastest
                memory_mask=memory.mask,
                positions=self.positions,
            )
        return self.final_norm(x)

    def step(self, x: Tensor, state: DecoderState) -> Tensor:
        """Transform the newest position, (N, 1, D) -> (N, 1, D), given the cached earlier ones."""
        _, score_bias = combine(None, self.positions.bias(1, state.caches[0].length + 1), x)
        for layer, cache, memory in zip(self.layers, state.caches, state.memories, strict=True):
            layer.self_attention.reserve(x, cache)
            x = layer(
                x,
                memory,
                score_bias=score_bias,
                memory_mask=state.memory_mask,
                positions=self.positions,
                cache=cache,
            )
        return self.final_norm(x)


class EncoderDecoder(LayeredNetwork):
    """The Transformer of "Attention is all you need"; its defaults are the paper's base model.

    Matrices are Xavier uniform, embeddings normal with variance 1 / d_model (section 3.4 multiplies
    them by sqrt(d_model)).

    Args:
        vocab_size: Rows of each embedding table.
        d_model: Width of the residual stream.
        n_heads: Attention heads per layer.
        n_encoder_layers: Encoder layers.
        n_decoder_layers: Decoder layers.
        d_ff: Width of the feed-forward sublayers.
        dropout: Dropout on embeddings and on each sublayer's output.
        attention_dropout: Dropout on attention weights; above 0 it is slow on CPUs for sentences
            of more than 128 tokens.
        pre_norm: Norms before the sublayers instead of after the residual sums.
        positions: The position scheme, one line of YAML: `NoPositions`, `SinusoidalPositions`,
            `LearnedPositions`, `RotaryPositions`, `AlibiPositions`, `T5RelativePositions`.
        norm: The norm: `torch.nn.LayerNorm` or `torch.nn.RMSNorm`.
        feed_forward: `ReLUFeedForward`, `GELUFeedForward`, `SwishFeedForward` or
            `SwiGLUFeedForward`.
        share_embeddings: One table for source and target; needs a shared vocabulary.
        scale_embeddings: Embeddings times sqrt(d_model), as the paper does.
        embedding_norm: A norm on the sum of embeddings and positions, one per stack, as BART has
            it; null for none.
        tie_output: The output projection is the target embedding table.
        output_bias: Whether the logits have a bias, as those of BART and Marian have.
        pad_id: The id of padding. It follows from the tokenizer and can be left out.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 512,
        n_heads: int = 8,
        n_encoder_layers: int = 6,
        n_decoder_layers: int = 6,
        d_ff: int = 2048,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        pre_norm: bool = False,
        positions: PositionsFactory = SinusoidalPositions,
        norm: NormFactory = nn.LayerNorm,
        feed_forward: FeedForwardFactory = ReLUFeedForward,
        share_embeddings: bool = True,
        scale_embeddings: bool = True,
        embedding_norm: NormFactory | None = None,
        tie_output: bool = True,
        output_bias: bool = False,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_encoder_layers", n_encoder_layers, least=0, most=MOST_LAYERS)
        check_size("n_decoder_layers", n_decoder_layers, least=0, most=MOST_LAYERS)
        self.pad_id = pad_id
        self.share_embeddings = share_embeddings

        def tokens() -> nn.Embedding:
            return token_table(vocab_size, d_model, std=d_model**-0.5, pad_id=pad_id)

        def embedding(tokens: nn.Embedding) -> Embedding:
            return Embedding(tokens, dropout=dropout, scale=scale_embeddings, norm=embedding_norm)

        self.target_embedding = embedding(tokens())
        self.source_embedding = embedding(
            self.target_embedding.tokens if share_embeddings else tokens()
        )

        def encoder_layer() -> EncoderLayer:
            return EncoderLayer(
                d_model,
                n_heads,
                d_ff,
                dropout=dropout,
                attention_dropout=attention_dropout,
                pre_norm=pre_norm,
                norm=norm,
                feed_forward=feed_forward,
            )

        def decoder_layer() -> DecoderLayer:
            return DecoderLayer(
                d_model,
                n_heads,
                d_ff,
                dropout=dropout,
                attention_dropout=attention_dropout,
                pre_norm=pre_norm,
                norm=norm,
                feed_forward=feed_forward,
            )

        def final_norm() -> nn.Module:
            return build_norm(norm, d_model) if pre_norm else nn.Identity()

        self.encoder = Encoder(
            [encoder_layer() for _ in range(n_encoder_layers)],
            positions(d_model, n_heads, True),
            final_norm(),
        )
        self.decoder = Decoder(
            [decoder_layer() for _ in range(n_decoder_layers)],
            positions(d_model, n_heads, False),
            final_norm(),
        )
        for stack in (self.encoder, self.decoder):
            stack.positions.match_tokens(1.0 if scale_embeddings else d_model**-0.5)
        self.output = Linear(d_model, vocab_size, bias=output_bias)
        if tie_output:
            self.output.weight = self.target_embedding.tokens.weight
        else:
            nn.init.normal_(self.output.weight, std=d_model**-0.5)

    def forward(self, source: Tensor, target: Tensor, *, padded: bool = True) -> Tensor:
        """Return next-token logits (B, T, V) for source (B, S) and target (B, T) ids.

        Args:
            source: Padded at the right.
            target: Padded at the right.
            padded: Whether the source may have padding. False leaves its mask out, which gives the
                same result where it has none, and lets attention use its fastest kernel.
        """
        return self.output(self.hidden(source, target, padded=padded))

    def hidden(self, source: Tensor, target: Tensor, *, padded: bool = True) -> Tensor:
        """Return what the output projection is applied to, (B, T, D); arguments as `forward`."""
        memory = self.encode(source, padded=padded)
        return self.decoder(self.target_embedding(target, self.decoder.positions), memory)

    @property
    def output_weight(self) -> Tensor:
        """The output projection, (V, D)."""
        return self.output.weight

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits, (V,), where they have a bias."""
        return self.output.bias

    def use_pad_id(self, pad_id: int) -> None:
        """Take another id for padding."""
        for table in {self.source_embedding.tokens, self.target_embedding.tokens}:
            pad_with(table, pad_id)
        self.pad_id = pad_id

    def encode(self, source: Tensor, *, padded: bool = True) -> Memory:
        """Encode source ids (B, S), padded at the right; `padded` as in `forward`."""
        mask = padding_mask(source, self.pad_id) if padded else None
        x = self.source_embedding(source, self.encoder.positions)
        return Memory(self.encoder(x, mask), mask)

    def start(self, source: Tensor, *, padded: bool = True) -> DecoderState:
        """Encode source ids (B, S) and prepare one row per sentence; `padded` as in `forward`.

        Raises:
            ValueError: There is no decoder layer, so there is nothing to remember.
        """
        check_size("n_decoder_layers", len(self.decoder.layers))
        memory = self.encode(source, padded=padded)
        return DecoderState(
            caches=[KeyValueCache() for _ in self.decoder.layers],
            memories=[
                layer.cross_attention.keys_values(memory.states) for layer in self.decoder.layers
            ],
            memory_mask=memory.mask,
        )

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Return the logits (N, V) of what follows the newest tokens (N,); the state moves on."""
        start = state.caches[0].length
        x = self.target_embedding(tokens[:, None], self.decoder.positions, start)
        return self.output(self.decoder.step(x, state)[:, 0])
