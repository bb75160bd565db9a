"""The data of a denoising encoder-decoder: damaged segments of texts, and what repairs them.

`SpanCorruption` is that of T5, `TextInfilling` that of BART. Damage is a pure function of (seed,
epoch, example): it is new in each epoch, and the same on any rank, in any batch and after a resume.
Sentinels, which stand for what is gone, are the last rows of the embedding table: sentinel k is
id vocab_size - 1 - k.

Shapes: N tokens of a segment.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from tx_lightning.data.batches import RowIds, TranslationBatch, pair_batch, row_ids
from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.masking import mask_id
from tx_lightning.data.sampler import ShardSampler, Share, TokenBatchSampler
from tx_lightning.data.segments import AROUND, EVALUATION_SEED, SegmentData, Segments
from tx_lightning.data.store import SIDES, Store
from tx_lightning.data.text_sources import TextSource
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizer, TokenizerTrainer

Ids = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]

LONGEST_SPAN = 1_000  # tokens, on average
_DAMAGE = 2  # keeps these random numbers apart from those that order the examples


class Denoise(NamedTuple):
    """What the encoder reads and what the decoder has to write, without BOS and EOS."""

    source: Ids
    target: Ids


class Noise(ABC):
    """How a text is damaged. Subclass it for another objective.

    Attributes:
        n_sentinels: Rows at the end of the embedding table that it needs.
    """

    n_sentinels: int

    @abstractmethod
    def corrupt(self, ids: Ids, random: np.random.Generator, sentinels: Ids) -> Denoise:
        """Damage a text.

        Args:
            ids: (N,) int64 with N > 0.
            random: Where chance comes from.
            sentinels: (n_sentinels,), their ids.
        """

    @abstractmethod
    def source_lengths(self, lengths: Counts) -> Counts:
        """The most tokens that texts of these lengths have once damaged."""

    @abstractmethod
    def target_lengths(self, lengths: Counts) -> Counts:
        """The tokens of their targets: what the loss is divided by, so that it is exact."""

    @abstractmethod
    def sentinels_of(self, lengths: Counts) -> Counts:
        """The most sentinels that texts of these lengths need."""

    def sentinel_ids(self, tokenizer: Tokenizer, vocab_size: int) -> Ids:
        """Their ids: those at the end of the table.

        Raises:
            DataError: The tokenizer has entries there.
        """
        if tokenizer.vocab_size > vocab_size - self.n_sentinels:
            raise DataError(
                f"vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} entries "
                f"and {type(self).__name__} needs {self.n_sentinels} more; set vocab_size to at "
                f"least {tokenizer.vocab_size + self.n_sentinels}"
            )
        return vocab_size - 1 - np.arange(self.n_sentinels)


class SpanCorruption(Noise):
    """Spans are replaced by a sentinel each; the target lists them, each after its sentinel.

    Raffel et al. 2020, section 3.1.4 and figure 2; one more sentinel ends the target. Of N tokens
    round(rate N) are taken, in round(that / mean_span) spans: random ones that do not touch, the
    first token kept and the last one taken, as in T5's code.

    Args:
        rate: Share of the tokens that is taken.
        mean_span: Tokens of a span on average.
        n_sentinels: Rows at the end of the embedding table that are sentinels: at least one more
            than the longest row has spans.
    """

    def __init__(
        self, *, rate: float = 0.15, mean_span: float = 3.0, n_sentinels: int = 100
    ) -> None:
        _check_rate("SpanCorruption", rate)
        if not 1 <= mean_span < math.inf:
            raise DataError(f"SpanCorruption: mean_span is {mean_span}; it must be at least 1")
        if n_sentinels < 2:
            raise DataError(
                f"SpanCorruption: n_sentinels is {n_sentinels}; it must be at least 2, one for a "
                "span and one for the end of the target"
            )
        check_at_least("SpanCorruption: n_sentinels", n_sentinels, 2)
        self.rate = rate
        self.mean_span = mean_span
        self.n_sentinels = n_sentinels

    def corrupt(self, ids: Ids, random: np.random.Generator, sentinels: Ids) -> Denoise:
        return with_sentinels(ids, self.mask(len(ids), random), sentinels)

    def source_lengths(self, lengths: Counts) -> Counts:
        taken, spans = self.counts(lengths)
        return lengths - taken + spans

    def target_lengths(self, lengths: Counts) -> Counts:
        taken, spans = self.counts(lengths)
        return taken + spans + 1

    def sentinels_of(self, lengths: Counts) -> Counts:
        return self.counts(lengths)[1] + 1

    def counts(self, lengths: Counts) -> tuple[Counts, Counts]:
        """How many tokens are taken of texts of these lengths, and in how many spans."""
        alone = lengths < 2  # Nothing is taken of a single token.
        taken = np.rint(lengths * self.rate).astype(np.int64)
        taken = np.where(alone, 0, np.clip(taken, 1, np.maximum(lengths - 1, 1)))
        spans = np.maximum(1, np.rint(taken / self.mean_span).astype(np.int64))
        return taken, np.where(alone, 0, np.minimum(spans, lengths - taken))

    def mask(self, length: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which of so many tokens are taken."""
        taken, spans = (int(count) for count in self.counts(np.array(length)))
        if spans == 0:
            return np.zeros(length, dtype=np.bool_)
        parts = [_parts(length - taken, spans, random), _parts(taken, spans, random)]
        # What is kept, what is taken, what is kept, ...
        return np.repeat(np.tile([False, True], spans), np.stack(parts, axis=1).ravel())


