"""The data of a translation task: from a source of sentence pairs to batches on every rank."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tx_lightning.data.batches import PairBatches, TranslationBatch
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.module import Record, TextData
from tx_lightning.data.sampler import ShardSampler, Share, StepSampler, TokenBatchSampler
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.store import SIDES, PairStore
from tx_lightning.data.tokenizers import ByteLevelBPE, TokenizerTrainer
from tx_lightning.data.writing import PairFilter, write_pairs

MOST_TOKENS = 10_000  # of a sentence in evaluation: attention is quadratic in them


class TranslationData(TextData[PairStore, TranslationBatch]):
    """Sentence pairs of a source, tokenized once, in batches of a budget of tokens.

    Tokenizers and token ids are kept in the cache folder and made when they are not there. Nothing
    is made twice: a tokenizer belongs to (training split, kind, vocab_size), token ids belong to
    (split, tokenizer, filter).

    Args:
        source: Where the sentence pairs come from.
        vocab_size: Rows of the embedding tables: the most entries a tokenizer may have, the 4
            special ones included.
        tokenizer: How the vocabulary is learned from the training split.
        shared_vocabulary: Learn one vocabulary from both sides, not one for each.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches:
            pairs x the longest side among them, EOS and padding included.
        eval_batch_tokens: The same for a batch of validation, test and prediction; null:
            `batch_tokens`.
        max_length: Training pairs with more tokens on a side are dropped, and counted.
        max_length_ratio: Training pairs are dropped whose longer side has more than this many times
            the tokens of the shorter; null: none are.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        predict_file: Text file, plain or gzip, to translate in prediction, one sentence a line;
            null: the source side of the test split.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "pairs"
    folder = "pairs"
    store_type = PairStore
    source: ParallelSource

    def __init__(
        self,
        source: ParallelSource,
        vocab_size: int,
        *,
        tokenizer: TokenizerTrainer = ByteLevelBPE(),  # noqa: B008  # never changed
        shared_vocabulary: bool = True,
        batch_tokens: int = 4096,
        eval_batch_tokens: int | None = None,
        max_length: int = 256,
        max_length_ratio: float | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_file: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        check_at_least("max_length", max_length, 1)
        if max_length_ratio is not None and not 1 <= max_length_ratio < math.inf:
            raise DataError(f"max_length_ratio is {max_length_ratio}; it must be at least 1")
        super().__init__(
            source,
            vocab_size,
            reserved=0,
            tokenizer=tokenizer,
            batch_tokens=batch_tokens,
            eval_batch_tokens=eval_batch_tokens,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            predict_file=predict_file,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self.shared_vocabulary = shared_vocabulary
        self.pair_filter = PairFilter(max_length, max_length_ratio)

    def records(self, split: str) -> Iterator[Record]:
        return self.source.pairs(split)

    def vocabulary_texts(self) -> list[Iterable[str]]:
        if self.shared_vocabulary:
            return super().vocabulary_texts()
        return [
            (source for source, _ in self._learned_records()),
            (target for _, target in self._learned_records()),
        ]

    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        pairs = ((source, target) for source, target in records)
        write_pairs(folder, pairs, self.tokenizers, self._filter(split))

    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        pair_filter = self._filter(split)
        return None if pair_filter is None else asdict(pair_filter)

    def _filter(self, split: str | None) -> PairFilter | None:
        """Evaluation drops nothing: its scores are over the whole split."""
        return self.pair_filter if split == self.train_split else None

    def predict_record(self, line: str) -> Record:
        return line, ""

    def train_batches(self) -> PairBatches:
        return PairBatches(self.train_store, with_text=False, tokenizers=self.tokenizers)

    def evaluation_batches(self, store: PairStore) -> PairBatches:
        return PairBatches(store, with_text=True, tokenizers=self.tokenizers)

    def train_sampler(self) -> TokenBatchSampler:
        place = self.place()
        return TokenBatchSampler(
            self.train_store.row_lengths("source", extra=1),
            self.train_store.row_lengths("target", extra=1),
            self.batch_tokens,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            accumulate=place.accumulate,
            reshuffle=place.reshuffle,
        )

    def evaluation_sampler(self, store: PairStore) -> ShardSampler:
        place = self.place()
        return ShardSampler(
            store.source_lengths + 1,
            store.target_lengths + 1,
            self.eval_batch_tokens,
            rank=place.rank,
            world_size=place.world_size,
        )

    def largest_step(self, sampler: StepSampler) -> int:
        assert isinstance(sampler, TokenBatchSampler)
        return sampler.largest()

    def example_share(self, index: int) -> Share:
        return Share(np.array([index]), step_tokens=0, parts=1)

    def check(self, stores: dict[str, PairStore]) -> None:
        for split, store in stores.items():
            if split == self.train_split:
                self._check_budget(store)
            else:
                name = split if split == self.predict_file else f"split {split!r}"
                _check_lengths(name, store)

    def check_reach(self, source: int | None, target: int | None) -> None:
        """Refuse sentences that are longer than the positions of a network reach.

        Args:
            source: The longest sequence of the encoder, EOS included; None: there is no limit.
            target: That of the decoder, likewise.

        Raises:
            DataError: Says which sentence of which split.
        """
        for split, store in self.stores.items():
            for side, reach in zip(SIDES, (source, target), strict=True):
                longest = store.row_lengths(side).max()
                if reach is None or longest < reach:
                    continue
                if split == self.train_split:
                    where, remedy = f"split {split!r}: a {side} sentence", "lower data.max_length"
                else:
                    number = int(store.lengths(side).argmax()) + 1
                    name = split if split == self.predict_file else f"split {split!r}"
                    where, remedy = f"{name}: {side} sentence {number}", "shorten it"
                raise DataError(
                    f"{where} has {longest:,} tokens, more than the {reach - 1:,} that the "
                    f"network's positions hold (max_length {reach:,}, with the end); {remedy}, "
                    "raise max_length of the positions, or use a scheme without a limit"
                )

    def _check_budget(self, store: PairStore) -> None:
        longest = max(store.row_lengths(side, extra=1).max() for side in SIDES)
        if longest > self.batch_tokens:
            raise DataError(
                f"batch_tokens is {self.batch_tokens}, but the longest training pair has {longest} "
                "tokens on a side; raise batch_tokens or lower max_length"
            )


def _check_lengths(name: str, store: PairStore) -> None:
    """Refuse what would keep the evaluation of a whole split waiting for one sentence."""
    lengths = np.maximum(store.source_lengths, store.target_lengths)
    longest = int(lengths.argmax())
    if lengths[longest] > MOST_TOKENS:
        raise DataError(
            f"{name}: sentence {longest + 1} has {lengths[longest]:,} tokens, more than the "
            f"{MOST_TOKENS:,} that can be evaluated; split or remove it"
        )
