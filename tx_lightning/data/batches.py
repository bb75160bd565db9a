"""Batches, and pairs of a store as padded tensors.

Shapes: B rows, S source length, T target length.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.sampler import Share
from tx_lightning.data.store import PairStore
from tx_lightning.data.tokenizers import BOS, EOS, PAD, Tokenizer, Tokenizers

Self_ = TypeVar("Self_", bound="Batch")
B_co = TypeVar("B_co", bound="Batch", covariant=True)


class Batch(ABC):
    """What every batch tells about itself; a subclass is a dataclass of tensors and numbers.

    The numbers are known where the batch is made, so that no step has to wait for a device to
    learn them. Treat a batch as immutable; it is not frozen because Lightning refuses to convert
    the tensors of frozen dataclasses.

    Attributes:
        indices: What names each row in its split.
        step_tokens: What the loss of the whole optimizer step is divided by. The loss of this batch
            is sum x parts / step_tokens.
        parts: Batches that make up the optimizer step, over all ranks.
    """

    indices: list[int]
    step_tokens: int
    parts: int

    @property
    @abstractmethod
    def loss_tokens(self) -> int:
        """The number of labels that the summed loss of this batch is over."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The tokens that `train/tokens_per_second` counts, without padding."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Positions that are computed, padding included."""

    @property
    def read_tokens(self) -> int:
        """Tokens that are read besides, by an encoder; without padding."""
        return 0

    @property
    @abstractmethod
    def padded(self) -> bool:
        """Whether a row that an encoder reads has padding."""

    @property
    def rows(self) -> int:
        """Number of rows (B)."""
        return len(self.indices)

    def describe(self) -> str:
        """Its size, for an error about memory."""
        return f"{self.rows} rows, {self.positions:,} positions"

    def to(self: Self_, device: torch.device | str, non_blocking: bool = False) -> Self_:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self_) -> Self_:
        """The same batch in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: Self_, change: Callable[[Tensor], Tensor]) -> Self_:
        named = {field.name: vars(self)[field.name] for field in fields(self)}  # type: ignore[arg-type]
        changed = {n: change(value) for n, value in named.items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]


class Batches(Protocol[B_co]):
    """Makes a batch of a share: the data set and collation of a `DataLoader` in one."""

    def __getitems__(self, share: Share) -> B_co: ...


class RowIds(NamedTuple):
    """What stands beside, before and after the tokens of a row."""

    pad: int
    bos: int
    eos: int


def real_places(lengths: Sequence[int], width: int) -> Tensor:
    """The places of tokens in a padded table, for `index_select` on its flattened rows.

    A boolean mask would do as well, but a GPU makes the host wait to learn how many are selected.

    Args:
        lengths: Tokens of each of B rows, which stand at the left.
        width: T, the width of the table.

    Returns:
        (N,) int64, places in B x T.
    """
    there = np.arange(width) < np.asarray(lengths, dtype=np.int64)[:, None]
    return torch.from_numpy(np.flatnonzero(there))


OWN_IDS = RowIds(PAD, BOS, EOS)  # those of a tokenizer trained here


def row_ids(tokenizer: Tokenizer) -> RowIds:
    """Those of a tokenizer."""
    return RowIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)


@dataclass
class TranslationBatch(Batch):
    """Padded token ids of some sentence pairs, with what a task has to know about them.

    Args:
        source: (B, S) int64: tokens, EOS, then PAD.
        target: (B, T + 1) int64: BOS, tokens, EOS, then PAD. The decoder reads `target[:, :-1]` and
            learns `target[:, 1:]`; the row of a share that is not real has nothing but PAD there.
        places: (N,) int64, the places of target tokens in the flattened `target[:, 1:]`.
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
    places: Tensor
    indices: list[int]
    source_text: list[str]
    target_text: list[str]
    step_tokens: int
    parts: int
    source_tokens: int
    target_tokens: int

    @property
    def loss_tokens(self) -> int:
        return self.target_tokens

    @property
    def tokens(self) -> int:
        return self.target_tokens

    @property
    def read_tokens(self) -> int:
        return self.source_tokens

    @property
    def padded(self) -> bool:
        return self.source_tokens < self.source.numel()

    @property
    def positions(self) -> int:
        # The decoder reads one position less than the target has.
        return self.source.numel() + self.target.numel() - self.rows

    def describe(self) -> str:
        source, target = self.source.shape[1], self.target.shape[1]
        return f"{self.rows} pairs of up to {source} and {target} tokens"


class PairBatches(Dataset[TranslationBatch]):
    """Turns shares of a sampler into batches of sentence pairs.

    Args:
        store: The pairs.
        with_text: Add the raw sentences, which scores need and training does not.
        tokenizers: Their special ids are used; those of a tokenizer trained here where None.
    """

    def __init__(
        self, store: PairStore, *, with_text: bool, tokenizers: Tokenizers | None = None
    ) -> None:
        self.store = store
        self.with_text = with_text
        self.source_ids = OWN_IDS if tokenizers is None else row_ids(tokenizers.source)
        self.target_ids = OWN_IDS if tokenizers is None else row_ids(tokenizers.target)

    def __getitems__(self, share: Share) -> TranslationBatch:
        indices = share.indices.tolist()
        source = [self.store.source(i) for i in indices]
        target = [self.store.target(i) for i in indices] if share.real else None
        source_text = [self.store.source_text(i) for i in indices] if self.with_text else []
        target_text = [self.store.target_text(i) for i in indices] if self.with_text else []
        ids = self.source_ids, self.target_ids
        return pair_batch(share, source, target, ids, (source_text, target_text))


def pair_batch(
    share: Share,
    source: Sequence[npt.NDArray[Any]],
    target: Sequence[npt.NDArray[Any]] | None,
    ids: tuple[RowIds, RowIds],
    texts: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> TranslationBatch:
    """Pad the rows of a share.

    Args:
        share: What is computed at once.
        source: Source tokens of each row, without EOS.
        target: Target tokens of each row, without BOS and EOS; None where the share is not real.
        ids: The special ids of both sides.
        texts: The untouched source and target sentences.
    """
    source_ids, target_ids = ids
    read = padded(source, source_ids)
    if target is None:
        written = torch.tensor([[target_ids.bos, target_ids.pad]])
        lengths = []
    else:
        written = padded(target, target_ids, start=True)
        lengths = [len(row) + 1 for row in target]
    return TranslationBatch(
        source=read,
        target=written,
        places=real_places(lengths, written.shape[1] - 1),
        indices=share.indices.tolist(),
        source_text=list(texts[0]),
        target_text=list(texts[1]),
        step_tokens=share.step_tokens,
        parts=share.parts,
        source_tokens=sum(map(len, source)) + len(source) if share.real else 0,
        target_tokens=sum(lengths),
    )


def padded(
    rows: Sequence[npt.NDArray[Any] | list[int]],
    ids: RowIds = OWN_IDS,
    *,
    start: bool = False,
) -> Tensor:
    """Rows of token ids as one tensor: BOS where `start`, the ids, EOS, then PAD.

    Args:
        rows: B rows of token ids.
        ids: The special ids.
        start: Put BOS first, as on the target side.

    Returns:
        (B, longest row + 1) int64; one more with `start`.
    """
    offset = 1 if start else 0
    table = np.full((len(rows), max(map(len, rows)) + 1 + offset), ids.pad, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[offset : offset + len(row)] = row
        line[offset + len(row)] = ids.eos
    if start:
        table[:, 0] = ids.bos
    return torch.from_numpy(table)


def as_collated(batch: Batch) -> Batch:
    """Collate function of a loader whose data set gives whole batches."""
    return batch