def with_sentinels(ids: Ids, taken: npt.NDArray[np.bool_], sentinels: Ids) -> Denoise:
    """Replace each run of taken tokens by a sentinel, and list the runs after theirs.

    Args:
        ids: (N,).
        taken: (N,).
        sentinels: At least one more than there are runs.
    """
    begins = taken & ~np.concatenate([[False], taken[:-1]])
    n_spans = int(begins.sum())
    numbers = np.maximum(np.cumsum(begins) - 1, 0)
    source = np.where(begins, sentinels[numbers], ids)[~taken | begins]
    places = np.flatnonzero(begins[taken])  # where each run begins in the tokens that are taken
    target = np.insert(ids[taken], places, sentinels[:n_spans])
    return Denoise(source, np.append(target, sentinels[n_spans]))


class TextInfilling(Noise):
    """Spans are replaced by one mask each, of no length some, which the target does not tell.

    Lewis et al. 2020, section 2.2: lengths are Poisson distributed, a span of no length inserts a
    mask, and the target is the whole text. Of N tokens round(rate N) are taken, at least one, the
    last span cut to the number.

    Args:
        rate: Share of the tokens that is taken.
        poisson: Mean length of a span.
    """

    n_sentinels = 1

    def __init__(self, *, rate: float = 0.3, poisson: float = 3.0) -> None:
        _check_rate("TextInfilling", rate)
        if not 0 < poisson <= LONGEST_SPAN:
            raise DataError(
                f"TextInfilling: poisson is {poisson}; it must be above 0 and at most "
                f"{LONGEST_SPAN:,}"
            )
        self.rate = rate
        self.poisson = poisson

    def corrupt(self, ids: Ids, random: np.random.Generator, sentinels: Ids) -> Denoise:
        spans = self.spans(len(ids), random)
        kept = len(ids) - int(spans.sum())
        # Each span stands behind so many of the tokens that are kept.
        behind = np.sort(random.integers(kept + 1, size=len(spans)))
        starts = behind + np.cumsum(spans) - spans
        taken = np.zeros(len(ids) + 1, dtype=np.int64)
        np.add.at(taken, starts, 1)
        np.add.at(taken, starts + spans, -1)
        source = np.insert(ids[np.cumsum(taken[:-1]) == 0], behind, sentinels[0])
        return Denoise(source, ids)

    def source_lengths(self, lengths: Counts) -> Counts:
        return lengths

    def target_lengths(self, lengths: Counts) -> Counts:
        return lengths

    def sentinels_of(self, lengths: Counts) -> Counts:
        return np.ones_like(lengths)

    def sentinel_ids(self, tokenizer: Tokenizer, vocab_size: int) -> Ids:
        """The mask of the tokenizer, or the last row of the table."""
        return np.array([mask_id(tokenizer, vocab_size)])

    def spans(self, length: int, random: np.random.Generator) -> Counts:
        """The lengths of the spans of a text, as many as tokens are taken at most."""
        count = max(1, round(self.rate * length))
        drawn = random.poisson(self.poisson, size=count).astype(np.int64)
        drawn[-1] += max(0, count - int(drawn.sum()))
        ends = np.minimum(np.cumsum(drawn), count)
        last = int(np.argmax(ends == count))
        return np.diff(ends[: last + 1], prepend=0)


