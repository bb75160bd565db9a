"""The data of a classifier: labelled texts, or pairs of texts, in batches of like length.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.batches import Batch, RowIds, padded, row_ids
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.labelled_sources import LabelledSource
from tx_lightning.data.labels import (
    LabelFile,
    LabelSampler,
    LabelShardSampler,
    TooLong,
    check_budget,
    check_number,
    tell_too_long,
    unknown_label,
)
from tx_lightning.data.module import Record, TextData
from tx_lightning.data.plans import Lengths
from tx_lightning.data.sampler import Share, StepSampler, TokenBatchSampler
from tx_lightning.data.store import Counts, Store
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizer, TokenizerTrainer
from tx_lightning.data.writing import Encoded, Rows, Texts, write_records

TEXTS = ("text", "second")
LABEL = "label"


@dataclass
class ClassificationBatch(Batch):
    """Texts, or pairs of texts, with a label each.

    Args:
        ids: (B, T) int64: BOS, text, EOS, of a pair second text and EOS again, then PAD.
        segments: (B, T) int64: 0 up to the first EOS and in padding, 1 for the second text.
        labels: (B,) int64; IGNORED where there is none, and in the row of a share that is not real.
        indices: Position of each row in the store of its split.
        texts: The untouched text, or texts, of each row; empty in training.
        step_tokens: Labelled rows of the whole optimizer step.
        parts: Batches that make up the optimizer step, over all ranks.
        labelled: Labelled rows of this batch.
        n_tokens: Tokens, special ones included, without padding.
    """

    ids: Tensor
    segments: Tensor
    labels: Tensor
    indices: list[int]
    texts: list[tuple[str, ...]]
    step_tokens: int
    parts: int
    labelled: int
    n_tokens: int

    @property
    def loss_tokens(self) -> int:
        return self.labelled

    @property
    def tokens(self) -> int:
        return self.n_tokens

    @property
    def padded(self) -> bool:
        return self.n_tokens < self.ids.numel()

    @property
    def positions(self) -> int:
        return self.ids.numel()

    def describe(self) -> str:
        return f"{self.rows} texts of up to {self.ids.shape[1]} tokens"


class ClassificationBatches(Dataset[ClassificationBatch]):
    """Turns shares of a sampler into batches of labelled texts.

    Args:
        store: The texts and labels.
        tokenizer: Its special ids are used.
        with_text: Add the raw texts, which samples need and training does not.
    """

    def __init__(self, store: Store, tokenizer: Tokenizer, *, with_text: bool) -> None:
        self.store = store
        self.special = row_ids(tokenizer)
        self.sides = [side for side in TEXTS if side in store.sides]
        self.with_text = with_text

    def __getitems__(self, share: Share) -> ClassificationBatch:
        indices = share.indices.tolist()
        rows = [[self.store.ids(side, i).tolist() for side in self.sides] for i in indices]
        ids, segments = joined(rows, self.special)
        found = [self.store.ids(LABEL, i).tolist() for i in indices] if share.real else [[]]
        labels = [label[0] if label else IGNORED for label in found]
        shown = indices if self.with_text else []
        return ClassificationBatch(
            ids=ids,
            segments=segments,
            labels=torch.tensor(labels, dtype=torch.int64),
            indices=indices,
            texts=[tuple(self.store.text(side, i) for side in self.sides) for i in shown],
            step_tokens=share.step_tokens,
            parts=share.parts,
            labelled=sum(label != IGNORED for label in labels),
            n_tokens=sum(joined_length(row) for row in rows) if share.real else 0,
        )


def joined(rows: Sequence[Sequence[list[int]]], special: RowIds) -> tuple[Tensor, Tensor]:
    """One or two texts a row as BOS text EOS [second EOS], then PAD.

    Args:
        rows: For each of B rows the ids of its text, or of its two texts.
        special: The ids of BOS, EOS and PAD.

    Returns:
        ids (B, T), and segments (B, T): 1 for the second text and its EOS, 0 elsewhere.
    """
    separated = [[*row[0], special.eos, *row[1]] if len(row) == 2 else row[0] for row in rows]
    ids = padded(separated, special, start=True)
    segments = torch.zeros_like(ids)
    for line, row in zip(segments, rows, strict=True):
        if len(row) == 2:
            line[len(row[0]) + 2 : joined_length(row)] = 1
    return ids, segments


def joined_length(row: Sequence[Sequence[int]]) -> int:
    """Tokens of a row: those of its texts, a BOS, and an EOS each."""
    return sum(map(len, row)) + len(row) + 1


def fitting(lengths: Sequence[int], most: int) -> list[int]:
    """How many tokens each text of a row keeps, of one or two.

    Of two the longer one is cut first, down to the length of the other.

    Args:
        lengths: Tokens of each text.
        most: The most tokens of a row, special ones included.
    """
    room = most - len(lengths) - 1
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    first = min(lengths[0], max(room - lengths[1], (room + 1) // 2))
    return [first, room - first]


class ClassificationData(TextData[Store, ClassificationBatch]):
    """Labelled texts, or pairs of texts, tokenized once, in batches of a budget of tokens.

    A row is BOS, text, EOS, and of a pair the second text and EOS again. The classes are the labels
    of the training split, sorted; a label that it does not have is an error in the other splits.

    Args:
        source: Where the labelled texts come from.
        vocab_size: Rows of the embedding table: the most entries the tokenizer may have, the 4
            special ones included.
        n_classes: Number of labels in the training split.
        tokenizer: How the vocabulary is learned from the training split.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches: rows
            times the longest of them, special tokens and padding included.
        eval_batch_tokens: The same for a batch of validation, test and prediction; null:
            `batch_tokens`.
        max_length: The most tokens of a row, special ones included; at most the network's
            max_length.
        too_long: What becomes of a longer one: `cut` leaves out its end, of a pair first that of
            the longer text; `drop` leaves it out of training, while evaluation, which is over the
            whole split, cuts it; `refuse` is an error. What is cut or dropped is counted and said.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        predict_file: Text file, plain or gzip, to classify in prediction, one text a line, of a
            pair both with a tab between them; null: the texts of the test split.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Attributes:
        labels: The classes: label i is class i. There after `prepare_data` or `setup`.
        given_labels: Set by whoever starts from a trained classifier: used instead of those of the
            training split.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "examples"
    folder = "examples"
    store_type = Store
    source: LabelledSource
    labels: list[str]

    def __init__(
        self,
        source: LabelledSource,
        vocab_size: int,
        n_classes: int,
        *,
        tokenizer: TokenizerTrainer = ByteLevelBPE(),  # noqa: B008  # never changed
        batch_tokens: int = 4096,
        eval_batch_tokens: int | None = None,
        max_length: int = 256,
        too_long: TooLong = "cut",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_file: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        check_at_least("n_classes", n_classes, 2)
        check_at_least("max_length", max_length, 5)  # one token of each text of a pair
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
        self.n_classes = n_classes
        self.max_length = max_length
        self.too_long = too_long
        self.given_labels: list[str] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The sides of a record that are texts."""
        return TEXTS if self.source.pairs else TEXTS[:1]

    # Labels: kept in the cache like the tokenizers.

    def prepare_more(self) -> None:
        """Collect the labels of the training split."""
        if self.given_labels is None:
            self._label_file().make(lambda: self.source.labels(self.train_split))
        self.labels = self._load_labels()

    def setup(self, stage: str | None = None) -> None:
        self.labels = self._load_labels()
        super().setup(stage)

    def _label_file(self) -> LabelFile:
        return LabelFile(self.cache, self.source.fingerprint(self.train_split))

    def _load_labels(self) -> list[str]:
        learned = self.given_labels is None
        labels = self._label_file().read() if self.given_labels is None else self.given_labels
        check_number("n_classes", self.n_classes, labels, "labels", learned=learned)
        return labels

    def label_counts(self) -> list[int]:
        """How many training examples each class has."""
        counts = np.bincount(self.train_store.stream(LABEL), minlength=self.n_classes)
        return [int(count) for count in counts]

    # Records and ids.

    def records(self, split: str) -> Iterator[Record]:
        for example in self.source.examples(split):
            texts = (example.text,) if example.second is None else (example.text, example.second)
            yield (*texts, example.label, example.where)

    def vocabulary_texts(self) -> list[Iterable[str]]:
        n_texts = len(self.texts)
        return [(text for record in self._learned_records() for text in record[:n_texts])]

    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        tokenizer = self.tokenizers.source
        numbers = {label: number for number, label in enumerate(self.labels)}
        too_long = self._policy(split)

        def labelled() -> Iterator[Record]:
            for *texts, label, where in self._unlabelled(records) if split is None else records:
                if split is not None and label not in numbers:
                    raise unknown_label(
                        label, where, self.labels, "label", learned=self.given_labels is None
                    )
                yield (*texts, label, where)

        def encode(*columns: Texts) -> Encoded:
            *texts, labels, places = columns
            sides = [tokenizer.encode_batch(side) for side in texts]
            encoded = shortened(sides, self.max_length, too_long, places)
            encoded.sides.append([[numbers[label]] if label else [] for label in labels])
            return encoded

        counts = Counts(dropped={"too_long": 0}, unit=self.unit)
        largest = max(self.vocab_size, self.n_classes)
        write_records(folder, labelled(), [*self.texts, LABEL], encode, counts, largest=largest)

    def _unlabelled(self, records: Iterable[Record]) -> Iterator[Record]:
        """The lines of `predict_file` as records without a label."""
        for number, (line,) in enumerate(records, start=1):
            where = f"{self.predict_file}, line {number}"
            yield (*split_line(line, self.source.pairs, where), "", where)

    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        return {
            "labels": self.labels,
            "max_length": self.max_length,
            "too_long": self._policy(split),
            "texts": self.texts,
        }

    def _policy(self, split: str | None) -> TooLong:
        """Evaluation drops nothing: its scores are over the whole split."""
        return "cut" if self.too_long == "drop" and split != self.train_split else self.too_long

    def check(self, stores: dict[str, Store]) -> None:
        for split, store in stores.items():
            if split == self.train_split:
                check_budget(self.batch_tokens, int(self._lengths(store).max()))
            if self.place().rank == 0:
                tell_too_long(split, store.counts, self.max_length, self.too_long)

    def _describe(self, stores: dict[str, Store]) -> dict[str, int | float | str]:
        numbers = super()._describe(stores)
        return {name: n for name, n in numbers.items() if not name.endswith("_label_tokens")}

    # Batches.

    def _lengths(self, store: Store) -> Lengths:
        lengths = np.stack([store.lengths(side) for side in self.texts])
        return lengths.sum(0).astype(np.int32) + len(self.texts) + 1

    def train_batches(self) -> ClassificationBatches:
        return ClassificationBatches(self.train_store, self.tokenizers.source, with_text=False)

    def evaluation_batches(self, store: Store) -> ClassificationBatches:
        return ClassificationBatches(store, self.tokenizers.source, with_text=True)

    def train_sampler(self) -> LabelSampler:
        store = self.train_store
        return LabelSampler(
            self._lengths(store),
            store.lengths(LABEL),
            self.batch_tokens,
            seed=self.seed,
            place=self.place(),
        )

    def evaluation_sampler(self, store: Store) -> LabelShardSampler:
        return LabelShardSampler(
            self._lengths(store), store.lengths(LABEL), self.eval_batch_tokens, place=self.place()
        )

    def largest_step(self, sampler: StepSampler) -> int:
        assert isinstance(sampler, TokenBatchSampler)
        return sampler.largest()

    def example_share(self, index: int) -> Share:
        return Share(np.array([index]), step_tokens=1, parts=1)


def shortened(
    sides: list[Rows], max_length: int, too_long: TooLong, places: Sequence[str]
) -> Encoded:
    """Ids of texts, cut or dropped where they are too long together.

    Args:
        sides: The ids of the first texts, and of the second ones where there are.
        max_length: The most tokens of a row, special ones included.
        too_long: What to do with a longer one.
        places: Where each stands.

    Raises:
        DataError: One is too long and none may be.
    """
    encoded = Encoded(sides, reasons=[None] * len(places))
    for i, row in enumerate(zip(*sides, strict=True)):
        if joined_length(row) <= max_length:
            continue
        if too_long == "refuse":
            raise DataError(
                f"{places[i]}: {joined_length(row):,} tokens, special ones included, are more than "
                f"max_length ({max_length}); raise it, shorten the text, or set too_long to cut"
            )
        if too_long == "drop":
            encoded.reasons[i] = "too_long"
            continue
        for ids, kept in zip(row, fitting([len(ids) for ids in row], max_length), strict=True):
            del ids[kept:]
        encoded.cut += 1
    return encoded


def split_line(line: str, pairs: bool, where: str) -> list[str]:
    """The text of a line without a label, or the two texts that a tab separates.

    Raises:
        DataError: A pair has not exactly one tab.
    """
    if not pairs:
        return [line]
    texts = line.split("\t")
    if len(texts) != 2:
        raise DataError(
            f"{where} has {len(texts) - 1} tabs; exactly one separates the two texts of a pair"
        )
    return texts
