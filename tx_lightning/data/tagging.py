"""The data of a tagger: sentences with a tag for each word, in batches of like length.

A word may be several tokens; its tag belongs to the first (Devlin et al. 2019, section 5.3).

Shapes: B sentences, T tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.batches import Batch, padded, row_ids
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.classification import shortened
from tx_lightning.data.errors import check_at_least
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
from tx_lightning.data.tagged_sources import TaggedSource
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizer, TokenizerTrainer
from tx_lightning.data.writing import Encoded, Rows, Texts, write_records

# The sides of a record: tokens of all words; for each token 1 + its tag, or 0 where it has none;
# the number of tags.
WORDS, TAGS, TAGGED = "words", "tags", "tagged"
_BETWEEN = "\n"  # words, and tags, of a record; no source has it in a word


@dataclass
class TaggingBatch(Batch):
    """Sentences with a tag for each word.

    Args:
        ids: (B, T) int64: BOS, the tokens of all words, EOS, then PAD.
        labels: (B, T) int64: the tag of a word at its first token, IGNORED everywhere else, and all
            over the row of a share that is not real.
        places: (N,) int64, the places of tagged words in the flattened labels.
        indices: Position of each row in the store of its split.
        words: The untouched words of each row; empty in training.
        step_tokens: Tagged words of the whole optimizer step.
        parts: Batches that make up the optimizer step, over all ranks.
        labelled: Tagged words of this batch.
        n_tokens: Tokens, special ones included, without padding.
    """

    ids: Tensor
    labels: Tensor
    places: Tensor
    indices: list[int]
    words: list[list[str]]
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
        return f"{self.rows} sentences of up to {self.ids.shape[1]} tokens"


class TaggingBatches(Dataset[TaggingBatch]):
    """Turns shares of a sampler into batches of tagged sentences.

    Args:
        store: The sentences and tags.
        tokenizer: Its special ids are used.
        with_text: Add the words, which samples need and training does not.
    """

    def __init__(self, store: Store, tokenizer: Tokenizer, *, with_text: bool) -> None:
        self.store = store
        self.special = row_ids(tokenizer)
        self.with_text = with_text

    def __getitems__(self, share: Share) -> TaggingBatch:
        indices = share.indices.tolist()
        rows = [self.store.ids(WORDS, i) for i in indices]
        ids = padded(rows, self.special, start=True)
        labels = torch.full_like(ids, IGNORED)
        if share.real:
            for line, i in zip(labels, indices, strict=True):
                marks = self.store.ids(TAGS, i).astype(np.int64)
                line[1 : len(marks) + 1] = torch.from_numpy(marks) - 1  # IGNORED where there is 0
        words = [words_of(self.store.text(WORDS, i)) for i in indices] if self.with_text else []
        places = (labels != IGNORED).flatten().nonzero()[:, 0]
        return TaggingBatch(
            ids=ids,
            labels=labels,
            places=places,
            indices=indices,
            words=words,
            step_tokens=share.step_tokens,
            parts=share.parts,
            labelled=len(places),
            n_tokens=sum(len(row) + 2 for row in rows) if share.real else 0,
        )


def words_of(text: str) -> list[str]:
    """The words of the text of a record."""
    return text.split(_BETWEEN) if text else []


class TaggingData(TextData[Store, TaggingBatch]):
    """Sentences with a tag for each word, tokenized once, in batches of a budget of tokens.

    Words are tokenized one by one; a row is BOS, the tokens of all words, EOS. The classes are the
    tags of the training split, sorted; a tag that it does not have is an error in the other splits.

    Args:
        source: Where the tagged sentences come from.
        vocab_size: Rows of the embedding table: the most entries the tokenizer may have, the 4
            special ones included.
        n_tags: Number of tags in the training split.
        tokenizer: How the vocabulary is learned from the training split.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches:
            sentences times the longest of them, special tokens and padding included.
        eval_batch_tokens: The same for a batch of validation, test and prediction; null:
            `batch_tokens`.
        max_length: The most tokens of a sentence, special ones included; at most the network's
            max_length.
        too_long: What becomes of a longer one: `cut` leaves out its end; `drop` leaves it out of
            training, while evaluation cuts it; `refuse` is an error. What is cut or dropped is
            counted and said; words that are cut off are not scored. Prediction tags them all.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        predict_file: Text file, plain or gzip, to tag in prediction, one sentence a line, with
            blanks between the words; null: the sentences of the test split.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Attributes:
        labels: The classes: tag i is class i. There after `prepare_data` or `setup`.
        given_labels: Set by whoever starts from a trained tagger: used instead of those of the
            training split.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "sentences"
    folder = "sentences"
    store_type = Store
    source: TaggedSource
    labels: list[str]

    def __init__(
        self,
        source: TaggedSource,
        vocab_size: int,
        n_tags: int,
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
        check_at_least("n_tags", n_tags, 2)
        check_at_least("max_length", max_length, 3)  # one token
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
        self.n_tags = n_tags
        self.max_length = max_length
        self.too_long = too_long
        self.given_labels: list[str] | None = None

    # Tags: kept in the cache like the tokenizers.

    def prepare_more(self) -> None:
        """Collect the tags of the training split."""
        if self.given_labels is None:
            self._label_file().make(lambda: self.source.tags(self.train_split))
        self.labels = self._load_labels()

    def setup(self, stage: str | None = None) -> None:
        self.labels = self._load_labels()
        super().setup(stage)

    def _label_file(self) -> LabelFile:
        return LabelFile(self.cache, self.source.fingerprint(self.train_split))

    def _load_labels(self) -> list[str]:
        learned = self.given_labels is None
        labels = self._label_file().read() if self.given_labels is None else self.given_labels
        check_number("n_tags", self.n_tags, labels, "tags", learned=learned)
        return labels

    # Records and ids.

    def records(self, split: str) -> Iterator[Record]:
        for sentence in self.source.sentences(split):
            yield _BETWEEN.join(sentence.words), _BETWEEN.join(sentence.tags), sentence.where

    def vocabulary_texts(self) -> list[Iterable[str]]:
        return [(record[0].replace(_BETWEEN, " ") for record in self._learned_records())]

    def predict_record(self, line: str) -> Record:
        return _BETWEEN.join(line.split()), "", ""

    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        tokenizer = self.tokenizers.source
        numbers = {tag: number for number, tag in enumerate(self.labels)}
        too_long = self._policy(split)

        def with_places() -> Iterator[Record]:
            for number, (words, tags, where) in enumerate(records, start=1):
                for tag in words_of(tags):
                    if tag not in numbers:
                        raise unknown_label(
                            tag, where, self.labels, "tag", learned=self.given_labels is None
                        )
                yield words, tags, "", where or f"{self.predict_file}, line {number}"

        def encode(words: Texts, tags: Texts, _: Texts, places: Texts) -> Encoded:
            sentences = tokenizer.encode_words([words_of(text) for text in words])
            ids = [[i for word in sentence for i in word] for sentence in sentences]
            marks = [
                _marks(sentence, [numbers[tag] for tag in words_of(text)])
                for sentence, text in zip(sentences, tags, strict=True)
            ]
            encoded = shortened([ids], self.max_length, too_long, places)
            for row, of_row in zip(ids, marks, strict=True):
                del of_row[len(row) :]
            encoded.sides += [marks, [[sum(mark > 0 for mark in row)] for row in marks]]
            return encoded

        counts = Counts(dropped={"too_long": 0}, unit=self.unit)
        largest = max(self.vocab_size, self.n_tags + 1, self.max_length)
        sides = [WORDS, TAGS, TAGGED]
        write_records(folder, with_places(), sides, encode, counts, largest=largest)

    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        return {
            "tags": self.labels,
            "max_length": self.max_length,
            "too_long": self._policy(split),
        }

    def _policy(self, split: str | None) -> TooLong:
        """Evaluation drops nothing: its scores are over the whole split."""
        return "cut" if self.too_long == "drop" and split != self.train_split else self.too_long

    def check(self, stores: dict[str, Store]) -> None:
        for split, store in stores.items():
            if split == self.train_split:
                check_budget(self.batch_tokens, int(_lengths(store).max()))
            if self.place().rank == 0:
                tell_too_long(split, store.counts, self.max_length, self.too_long)

    def _describe(self, stores: dict[str, Store]) -> dict[str, int | float | str]:
        numbers = super()._describe(stores)
        no_text = (f"_{TAGS}_tokens", f"_{TAGGED}_tokens")
        return {name: n for name, n in numbers.items() if not name.endswith(no_text)}

    # Batches.

    def train_batches(self) -> TaggingBatches:
        return TaggingBatches(self.train_store, self.tokenizers.source, with_text=False)

    def evaluation_batches(self, store: Store) -> TaggingBatches:
        return TaggingBatches(store, self.tokenizers.source, with_text=True)

    def train_sampler(self) -> LabelSampler:
        store = self.train_store
        return LabelSampler(
            _lengths(store),
            store.stream(TAGGED),
            self.batch_tokens,
            seed=self.seed,
            place=self.place(),
        )

    def evaluation_sampler(self, store: Store) -> LabelShardSampler:
        return LabelShardSampler(
            _lengths(store), store.stream(TAGGED), self.eval_batch_tokens, place=self.place()
        )

    def largest_step(self, sampler: StepSampler) -> int:
        assert isinstance(sampler, TokenBatchSampler)
        return sampler.largest()

    def example_share(self, index: int) -> Share:
        return Share(np.array([index]), step_tokens=1, parts=1)


def _lengths(store: Store) -> Lengths:
    return store.lengths(WORDS) + 2  # BOS and EOS


def _marks(words: Rows, tags: list[int]) -> list[int]:
    """For each token 1 + the tag of the word that begins there, or 0."""
    marks: list[int] = []
    for number, word in enumerate(words):
        marks += [1 + tags[number] if tags else 0, *[0] * (len(word) - 1)]
    return marks