class NoisySegments(Dataset[TranslationBatch]):
    """Turns shares of a sampler into batches of damaged segments with their targets.

    Args:
        segments: The segments of a split.
        noise: Damages them.
        sentinels: The ids that stand for what is gone.
        ids: The special ids.
        seed: With epoch and segment, decides the damage.
    """

    def __init__(
        self, segments: Segments, noise: Noise, sentinels: Ids, ids: RowIds, seed: int
    ) -> None:
        self.segments = segments
        self.noise = noise
        self.sentinels = sentinels
        self.ids = ids
        self.seed = seed

    def __len__(self) -> int:
        return len(self.segments)

    def __getitems__(self, share: Share) -> TranslationBatch:
        rows = [self.noisy(index, share.epoch) for index in share.indices.tolist()]
        source = [row.source for row in rows]
        target = [row.target for row in rows] if share.real else None
        return pair_batch(share, source, target, (self.ids, self.ids))

    def noisy(self, index: int, epoch: int) -> Denoise:
        """A segment as it is damaged in an epoch."""
        random = np.random.default_rng([self.seed, epoch, index, _DAMAGE])
        return self.noise.corrupt(self.segments[index].astype(np.int64), random, self.sentinels)

    def lengths(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Source tokens of each segment at most, and target tokens, EOS included."""
        whole = self.segments.lengths.astype(np.int64)
        sides = self.noise.source_lengths(whole), self.noise.target_lengths(whole)
        return (sides[0] + 1).astype(np.int32), (sides[1] + 1).astype(np.int32)


class DenoisingData(SegmentData[TranslationBatch]):
    """Texts of a source, tokenized once, that are damaged anew in each epoch.

    A text is cut into segments, one row each. The encoder reads a damaged segment and EOS, the
    decoder writes what the noise asks for; both have the same vocabulary. The damage is a function
    of (seed, epoch, segment) in training; in validation and test it is the same in all epochs and
    runs. An empty text is dropped, and counted.

    Args:
        source: Where the texts come from.
        vocab_size: Rows of the embedding table; a vocabulary that is learned leaves the last ones
            to the noise.
        tokenizer: How the vocabulary is learned from the training split.
        noise: How texts are damaged: `SpanCorruption` or `TextInfilling`; null: the first, as it
            is by default.
        max_length: Most tokens of a whole segment, with BOS and EOS.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches: rows
            x the longest side among them, EOS and padding included.
        eval_batch_tokens: The same for a batch of validation and test; null: `batch_tokens`.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training and the damage.
        cache_dir: Folder for what is made; null: `$TX_LIGHTNING_CACHE`, else
            `~/.cache/tx_lightning`.

    Raises:
        DataError: The data, the cache, or an argument cannot be used.
    """

    def __init__(
        self,
        source: TextSource,
        vocab_size: int,
        *,
        tokenizer: TokenizerTrainer = ByteLevelBPE(),  # noqa: B008  # never changed
        noise: Noise | None = None,
        max_length: int = 256,
        batch_tokens: int = 8192,
        eval_batch_tokens: int | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        # No object is the default: another class would be given the arguments that it was made of.
        self.noise = noise or SpanCorruption()
        super().__init__(
            source,
            vocab_size,
            reserved=self.noise.n_sentinels,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_tokens=batch_tokens,
            eval_batch_tokens=eval_batch_tokens,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self._check_noise(np.arange(1, max_length - AROUND + 1))

    def _check_noise(self, lengths: Counts) -> None:
        """Refuse noise that segments of some of these lengths are too long for."""
        needed = int(self.noise.sentinels_of(lengths).max())
        if needed > self.noise.n_sentinels:
            raise DataError(
                f"noise has {self.noise.n_sentinels} sentinels, but a row of max_length "
                f"{self.max_length} needs {needed}; raise n_sentinels or mean_span, or lower rate "
                "or max_length"
            )

    def check_reach(self, source: int | None, target: int | None) -> None:
        """Refuse rows that may be longer than the positions of a network reach.

        Args:
            source: The longest sequence of the encoder, EOS included; None: there is no limit.
            target: That of the decoder, likewise.

        Raises:
            DataError: Says how long they may be.
        """
        lengths = np.arange(1, self.max_length - AROUND + 1)
        sides = self.noise.source_lengths(lengths), self.noise.target_lengths(lengths)
        for side, rows, reach in zip(SIDES, sides, (source, target), strict=True):
            if reach is not None and rows.max() >= reach:
                raise DataError(
                    f"data.max_length is {self.max_length:,}, so that a {side} may have "
                    f"{rows.max():,} tokens, more than the {reach - 1:,} that the network's "
                    f"positions hold (max_length {reach:,}, with the end); lower data.max_length, "
                    "raise max_length of the positions, or use a scheme without a limit"
                )

    def check(self, stores: dict[str, Store]) -> None:
        super().check(stores)
        self.noise.sentinel_ids(self.tokenizers.source, self.vocab_size)

    def train_batches(self) -> NoisySegments:
        return self._noisy(self.train_store, self.seed)

    def evaluation_batches(self, store: Store) -> NoisySegments:
        return self._noisy(store, EVALUATION_SEED)

    def train_sampler(self) -> TokenBatchSampler:
        place = self.place()
        return TokenBatchSampler(
            *self.train_batches().lengths(),
            self.batch_tokens,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            accumulate=place.accumulate,
            reshuffle=place.reshuffle,
        )

    def evaluation_sampler(self, store: Store) -> ShardSampler:
        place = self.place()
        return ShardSampler(
            *self.evaluation_batches(store).lengths(),
            self.eval_batch_tokens,
            rank=place.rank,
            world_size=place.world_size,
        )

    def _noisy(self, store: Store, seed: int) -> NoisySegments:
        tokenizer = self.tokenizers.source
        sentinels = self.noise.sentinel_ids(tokenizer, self.vocab_size)
        return NoisySegments(self.segments(store), self.noise, sentinels, row_ids(tokenizer), seed)


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate < 1:
        raise DataError(f"{name}: rate is {rate}; it must be between 0 and 1")


def _parts(total: int, parts: int, random: np.random.Generator) -> Counts:
    """Cut a number into so many random parts, at least one and none of them 0."""
    cuts = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)
