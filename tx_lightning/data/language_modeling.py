"""The data of a language model: documents of a source, packed into blocks of one token stream."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tx_lightning.data.blocks import BlockBatch, BlockBatches, BlockSampler, Windows, WindowSampler
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.loader import BatchLoader, LoadersInTurn
from tx_lightning.data.module import Record, TextData
from tx_lightning.data.sampler import Share, StepSampler
from tx_lightning.data.store import Counts, Store
from tx_lightning.data.text_sources import TextSource
from tx_lightning.data.tokenizers import ByteLevelBPE, TokenizerTrainer
from tx_lightning.data.writing import Encoded, write_records

TEXT = "text"
_LEARNED = 4096  # characters of the pieces that a long document is learned from


class LanguageModelingData(TextData[Store, BlockBatch]):
    """Documents of a source, tokenized once into a stream that is read in fixed-length blocks.

    An end token follows each document. Training takes the stream in blocks side by side, from an
    offset that is new in each epoch, in random order. Validation takes the whole held-out stream in
    blocks that do not overlap, as nanoGPT does; test also slides a window over it.

    Args:
        source: Where the documents come from.
        vocab_size: Rows of the embedding table: the most entries the tokenizer may have, the 4
            special ones included.
        tokenizer: How the vocabulary is learned from the training split.
        block_length: Tokens that are predicted in one pass; at most the network's context_length.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches: it
            holds batch_tokens // block_length blocks.
        eval_batch_tokens: The same for a batch of validation and test; null: `batch_tokens`.
        sliding_stride: In test, tokens by which the sliding window moves on: every token has at
            least block_length - sliding_stride tokens before it. 1 gives each as many as fit, and
            costs block_length times as much as blocks that do not overlap; null: no such pass.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "documents"
    folder = "documents"
    store_type = Store
    source: TextSource

    def __init__(
        self,
        source: TextSource,
        vocab_size: int,
        *,
        tokenizer: TokenizerTrainer = ByteLevelBPE(),  # noqa: B008  # never changed
        block_length: int = 256,
        batch_tokens: int = 8192,
        eval_batch_tokens: int | None = None,
        sliding_stride: int | None = 1,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        check_at_least("block_length", block_length, 1)
        check_at_least("sliding_stride", sliding_stride or 0, 0)
        if sliding_stride is not None and not 1 <= sliding_stride <= block_length:
            raise DataError(
                f"sliding_stride is {sliding_stride}; it must be from 1 to block_length "
                f"({block_length}), or null"
            )
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
            predict_file=None,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self.block_length = block_length
        self.sliding_stride = sliding_stride

    def records(self, split: str) -> Iterator[Record]:
        return ((text,) for text in self.source.texts(split))

    def vocabulary_texts(self) -> list[Iterable[str]]:
        return [(piece for (text,) in self.records(self.train_split) for piece in pieces(text))]

    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        tokenizer = self.tokenizers.source

        def encode(texts: Sequence[str]) -> Encoded:
            return Encoded([[[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]])

        counts = Counts(unit=self.unit)
        largest = self.vocab_size
        write_records(folder, records, [TEXT], encode, counts, largest=largest, with_text=False)

    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        return {"after_each": "eos"}

    def train_batches(self) -> BlockBatches:
        return BlockBatches(self.train_store.slices(TEXT), self.block_length, self._eos_id())

    def evaluation_batches(self, store: Store) -> BlockBatches:
        return self._window_batches(store, self._side_by_side(store))

    def train_sampler(self) -> BlockSampler:
        place = self.place()
        return BlockSampler(
            self.train_store.tokens[TEXT],
            self.block_length,
            self.batch_tokens,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            accumulate=place.accumulate,
            reshuffle=place.reshuffle,
        )

    def evaluation_sampler(self, store: Store) -> WindowSampler:
        return self._window_sampler(self._side_by_side(store))

    def test_dataloader(self) -> LoadersInTurn[BlockBatch]:
        """The test split in blocks side by side, then under a sliding window."""
        loaders = [self.evaluation_loader(self.test_store)]
        if self.sliding_stride is not None:
            n_tokens = self.test_store.tokens[TEXT]
            windows = Windows.sliding(n_tokens, self.block_length, self.sliding_stride)
            loaders.append(
                BatchLoader(
                    self._window_batches(self.test_store, windows),
                    self._window_sampler(windows),
                    num_workers=0,
                    pin_memory=self._on_gpu(),
                )
            )
        return LoadersInTurn(loaders)

    def largest_step(self, sampler: StepSampler) -> int:
        return 0 if len(sampler.plan()[0]) >= len(sampler.plan()[-1]) else len(sampler.plan()) - 1

    def example_share(self, index: int) -> Share:
        return Share(np.array([index]), step_tokens=0, parts=1)

    @property
    def n_examples(self) -> int:
        return self.n_blocks(self.val_store)

    def n_blocks(self, store: Store) -> int:
        """Blocks side by side in a store."""
        return len(self._side_by_side(store))

    def evaluated_store(self, split: str) -> Store:
        """The store of `val` or `test`."""
        return self.val_store if split == "val" else self.test_store

    def bytes_per_token(self, split: str) -> float:
        """Bytes of the text of a split, in UTF-8, by the tokens that are predicted in it."""
        store = self.evaluated_store(split)
        return store.bytes[TEXT] / store.tokens[TEXT]

    def optimum(self, split: str) -> float | None:
        """The least loss that can be expected on a split, in nats a token; None where unknown."""
        name = self.val_split if split == "val" else self.test_split
        total = self.source.optimum_log_loss(name)
        return None if total is None else total / self.evaluated_store(split).tokens[TEXT]

    def _eos_id(self) -> int:
        return self.tokenizers.source.eos_id

    def _side_by_side(self, store: Store) -> Windows:
        return Windows.side_by_side(store.tokens[TEXT], self.block_length)

    def _window_batches(self, store: Store, windows: Windows) -> BlockBatches:
        return BlockBatches(store.slices(TEXT), self.block_length, self._eos_id(), windows)

    def _window_sampler(self, windows: Windows) -> WindowSampler:
        place = self.place()
        return WindowSampler(
            windows,
            self.block_length,
            self.eval_batch_tokens,
            rank=place.rank,
            world_size=place.world_size,
        )


def pieces(text: str) -> Iterator[str]:
    """A document in pieces of some lines: learning a vocabulary is quadratic in a text's length."""
    if len(text) <= _LEARNED:
        yield text
        return
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _LEARNED):
            part = line[start : start + _LEARNED]
            held.append(part)
            size += len(part)
            if size >= _LEARNED:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)
