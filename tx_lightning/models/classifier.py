"""Classes of whole texts and of their tokens, on a `TextEncoder` (BERT, Devlin et al. 2019).

Shapes: B batch, T length, D d_model, C classes or tags.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tx_lightning.described import Described
from tx_lightning.models.text_encoder import TextEncoder, initialize
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.linear import Linear

EncoderFactory = Callable[[int], TextEncoder]
Pooling = Literal["cls", "mean", "max"]


def pool(x: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    """Make one vector of a text: (B, T, D) -> (B, D); a text without tokens gets 0.

    Args:
        x: Vectors of the tokens.
        real: (B, T), False where there is padding.
        pooling: "cls" for the first token, "mean" or "max" over all of them.
    """
    if pooling == "cls":
        return x[:, 0]
    keep = real[..., None]  # (B, T, 1)
    if pooling == "mean":
        return x.masked_fill(~keep, 0).sum(1) / keep.sum(1).clamp(min=1)
    return x.masked_fill(~keep, -math.inf).amax(1).masked_fill(~keep.any(1), 0)


class Classifier(Described, nn.Module):
    """One class per text: tanh(W h + b) of the pooled text, dropout, a linear head.

    Devlin et al. 2019, section 3 and figure 4; the tanh layer is BERT's pooler.

    Args:
        vocab_size: Rows of the embedding table.
        n_classes: Number of classes C.
        encoder: Builds the encoder from vocab_size.
        pooling: What stands for a text: its first token ("cls"), or the "mean" or "max" over its
            tokens.
        dropout: Dropout on what the head is applied to.

    Raises:
        ValueError: Another pooling.
    """

    def __init__(
        self,
        vocab_size: int,
        n_classes: int,
        *,
        encoder: EncoderFactory = TextEncoder,
        pooling: Pooling = "cls",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean", "max"):
            raise ValueError(f"pooling must be one of cls, mean, max; it is {pooling!r}")
        self.pooling = pooling
        self.encoder = encoder(vocab_size)
        d_model = self.encoder.d_model
        self.pooler = Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        self.head = Linear(d_model, n_classes)
        initialize(self.pooler, self.encoder.init_std)
        initialize(self.head, self.encoder.init_std)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the logits (B, C) of ids (B, T) with segments (B, T)."""
        x = self.encoder(ids, segments)
        pooled = pool(x, ids != self.encoder.pad_id, self.pooling)
        return self.head(self.dropout(torch.tanh(self.pooler(pooled))))


class Tagger(Described, nn.Module):
    """One class per token: dropout and a linear head (Devlin et al. 2019, section 5.3).

    Args:
        vocab_size: Rows of the embedding table.
        n_tags: Number of tags C.
        encoder: Builds the encoder from vocab_size.
        dropout: Dropout on what the head is applied to.
    """

    def __init__(
        self,
        vocab_size: int,
        n_tags: int,
        *,
        encoder: EncoderFactory = TextEncoder,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder(vocab_size)
        self.dropout = Dropout(dropout)
        self.head = Linear(self.encoder.d_model, n_tags)
        initialize(self.head, self.encoder.init_std)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, C) of ids (B, T) with segments (B, T)."""
        return self.head(self.dropout(self.encoder(ids, segments)))
