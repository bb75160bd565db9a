"""Texts of any length, cut into segments that fit into a network: what pretraining reads.

Texts are tokenized once and lie end to end; where they are cut depends on the longest segment, and
is worked out when they are opened.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tx_lightning.data.batches import Batch
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.language_modeling import pieces
from tx_lightning.data.module import Record, TextData
from tx_lightning.data.sampler import Share, StepSampler, TokenBatchSampler
from tx_lightning.data.store import Counts, Store
from tx_lightning.data.text_sources import TextSource
from tx_lightning.data.tokenizers import TokenizerTrainer
from tx_lightning.data.writing import Encoded, write_records

B = TypeVar("B", bound=Batch)

TEXT = "text"
AROUND = 2  # BOS before a segment and EOS after it
MOST_TOKENS = 1_000_000  # of a row
EVALUATION_SEED = 0  # what is hidden in evaluation is the same in all runs, whatever their seed


class Segments:
    """The texts of a store, each cut into parts of at most so many tokens; cheap to pickle.

    Args:
        store: The texts.
        length: Most tokens of a segment.

    Attributes:
        lengths: Tokens of each segment.
    """

    def __init__(self, store: Store, length: int) -> None:
        self.store = store
        self.length = length
        self._stream = store.slices(TEXT)
        whole = store.lengths(TEXT).astype(np.int64)
        n_parts = -(-whole // length)
        ends = np.cumsum(n_parts)
        part = np.arange(n_parts.sum()) - np.repeat(ends - n_parts, n_parts)
        self._starts = np.repeat(np.cumsum(whole) - whole, n_parts) + part * length
        left = np.repeat(whole, n_parts) - part * length
        self.lengths = np.minimum(left, length).astype(np.int32)

    def __reduce__(self) -> tuple[type["Segments"], tuple[Store, int]]:
        return Segments, (self.store, self.length)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        start = int(self._starts[index])
        return self._stream[start : start + int(self.lengths[index])]


class SegmentData(TextData[Store, B]):
    """Segments of the texts of a source: what all data of pretraining have in common.

    A subclass says what becomes of a segment.

    Args:
        source: Where the texts come from; one that does not fit into memory is read in pieces, and
            each piece is a text.
        vocab_size: Rows of the embedding table.
        reserved: Rows at its end that are kept free of the tokenizer's entries.
        tokenizer: How the vocabulary is learned from the training split.
        max_length: Most tokens of a row, BOS and EOS included; a longer text becomes several rows.
        batch_tokens: Budget of an optimizer step over all processes and accumulated batches.
        eval_batch_tokens: Budget of a batch in evaluation; null: `batch_tokens`.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        num_workers: Processes of each rank that prepare training batches.
        seed: Decides, with the epoch, the order of training and what is hidden.
        cache_dir: Folder for what is made.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "texts"
    folder = "texts"
    store_type = Store
    source: TextSource

    def __init__(
        self,
        source: TextSource,
        vocab_size: int,
        *,
        reserved: int,
        tokenizer: TokenizerTrainer,
        max_length: int,
        batch_tokens: int,
        eval_batch_tokens: int | None,
        train_split: str,
        val_split: str,
        test_split: str,
        num_workers: int,
        seed: int,
        cache_dir: str | None,
    ) -> None:
        check_at_least("max_length", max_length, AROUND + 1, most=MOST_TOKENS)
        super().__init__(
            source,
            vocab_size,
            reserved=reserved,
            tokenizer=tokenizer,
            batch_tokens=batch_tokens,
            eval_batch_tokens=eval_batch_tokens,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            predict_file=None,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        if batch_tokens < max_length:
            raise DataError(
                f"batch_tokens is {batch_tokens}, less than the longest row (max_length "
                f"{max_length}); raise batch_tokens or lower max_length"
            )
        self.max_length = max_length
        self._segments: dict[Path, Segments] = {}

    def records(self, split: str) -> Iterator[Record]:
        return ((piece.text,) for piece in self.source.pieces(split))

    def vocabulary_texts(self) -> list[Iterable[str]]:
        return [(piece for (text,) in self.records(self.train_split) for piece in pieces(text))]

    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        tokenizer = self.tokenizers.source

        def encode(texts: Sequence[str]) -> Encoded:
            rows = tokenizer.encode_batch(texts)
            return Encoded([rows], [None if row else "empty" for row in rows])

        counts = Counts(dropped={"empty": 0}, unit=self.unit)
        largest = tokenizer.vocab_size
        write_records(folder, records, [TEXT], encode, counts, largest=largest, with_text=False)

    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        return {"kept": "texts with a token"}

    def segments(self, store: Store) -> Segments:
        """The segments of a store."""
        if store.folder not in self._segments:
            self._segments[store.folder] = Segments(store, self.max_length - AROUND)
        return self._segments[store.folder]

    def check(self, stores: dict[str, Store]) -> None:
        for split, store in stores.items():
            self.statistics[f"{split}_segments"] = len(self.segments(store))

    def largest_step(self, sampler: StepSampler) -> int:
        assert isinstance(sampler, TokenBatchSampler)
        return sampler.largest()

    def example_share(self, index: int) -> Share:
        return Share(np.array([index]), step_tokens=0, parts=1)

    @property
    def n_examples(self) -> int:
        return len(self.segments(self.val_store))
