"""The bidirectional Transformer encoder (BERT, Devlin et al. 2019): ids in, vectors out.

Shapes: B batch, T length, D d_model.
"""

from typing import cast

from torch import Tensor, nn

from tx_lightning.models.embeddings import Embedding, pad_with, positions_for, token_table
from tx_lightning.nn.checks import MOST_LAYERS, check_range, check_size
from tx_lightning.nn.feed_forward import FeedForwardFactory, GELUFeedForward
from tx_lightning.nn.layers import EncoderLayer, LayeredNetwork, NormFactory, build_norm
from tx_lightning.nn.masks import combine, padding_mask
from tx_lightning.nn.positions import PositionsFactory


def initialize(module: nn.Module, std: float) -> None:
    """Draw weights as BERT does: normal with one standard deviation, biases 0.

    The row of padding is 0; norms and position schemes keep their own initialization.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=std)
            if child.padding_idx is not None:
                nn.init.zeros_(child.weight[child.padding_idx])


class TextEncoder(LayeredNetwork):
    """A Transformer encoder whose tokens see each other; its defaults are BERT base.

    The weights are drawn as BERT's, see `initialize`.

    Args:
        vocab_size: Rows of the embedding table.
        d_model: Width of the residual stream.
        n_heads: Attention heads per layer.
        n_layers: Layers.
        d_ff: Width of the feed-forward sublayers; null for 4 d_model.
        max_length: Longest sequence.
        dropout: Dropout on embeddings and on each sublayer's output.
        attention_dropout: Dropout on attention weights; above 0 it is slow on CPUs for sequences
            of more than 128 tokens.
        token_dropout: Share of the tokens whose embeddings are dropped (Iyyer et al. 2015, section
            4.1): what a classifier with few examples should not come to rely on.
        pre_norm: Norms before the sublayers instead of after the residual sums.
        positions: The position scheme, one line of YAML; null for `LearnedPositions` of max_length.
        norm: The norm: `torch.nn.LayerNorm` or `torch.nn.RMSNorm`.
        embedding_norm: Whether there is a norm on the sum of the embeddings.
        feed_forward: `GELUFeedForward`, `ReLUFeedForward`, `SwishFeedForward` or
            `SwiGLUFeedForward`.
        n_segments: Kinds of segments, such as first and second sentence; 0 for none.
        pad_id: The id of padding. It follows from the tokenizer and can be left out.
        init_std: Standard deviation of the initial weights. BERT's 0.02 suits its width of 768; a
            narrower network learns much faster from 0.02 sqrt(768 / d_model), which keeps the
            variance of what a matrix returns.

    Raises:
        ValueError: The position scheme is shorter than max_length.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 768,
        n_heads: int = 12,
        n_layers: int = 12,
        d_ff: int | None = None,
        max_length: int = 512,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        token_dropout: float = 0.0,
        pre_norm: bool = False,
        positions: PositionsFactory | None = None,
        norm: NormFactory = nn.LayerNorm,
        embedding_norm: bool = True,
        feed_forward: FeedForwardFactory = GELUFeedForward,
        n_segments: int = 2,
        pad_id: int = 0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_size("n_layers", n_layers, most=MOST_LAYERS)
        check_range("init_std", init_std, 0, 1)
        self.init_std = init_std
        self.max_length = max_length
        self.pad_id = pad_id
        self.embedding = Embedding(
            token_table(vocab_size, d_model, std=init_std, pad_id=pad_id),
            dropout=dropout,
            n_segments=n_segments,
            norm=norm if embedding_norm else None,
            token_dropout=token_dropout,
        )
        self.positions = positions_for(
            positions, d_model, n_heads, bidirectional=True, length=max_length, name="max_length"
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
            )

        self.layers = cast(list[EncoderLayer], nn.ModuleList(layer() for _ in range(n_layers)))
        self.final_norm = build_norm(norm, d_model) if pre_norm else nn.Identity()
        initialize(self, init_std)

    def forward(
        self, ids: Tensor, segments: Tensor | None = None, *, padded: bool = True
    ) -> Tensor:
        """Encode ids (B, T), padded at the right, -> (B, T, D).

        Args:
            ids: Tokens.
            segments: The segment of each token, (B, T); all 0 where None.
            padded: Whether ids may have padding. False leaves the mask out, which gives the same
                result where they have none, and lets attention use its fastest kernel.

        Raises:
            ValueError: The sequence is longer than max_length, or has segments and the network
                none.
        """
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens exceeds max_length={self.max_length}: "
                "raise it or cut the text"
            )
        x = self.embedding(ids, self.positions, segments=segments)
        mask = padding_mask(ids, self.pad_id) if padded else None
        mask, score_bias = combine(mask, self.positions.bias(length, length), x)
        for layer in self.layers:
            x = layer(x, mask=mask, score_bias=score_bias, positions=self.positions)
        return self.final_norm(x)

    def use_pad_id(self, pad_id: int) -> None:
        """Take another id for padding."""
        pad_with(self.embedding.tokens, pad_id)
        self.pad_id = pad_id

    @property
    def d_model(self) -> int:
        """D."""
        return self.embedding.tokens.embedding_dim

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.embedding.tokens.num_embeddings
