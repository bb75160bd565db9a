"""What the data modules of all tasks share: cache, tokenizers, splits, loaders on every rank."""

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from tx_lightning.data.batches import Batch, Batches
from tx_lightning.data.cache import CacheError, Progress, build_once
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.folders import cache_folder
from tx_lightning.data.loader import BatchLoader, ResumableLoader
from tx_lightning.data.sampler import EvaluationSampler, Share, StepSampler
from tx_lightning.data.sources import Source
from tx_lightning.data.store import FORMAT, SIDES, Store, digest, store_key
from tx_lightning.data.text import decoded_lines, missing, open_binary, spooled
from tx_lightning.data.tokenizers import (
    MOST_ENTRIES,
    UNK,
    Tokenizers,
    TokenizerTrainer,
    check_capacity,
)

S = TypeVar("S", bound=Store)
B = TypeVar("B", bound=Batch)

Record = tuple[str, ...]
MOST_WORKERS = 1_000
_LEARNED_CHARACTERS = 5_000  # A longer text is not one sentence, and learning is quadratic in it.


class Place(NamedTuple):
    """Where this process stands in the run."""

    rank: int
    world_size: int
    accumulate: int
    reshuffle: bool  # overfitting a few batches means the same few in every epoch


class TextData(LightningDataModule, ABC, Generic[S, B]):
    """Text of a source, tokenized once, in batches of a budget of tokens.

    Tokenizers and token ids are kept in the cache folder and made when they are not there. Nothing
    is made twice: a tokenizer belongs to (training split, kind, vocab_size), token ids belong to
    (split, tokenizer, what is dropped or cut).

    A subclass says what a record is, how records become ids, and how ids become batches.

    Args:
        source: Where the text comes from.
        vocab_size: Rows of the embedding tables: the most entries a tokenizer may have.
        reserved: Rows at the end of the tables that are kept free of the tokenizer's entries.
        tokenizer: How the vocabulary is learned from the training split.
        batch_tokens: Budget of an optimizer step over all processes and accumulated batches.
        eval_batch_tokens: Budget of a batch in evaluation; null: `batch_tokens`.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        predict_file: Text file for prediction, a record a line; null: the test split.
        num_workers: Processes of each rank that prepare training batches.
        seed: Decides, with the epoch, the order of training.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Attributes:
        given_tokenizers: Set by whoever starts from pretrained weights: used instead of new ones.
        stores: What was opened, by split or name.
        statistics: Counts of the data, for the loggers.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    unit = "records"
    folder = "records"  # of the cache
    store_type: type[S]

    train_store: S
    val_store: S
    test_store: S
    predict_store: S
    stores: dict[str, S]
    tokenizers: Tokenizers

    def __init__(
        self,
        source: Source,
        vocab_size: int,
        *,
        reserved: int,
        tokenizer: TokenizerTrainer,
        batch_tokens: int,
        eval_batch_tokens: int | None,
        train_split: str,
        val_split: str,
        test_split: str,
        predict_file: str | None,
        num_workers: int,
        seed: int,
        cache_dir: str | None,
    ) -> None:
        super().__init__()
        # On more processes than evaluation batches, some have nothing to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        eval_batch_tokens = batch_tokens if eval_batch_tokens is None else eval_batch_tokens
        check_at_least("vocab_size", vocab_size, UNK + 2 + reserved, most=MOST_ENTRIES)
        check_at_least("batch_tokens", batch_tokens, 1)
        check_at_least("eval_batch_tokens", eval_batch_tokens, 1)
        check_at_least("num_workers", num_workers, 0, most=MOST_WORKERS)
        check_at_least("seed", seed, 0)
        self.source = source
        self.vocab_size = vocab_size
        self.reserved = reserved
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.eval_batch_tokens = eval_batch_tokens
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.predict_file = predict_file
        self.num_workers = num_workers
        self.seed = seed
        self.cache = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
        self.given_tokenizers: Tokenizers | None = None
        self._copy: Path | None = None  # of predict_file; deleted with this object
        self._planned: tuple[tuple[S, Place, int], StepSampler] | None = None
        self.statistics: dict[str, int | float | str] = {}

    # What a task's data decide.

    @abstractmethod
    def records(self, split: str) -> Iterator[Record]:
        """The texts of each record of a split."""

    @abstractmethod
    def write(self, folder: Path, split: str | None, records: Iterable[Record]) -> None:
        """Encode records into a folder of the cache; the split is None for `predict_file`."""

    @abstractmethod
    def store_settings(self, split: str | None) -> dict[str, Any] | None:
        """What, besides source and tokenizers, decides the content of a store; plain values."""

    @abstractmethod
    def train_batches(self) -> Batches[B]:
        """Makes training batches of `train_store`."""

    @abstractmethod
    def evaluation_batches(self, store: S) -> Batches[B]:
        """Makes batches for validation, test and prediction."""

    @abstractmethod
    def train_sampler(self) -> StepSampler:
        """The order of training of this rank."""

    @abstractmethod
    def evaluation_sampler(self, store: S) -> EvaluationSampler:
        """The evaluation batches of this rank."""

    @abstractmethod
    def largest_step(self, sampler: StepSampler) -> int:
        """The step whose batch needs the most memory."""

    @abstractmethod
    def example_share(self, index: int) -> Share:
        """The validation example of that number."""

    def vocabulary_texts(self) -> list[Iterable[str]]:
        """The texts of the training split that each tokenizer is learned from."""
        return [(text for record in self._learned_records() for text in record)]

    def prepare_more(self) -> None:
        """Make what else a task needs in the cache, after the tokenizers and before the stores."""

    def check(self, stores: dict[str, S]) -> None:
        """Refuse what cannot be trained on or evaluated."""

    def predict_record(self, line: str) -> Record:
        """The record of a line of `predict_file`."""
        return (line,)

    @property
    def n_examples(self) -> int:
        """Validation examples that can be shown."""
        return len(self.val_store)

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Download, learn the tokenizers, tokenize: whatever this run needs and is not there yet.

        Lightning calls it in one process of each machine.
        """
        self.source.prepare()
        stage = None if self.trainer is None else self.trainer.state.fn
        splits = self._splits(None if stage is None else stage.value)
        for split in [self.train_split, *splits]:
            self._check_split(split, stage)
        if self.given_tokenizers is None:
            build_once(self._tokenizers_folder(), self._train_tokenizers)
        self.tokenizers = self._load_tokenizers()
        self.prepare_more()
        for split in splits:
            self._build_split(split)
            counts = self.store_type(self.store_folder(split)).counts
            if split == self.train_split or counts.cut:
                print(f"{split}: {counts}", file=sys.stderr)
        if self.predict_file is not None and stage in (None, TrainerFn.PREDICTING):
            build_once(self._predict_folder(), self._write_predicted)

    def _check_split(self, split: str, stage: TrainerFn | None) -> None:
        try:
            self.source.check_split(split)
        except DataError as error:
            if stage is not TrainerFn.FITTING or split != self.val_split:
                raise
            raise DataError(
                f"{error}; to train without validation, set trainer.limit_val_batches to 0"
            ) from error

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` made.

        Args:
            stage: "fit", "validate", "test" or "predict"; None opens all there is.
        """
        self.tokenizers = self._load_tokenizers()
        if self.trainer is not None and self.trainer.world_size > 1:
            self._check_same_everywhere()
        stores = {split: self.store_type(self.store_folder(split)) for split in self._splits(stage)}
        self.stores = stores
        for split, store in stores.items():
            _check_not_empty(split, store)
        if self.train_split in stores:
            self.train_store = stores[self.train_split]
        if self.val_split in stores:
            self.val_store = stores[self.val_split]
        if self.test_split in stores:
            self.test_store = stores[self.test_split]
        if stage in (None, "predict"):
            if self.predict_file is not None:
                self.predict_store = self.store_type(self._predict_folder())
                stores[self.predict_file] = self.predict_store
            elif self.test_split in stores:
                self.predict_store = self.test_store
        self.check(stores)
        self.statistics |= self._describe(stores)

    def train_dataloader(self) -> BatchLoader[B]:
        """Micro-batches of this rank; the order is that of (seed, epoch)."""
        data, sampler = self.train_batches(), self._planned_sampler()
        if self.trainer is None:
            return BatchLoader(data, sampler, num_workers=self.num_workers, pin_memory=False)
        return ResumableLoader(
            data,
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            trainer=self.trainer,
        )

    def val_dataloader(self) -> BatchLoader[B] | list[B]:
        """The whole validation split once, over all ranks; no batches where it is not used.

        `LearningRateFinder` asks for it even then.
        """
        used = self.val_split in self.stores
        return self.evaluation_loader(self.val_store) if used else []

    def test_dataloader(self) -> Any:
        """The whole test split once, over all ranks."""
        return self.evaluation_loader(self.test_store)

    def predict_dataloader(self) -> BatchLoader[B]:
        """Every record to predict once, over all ranks; `indices` restores the order."""
        return self.evaluation_loader(self.predict_store)

    def evaluation_loader(self, store: S) -> BatchLoader[B]:
        """The records of a store once, over all ranks."""
        data, sampler = self.evaluation_batches(store), self.evaluation_sampler(store)
        return BatchLoader(data, sampler, num_workers=0, pin_memory=self._on_gpu())

    def largest_batch(self) -> B:
        """This rank's part of the training batch that needs the most memory.

        Running it first shows at once whether memory suffices.
        """
        sampler = self._planned_sampler()
        return self.train_batches().__getitems__(sampler.share(self.largest_step(sampler), turn=0))

    def _planned_sampler(self) -> StepSampler:
        """The sampler of this rank, made once, since planning takes time."""
        key = (self.train_store, self.place(), self.batch_tokens)
        if self._planned is None or self._planned[0] != key:
            self._planned = key, self.train_sampler()
        return self._planned[1]

    def example(self, index: int, store: S | None = None) -> B:
        """An example of a store, of validation where None, as a batch of its own."""
        batches = self.evaluation_batches(self.val_store if store is None else store)
        return batches.__getitems__(self.example_share(index))

    def identity(self) -> dict[str, Any]:
        """Digests of the texts of each split, references included, and of the tokenizers."""
        named = dict.fromkeys((self.train_split, self.val_split, self.test_split))
        there = self.source.splits()
        splits = {split: self._fingerprint(split) for split in named if split in there}
        return {"splits": splits, "tokenizers": self._sha256(self.tokenizers)}

    def _fingerprint(self, split: str) -> str | None:
        """Of a split, None where this run does not need it and it is not there."""
        try:
            return self.source.fingerprint(split)
        except DataError:
            return None

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizers the checkpoint belongs to."""
        return {"tokenizers": self._sha256(self.tokenizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose token ids mean something else.

        Raises:
            DataError: The checkpoint was trained with other tokenizers.
        """
        if state_dict["tokenizers"] != self._sha256(self.tokenizers):
            raise DataError(
                "the checkpoint was trained with another tokenizer than this data has; use the "
                f"data section it was trained with, and its cache folder (now {self.cache})"
            )

    # What this run needs, and where it lies.

    def _splits(self, stage: str | None) -> list[str]:
        """The splits a stage of Lightning reads; without a stage all that there are."""
        if stage == "fit" and not self._needs_validation():
            return [self.train_split]
        wanted = {
            "fit": [self.train_split, self.val_split],
            "validate": [self.val_split],
            "test": [self.test_split],
            "predict": [self.test_split] if self.predict_file is None else [],
        }
        if stage is not None:
            return wanted[stage]
        exist = self.source.splits()
        named = (self.train_split, self.val_split, self.test_split)
        return [split for split in dict.fromkeys(named) if split in exist]

    def _needs_validation(self) -> bool:
        """Whether training has validations, or the source has a split whose examples can be shown.

        A trainer without validations trains on a source without such a split.
        """
        if self.val_split in self.source.splits():
            return True
        return self.trainer is None or self.trainer.limit_val_batches != 0

    def _tokenizers_folder(self) -> Path:
        key = {
            "format": FORMAT,
            "pairs": self.source.fingerprint(self.train_split),
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size - self.reserved,
            "shared": len(self.vocabulary_texts()) == 1,
        }
        return self.cache / "tokenizers" / digest(key)

    def store_folder(self, split: str) -> Path:
        """Where the records of a split lie, or will."""
        return self._records_folder(self.source.fingerprint(split), self.store_settings(split))

    def _predict_folder(self) -> Path:
        return self._records_folder(file_sha256(self._predicted()), self.store_settings(None))

    def _predicted(self) -> Path:
        """The file to predict, or a copy where it is a pipe or the like."""
        assert self.predict_file is not None
        path = Path(self.predict_file).expanduser()
        if path.is_file():
            return path
        if not path.exists():
            raise DataError(missing(path))
        if self.place().world_size > 1:
            raise DataError(
                f"predict_file: {path} can be read only once, and there are several processes; "
                "write its content to a file and name that"
            )
        if self._copy is None:
            self._copy = spooled(path, self.cache)
            weakref.finalize(self, self._copy.unlink, missing_ok=True)
        return self._copy

    def _write_predicted(self, folder: Path) -> None:
        with open_binary(self._predicted()) as file:
            lines = decoded_lines(file, str(self.predict_file))
            self.write(folder, None, (self.predict_record(line) for line in lines))

    def _records_folder(self, fingerprint: str, settings: dict[str, Any] | None) -> Path:
        return self.cache / self.folder / store_key(fingerprint, self.tokenizers, settings)

    # Making it.

    def _train_tokenizers(self, folder: Path) -> None:
        capacity = self.vocab_size - self.reserved
        trained = [self.tokenizer.train(texts, capacity) for texts in self.vocabulary_texts()]
        for tokenizer in trained:
            check_capacity(tokenizer, self.vocab_size, self.reserved)
        texts = Tokenizers(trained[0], trained[-1]).to_dict()
        for side, text in texts.items():
            (folder / f"{side}.json").write_text(text, encoding="utf-8")

    def _learned_records(self) -> Iterator[Record]:
        """Records of the training split, without texts that are too long to learn from."""
        progress = Progress(f"learning the vocabulary from {self.train_split}", unit=self.unit)
        for record in progress(self.records(self.train_split)):
            yield tuple(text if len(text) <= _LEARNED_CHARACTERS else "" for text in record)

    def _build_split(self, split: str) -> None:
        def build(folder: Path) -> None:
            progress = Progress(f"tokenizing {split}", unit=self.unit)
            self.write(folder, split, progress(self.records(split)))

        build_once(self.store_folder(split), build, resumable=True)

    def _load_tokenizers(self) -> Tokenizers:
        tokenizers = self.given_tokenizers
        if tokenizers is None:
            folder = self._tokenizers_folder()
            try:
                texts = {
                    side: (folder / f"{side}.json").read_text(encoding="utf-8") for side in SIDES
                }
                tokenizers = Tokenizers.from_dict(texts)
            except (OSError, ValueError) as error:
                raise CacheError.damaged(folder, error) from error
        for tokenizer in (tokenizers.source, tokenizers.target):
            check_capacity(tokenizer, self.vocab_size, self.reserved)
        return tokenizers

    # Checks and numbers.

    def _check_same_everywhere(self) -> None:
        """Ranks on machines with caches of their own may have learned different vocabularies."""
        assert self.trainer is not None
        ours = self._sha256(self.tokenizers)
        same = self.trainer.strategy.broadcast(ours) == ours
        if not self.trainer.strategy.reduce_boolean_decision(same):  # Raise on all ranks or none.
            raise DataError(
                f"cache_dir: not all machines have the same tokenizer in {self.cache}; set "
                "cache_dir to a folder that they share, or copy that of rank 0"
            )

    def _describe(self, stores: dict[str, S]) -> dict[str, int | float | str]:
        numbers: dict[str, int | float | str] = {}
        for split, store in stores.items():
            if split == self.predict_file:
                continue
            numbers[f"{split}_{self.unit}"] = len(store)
            for side in store.sides:
                numbers[f"{split}_{side}_tokens"] = store.tokens[side]
            dropped = {f"{split}_dropped_{why}": n for why, n in store.counts.dropped.items()}
            if split == self.train_split or any(dropped.values()):
                numbers |= dropped
            if store.counts.cut:
                numbers[f"{split}_cut"] = store.counts.cut
        pairs = zip(SIDES, (self.tokenizers.source, self.tokenizers.target), strict=True)
        for side, tokenizer in pairs:
            numbers[f"{side}_vocabulary"] = tokenizer.vocab_size
            numbers[f"{side}_tokenizer_sha256"] = tokenizer.sha256
        return numbers

    @staticmethod
    def _sha256(tokenizers: Tokenizers) -> list[str]:
        return [tokenizers.source.sha256, tokenizers.target.sha256]

    def place(self) -> Place:
        """Where this process stands in the run."""
        trainer = self.trainer
        if trainer is None:
            return Place(rank=0, world_size=1, accumulate=1, reshuffle=True)
        return Place(
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
            reshuffle=not trainer.overfit_batches,  # type: ignore[attr-defined]
        )

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _check_not_empty(split: str, store: Store) -> None:
    if len(store) == 0:
        filtered = any(store.counts.dropped.values())
        remedy = "raise max_length or max_length_ratio" if filtered else "look at its files"
        unit = store.counts.unit
        raise DataError(f"split {split!r} has no {unit}: {store.counts}; {remedy}")
