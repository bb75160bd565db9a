"""What stands before the first layer: tokens, positions and segments become vectors.

Shapes: B batch, T length, D d_model, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from tx_lightning.nn.checks import check_share, check_size
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.layers import NormFactory, build_norm
from tx_lightning.nn.positions import LearnedPositions, Positions, PositionsFactory


def token_table(
    vocab_size: int, d_model: int, *, std: float, pad_id: int | None = None
) -> nn.Embedding:
    """Return a (V, D) table of normal vectors; the row of padding is 0 and is not trained."""
    check_size("vocab_size", vocab_size)
    check_size("d_model", d_model)
    if pad_id is not None:
        check_size("pad_id", pad_id, least=0, most=vocab_size - 1)
    table = nn.Embedding(vocab_size, d_model, padding_idx=pad_id)
    nn.init.normal_(table.weight, std=std)
    if pad_id is not None:
        nn.init.zeros_(table.weight[pad_id])
    return table


def pad_with(table: nn.Embedding, pad_id: int) -> None:
    """Make another row of a table that of padding.

    In a table whose weights are still those of `token_table`, the two rows change places; trained
    weights stay as they are.

    Args:
        table: Has a row of padding.
        pad_id: The id of padding from now on.
    """
    with torch.no_grad():
        before = table.padding_idx
        if before is not None and not table.weight[before].any():
            table.weight[before] = table.weight[pad_id]
            table.weight[pad_id] = 0
    table.padding_idx = pad_id


class Embedding(nn.Module):
    """Tokens, plus positions, plus segments, then norm and dropout: (B, T) -> (B, T, D).

    Args:
        tokens: The table of tokens, (V, D); two embeddings may share one.
        dropout: Dropout on the result.
        scale: Whether tokens are multiplied by sqrt(D) (Vaswani et al. 2017, section 3.4).
        n_segments: Kinds of segments, such as first and second sentence (Devlin et al. 2019, figure
            2); 0 for none.
        norm: Builds the norm from the width, where there is one.
        token_dropout: Share of the tokens that are dropped whole, before positions are added (Iyyer
            et al. 2015, section 4.1).
    """

    def __init__(
        self,
        tokens: nn.Embedding,
        *,
        dropout: float,
        scale: bool = False,
        n_segments: int = 0,
        norm: NormFactory | None = None,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("n_segments", n_segments, least=0)
        check_share("token_dropout", token_dropout)
        d_model = tokens.embedding_dim
        self.tokens = tokens
        self.segments = nn.Embedding(n_segments, d_model) if n_segments else None
        self.norm = nn.Identity() if norm is None else build_norm(norm, d_model)
        self.dropout = Dropout(dropout)
        self.token_dropout = Dropout(token_dropout)
        self.scale = math.sqrt(d_model) if scale else 1.0

    def forward(
        self, ids: Tensor, positions: Positions, start: int = 0, segments: Tensor | None = None
    ) -> Tensor:
        """Embed ids (B, T) that begin at position `start`; segments (B, T) are all 0 where None."""
        x = self.tokens(ids) * self.scale
        if self.training and self.token_dropout.p:
            x = x * self.token_dropout(x.new_ones(*ids.shape, 1))
        x = positions.embed(x, start)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        elif segments is not None:
            raise ValueError(
                "segments were given, but n_segments is 0: set n_segments to the number of kinds"
            )
        return self.dropout(self.norm(x))


def positions_for(
    factory: PositionsFactory | None,
    d_model: int,
    n_heads: int,
    *,
    bidirectional: bool,
    length: int,
    name: str,
) -> Positions:
    """Build a position scheme that reaches `length` tokens: `LearnedPositions` where None is given.

    Args:
        factory: The scheme.
        d_model: Width of the embeddings.
        n_heads: Number of attention heads.
        bidirectional: Whether queries also see later keys.
        length: Longest sequence of the network.
        name: What the network calls `length`, for the error.

    Raises:
        ValueError: The scheme ends before `length`.
    """
    check_size(name, length)
    if factory is None:
        return LearnedPositions(d_model, n_heads, bidirectional, max_length=length)
    positions = factory(d_model, n_heads, bidirectional)
    if positions.max_length is not None and positions.max_length < length:
        raise ValueError(
            f"{type(positions).__name__} has max_length={positions.max_length}, less than "
            f"{name}={length}: raise max_length, lower {name}, or use a scheme without a limit"
        )
    return positions
