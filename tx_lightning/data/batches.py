"""Pairs of a store as padded tensors. B rows, S source length, T target length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.sampler import Share
from tx_lightning.data.store import PairStore
from tx_lightning.data.tokenizers import BOS, EOS, PAD


@dataclass(frozen=True)
class TranslationBatch:
    """Padded token ids of some sentence pairs, with what a task has to know about them.

    Args:
        source: (B, S) int64: tokens, EOS, then PAD.
        target: (B, T + 1) int64: BOS, tokens, EOS, then PAD. The decoder reads `target[:, :-1]` and
            learns `target[:, 1:]`; the row of a share that is not real has nothing but PAD there.
        indices: Position of each row in the store of its split.
        source_text: The untouched source sentences; empty in training.
        target_text: The untouched target sentences; empty in training.
        step_tokens: Target tokens, EOS included, of the whole optimizer step. The loss of this
            batch is sum x parts / step_tokens.
        parts: Batches that make up the optimizer step, over all ranks.
        source_tokens: Source tokens, EOS included, without padding.
        target_tokens: Target tokens, EOS included, without padding: the number of labels.
    """

    source: Tensor
    target: Tensor
    indices: list[int]
    source_text: list[str]
    target_text: list[str]
    step_tokens: int
    parts: int
    source_tokens: int
    target_tokens: int

    @property
    def rows(self) -> int:
        """Number of pairs (B)."""
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TranslationBatch":
        """The same batch on another device."""
        return replace(
            self,
            source=self.source.to(device, non_blocking=non_blocking),
            target=self.target.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "TranslationBatch":
        """The same batch in page-locked memory."""
        return replace(self, source=self.source.pin_memory(), target=self.target.pin_memory())


class PairBatches(Dataset[TranslationBatch]):
    """Turns shares of a sampler into batches; the data set and collation of a `DataLoader` in one.

    Args:
        store: The pairs.
        with_text: Add the raw sentences, which scores need and training does not.
    """

    def __init__(self, store: PairStore, *, with_text: bool) -> None:
        self.store = store
        self.with_text = with_text

    def __getitems__(self, share: Share) -> TranslationBatch:
        indices = share.indices.tolist()
        source = [self.store.source(i) for i in indices]
        target = [self.store.target(i) for i in indices] if share.real else []
        return TranslationBatch(
            source=padded(source),
            target=padded(target, first=BOS) if share.real else torch.tensor([[BOS, PAD]]),
            indices=indices,
            source_text=[self.store.source_text(i) for i in indices] if self.with_text else [],
            target_text=[self.store.target_text(i) for i in indices] if self.with_text else [],
            step_tokens=share.step_tokens,
            parts=share.parts,
            source_tokens=sum(map(len, source)) + len(source) if share.real else 0,
            target_tokens=sum(map(len, target)) + len(target),
        )


def padded(rows: Sequence[npt.NDArray[Any] | list[int]], first: int | None = None) -> Tensor:
    """Rows of token ids as one tensor: `first` when given, the ids, EOS, then PAD.

    Args:
        rows: B rows of token ids.
        first: BOS for the target side.

    Returns:
        (B, longest row + 1) int64; one more with `first`.
    """
    offset = 0 if first is None else 1
    ids = np.full((len(rows), max(map(len, rows)) + 1 + offset), PAD, dtype=np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[offset : offset + len(row)] = row
        line[offset + len(row)] = EOS
    if first is not None:
        ids[:, 0] = first
    return torch.from_numpy(ids)


def as_collated(batch: TranslationBatch) -> TranslationBatch:
    """Collate function of a loader whose data set gives whole batches."""
    return batch
