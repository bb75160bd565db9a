"""The data of a translation task: from a source of sentence pairs to batches on every rank."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from tx_lightning.data.batches import PairBatches, TranslationBatch
from tx_lightning.data.errors import DataError
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.folders import cache_folder
from tx_lightning.data.loader import BatchLoader, ResumableLoader
from tx_lightning.data.sampler import ShardSampler, TokenBatchSampler
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.store import (
    FORMAT,
    SIDES,
    CacheError,
    PairFilter,
    PairStore,
    Progress,
    build_once,
    digest,
    store_key,
    write_pairs,
)
from tx_lightning.data.text import read_lines
from tx_lightning.data.tokenizers import (
    UNK,
    ByteLevelBPE,
    Tokenizers,
    TokenizerTrainer,
    check_capacity,
)

MOST_TOKENS = 10_000  # of a sentence in evaluation: attention is quadratic in them
_LEARNED_CHARACTERS = 5_000  # A text longer than that teaches a tokenizer nothing.


class TranslationData(LightningDataModule):
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

    train_store: PairStore
    val_store: PairStore
    test_store: PairStore
    predict_store: PairStore
    tokenizers: Tokenizers

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
        super().__init__()
        # On more processes than evaluation batches, some have nothing to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        eval_batch_tokens = batch_tokens if eval_batch_tokens is None else eval_batch_tokens
        _check_at_least("vocab_size", vocab_size, UNK + 2)
        _check_at_least("batch_tokens", batch_tokens, 1)
        _check_at_least("eval_batch_tokens", eval_batch_tokens, 1)
        _check_at_least("max_length", max_length, 1)
        _check_at_least("max_length_ratio", max_length_ratio or 1, 1)
        _check_at_least("num_workers", num_workers, 0)
        _check_at_least("seed", seed, 0)
        self.source = source
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.shared_vocabulary = shared_vocabulary
        self.batch_tokens = batch_tokens
        self.eval_batch_tokens = eval_batch_tokens
        self.pair_filter = PairFilter(max_length, max_length_ratio)
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.predict_file = predict_file
        self.num_workers = num_workers
        self.seed = seed
        self.cache = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
        self.statistics: dict[str, int | float | str] = {}

    def prepare_data(self) -> None:
        """Download, learn the tokenizers, tokenize: whatever this run needs and is not there yet.

        Lightning calls it in one process of each machine.
        """
        self.source.prepare()
        stage = None if self.trainer is None else self.trainer.state.fn
        splits = self._splits(None if stage is None else stage.value)
        for split in [self.train_split, *splits]:
            self.source.check_split(split)
        build_once(self._tokenizers_folder(), self._train_tokenizers)
        tokenizers = self._load_tokenizers()
        for split in splits:
            self._build_split(split, tokenizers)
            counts = PairStore(self._store_folder(split, tokenizers)).counts
            if split == self.train_split:
                print(f"{split}: {counts}", file=sys.stderr)
        if self.predict_file is not None and stage in (None, TrainerFn.PREDICTING):
            build_once(
                self._predict_folder(tokenizers),
                lambda folder: write_pairs(folder, self._predict_pairs(), tokenizers, None),
            )

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` made.

        Args:
            stage: "fit", "validate", "test" or "predict"; None opens all there is.
        """
        self.tokenizers = self._load_tokenizers()
        if self.trainer is not None and self.trainer.world_size > 1:
            self._check_same_everywhere()
        stores = {
            split: PairStore(self._store_folder(split, self.tokenizers))
            for split in self._splits(stage)
        }
        for split, store in stores.items():
            _check_not_empty(split, store)
            if split != self.train_split:
                _check_lengths(f"split {split!r}", store)
        if self.train_split in stores:
            self.train_store = stores[self.train_split]
            self._check_budget()
        if self.val_split in stores:
            self.val_store = stores[self.val_split]
        if self.test_split in stores:
            self.test_store = stores[self.test_split]
        if stage in (None, "predict"):
            if self.predict_file is not None:
                self.predict_store = PairStore(self._predict_folder(self.tokenizers))
                _check_lengths(self.predict_file, self.predict_store)
            elif self.test_split in stores:
                self.predict_store = self.test_store
        self.statistics |= self._describe(stores)

    def train_dataloader(self) -> BatchLoader:
        """Micro-batches of this rank; the order is that of (seed, epoch)."""
        data, sampler = PairBatches(self.train_store, with_text=False), self._train_sampler()
        if self.trainer is None:
            return BatchLoader(data, sampler, num_workers=self.num_workers, pin_memory=False)
        return ResumableLoader(
            data,
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            trainer=self.trainer,
        )

    def val_dataloader(self) -> BatchLoader:
        """Every pair of the validation split once, over all ranks."""
        return self._evaluation_loader(self.val_store)

    def test_dataloader(self) -> BatchLoader:
        """Every pair of the test split once, over all ranks."""
        return self._evaluation_loader(self.test_store)

    def predict_dataloader(self) -> BatchLoader:
        """Every sentence to translate once, over all ranks; `indices` restores the order."""
        return self._evaluation_loader(self.predict_store)

    def largest_batch(self) -> TranslationBatch:
        """This rank's part of the training batch with the most tokens, padding included.

        Running it first shows at once whether memory suffices.
        """
        sampler = self._train_sampler()
        plan = sampler.plan()
        widths = np.maximum(sampler.source_lengths, sampler.target_lengths)[plan.order]
        widest = np.maximum.reduceat(widths, plan.starts[:-1])
        largest = int(np.lexsort((widest, np.diff(plan.starts) * widest))[-1])
        batches = PairBatches(self.train_store, with_text=False)
        return batches.__getitems__(sampler.share(largest, turn=0))

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
        wanted = {
            "fit": [self.train_split, self.val_split],
            "validate": [self.val_split],
            "test": [self.test_split],
            "predict": [self.test_split] if self.predict_file is None else [],
        }
        if stage is not None:
            return wanted[stage]
        exist = self.source.splits()
        return [s for s in (self.train_split, self.val_split, self.test_split) if s in exist]

    def _tokenizers_folder(self) -> Path:
        key = {
            "format": FORMAT,
            "pairs": self.source.fingerprint(self.train_split),
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "shared": self.shared_vocabulary,
        }
        return self.cache / "tokenizers" / digest(key)

    def _store_folder(self, split: str, tokenizers: Tokenizers) -> Path:
        fingerprint = self.source.fingerprint(split)
        return self._pairs_folder(fingerprint, tokenizers, self._filter(split))

    def _predict_folder(self, tokenizers: Tokenizers) -> Path:
        assert self.predict_file is not None
        return self._pairs_folder(file_sha256(self.predict_file), tokenizers, None)

    def _pairs_folder(
        self, fingerprint: str, tokenizers: Tokenizers, pair_filter: PairFilter | None
    ) -> Path:
        return self.cache / "pairs" / store_key(fingerprint, tokenizers, pair_filter)

    # Making it.

    def _train_tokenizers(self, folder: Path) -> None:
        sides = [(0, 1)] if self.shared_vocabulary else [(0,), (1,)]
        trained = [
            self.tokenizer.train(self._train_texts(chosen), self.vocab_size) for chosen in sides
        ]
        for tokenizer in trained:
            check_capacity(tokenizer, self.vocab_size)
        texts = Tokenizers(trained[0], trained[-1]).to_dict()
        for side, text in texts.items():
            (folder / f"{side}.json").write_text(text, encoding="utf-8")

    def _train_texts(self, sides: tuple[int, ...]) -> Iterator[str]:
        """Texts to learn a vocabulary from; without very long ones, as learning is quadratic."""
        progress = Progress(f"learning the vocabulary from {self.train_split}")
        for pair in progress(self.source.pairs(self.train_split)):
            for side in sides:
                if len(pair[side]) <= _LEARNED_CHARACTERS:
                    yield pair[side]

    def _build_split(self, split: str, tokenizers: Tokenizers) -> None:
        def build(folder: Path) -> None:
            pairs = Progress(f"tokenizing {split}")(self.source.pairs(split))
            write_pairs(folder, pairs, tokenizers, self._filter(split))

        build_once(self._store_folder(split, tokenizers), build)

    def _filter(self, split: str) -> PairFilter | None:
        """Evaluation drops nothing: its scores are over the whole split."""
        return self.pair_filter if split == self.train_split else None

    def _predict_pairs(self) -> Iterator[tuple[str, str]]:
        assert self.predict_file is not None
        return ((line, "") for line in read_lines(self.predict_file))

    def _load_tokenizers(self) -> Tokenizers:
        folder = self._tokenizers_folder()
        try:
            texts = {side: (folder / f"{side}.json").read_text(encoding="utf-8") for side in SIDES}
            tokenizers = Tokenizers.from_dict(texts)
        except (OSError, ValueError) as error:
            raise CacheError.damaged(folder, error) from error
        for tokenizer in (tokenizers.source, tokenizers.target):
            check_capacity(tokenizer, self.vocab_size)
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

    def _check_budget(self) -> None:
        store = self.train_store
        longest = 1 + max(int(store.source_lengths.max()), int(store.target_lengths.max()))
        if longest > self.batch_tokens:
            raise DataError(
                f"batch_tokens is {self.batch_tokens}, but the longest training pair has {longest} "
                "tokens on a side; raise batch_tokens or lower max_length"
            )

    def _describe(self, stores: dict[str, PairStore]) -> dict[str, int | float | str]:
        numbers: dict[str, int | float | str] = {}
        for split, store in stores.items():
            numbers[f"{split}_pairs"] = len(store)
            for side in SIDES:
                numbers[f"{split}_{side}_tokens"] = store.tokens[side]
            if split == self.train_split:
                numbers |= {f"{split}_dropped_{why}": n for why, n in store.counts.dropped.items()}
        for side, tokenizer in zip(
            SIDES, (self.tokenizers.source, self.tokenizers.target), strict=True
        ):
            numbers[f"{side}_vocabulary"] = tokenizer.vocab_size
            numbers[f"{side}_tokenizer_sha256"] = tokenizer.sha256
        return numbers

    @staticmethod
    def _sha256(tokenizers: Tokenizers) -> list[str]:
        return [tokenizers.source.sha256, tokenizers.target.sha256]

    # Where this process stands in the training.

    def _train_sampler(self) -> TokenBatchSampler:
        trainer = self.trainer
        return TokenBatchSampler(
            self.train_store.source_lengths + 1,
            self.train_store.target_lengths + 1,
            self.batch_tokens,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            # Overfitting a few batches means the same few in every epoch.
            reshuffle=trainer is None or not trainer.overfit_batches,  # type: ignore[attr-defined]
        )

    def _evaluation_loader(self, store: PairStore) -> BatchLoader:
        sampler = ShardSampler(
            store.source_lengths + 1,
            store.target_lengths + 1,
            self.eval_batch_tokens,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )
        batches = PairBatches(store, with_text=True)
        return BatchLoader(batches, sampler, num_workers=0, pin_memory=self._on_gpu())

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _check_at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise DataError(f"{name} is {value}; it must be at least {least}")


def _check_lengths(name: str, store: PairStore) -> None:
    """Refuse what would keep the evaluation of a whole split waiting for one sentence."""
    lengths = np.maximum(store.source_lengths, store.target_lengths)
    longest = int(lengths.argmax())
    if lengths[longest] > MOST_TOKENS:
        raise DataError(
            f"{name}: sentence {longest + 1} has {lengths[longest]:,} tokens, more than the "
            f"{MOST_TOKENS:,} that can be evaluated; split or remove it"
        )


def _check_not_empty(split: str, store: PairStore) -> None:
    if len(store) == 0:
        filtered = any(store.counts.dropped.values())
        remedy = "raise max_length or max_length_ratio" if filtered else "look at its files"
        raise DataError(f"split {split!r} has no pairs: {store.counts}; {remedy}")
