"""The data of a masked language model: segments of texts in which some tokens are hidden.

Shapes: B rows, T tokens of the longest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.batches import Batch, row_ids
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.masking import Masker, Masking
from tx_lightning.data.plans import Indices
from tx_lightning.data.sampler import EvaluationSampler, ShardSampler, Share, TokenBatchSampler
from tx_lightning.data.segments import AROUND, EVALUATION_SEED, SegmentData, Segments
from tx_lightning.data.store import Store
from tx_lightning.data.text_sources import TextSource
from tx_lightning.data.tokenizers import ByteLevelBPE, TokenizerTrainer


@dataclass
class MaskedBatch(Batch):
    """Segments with some tokens hidden.

    Args:
        ids: (B, T) int64: BOS, tokens, EOS, then PAD; what the network reads.
        targets: (B, T) int64, the token that was chosen at a place; IGNORED where none was.
        places: (K,) int64, the places of chosen tokens in the flattened targets.
        indices: Position of each segment in its split.
        step_tokens: Chosen tokens of the whole optimizer step.
        parts: Batches that make up the optimizer step, over all ranks.
        predicted: Chosen tokens of this batch.
        read: Tokens of this batch, BOS and EOS included, without padding.
    """

    ids: Tensor
    targets: Tensor
    places: Tensor
    indices: list[int]
    step_tokens: int
    parts: int
    predicted: int
    read: int

    @property
    def loss_tokens(self) -> int:
        return self.predicted

    @property
    def tokens(self) -> int:
        return self.read

    @property
    def padded(self) -> bool:
        return self.read < self.ids.numel()

    @property
    def positions(self) -> int:
        return self.ids.numel()

    def describe(self) -> str:
        return f"{self.rows} segments of up to {self.ids.shape[1]} tokens"


class MaskedSegments(Dataset[MaskedBatch]):
    """Turns shares of a sampler into batches of masked segments.

    Args:
        segments: The segments of a split.
        masker: Hides their tokens.
        pad_id: Fills rows.
        bos_id: Stands before a segment.
        eos_id: Stands after it.
    """

    def __init__(
        self, segments: Segments, masker: Masker, *, pad_id: int, bos_id: int, eos_id: int
    ) -> None:
        self.segments = segments
        self.masker = masker
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id

    def __len__(self) -> int:
        return len(self.segments)

    def __getitems__(self, share: Share) -> MaskedBatch:
        indices = share.indices.tolist()
        lengths = self.segments.lengths[share.indices]
        ids = np.full((len(indices), int(lengths.max()) + AROUND), self.pad_id, dtype=np.int64)
        targets = np.full_like(ids, IGNORED)
        ids[:, 0] = self.bos_id
        predicted = 0
        for row, index in enumerate(indices):
            tokens = self.segments[index]
            masked, positions = self.masker(tokens, share.epoch, index)
            ids[row, 1 : len(tokens) + 1] = masked
            ids[row, len(tokens) + 1] = self.eos_id
            if share.real:
                targets[row, positions + 1] = tokens[positions]
                predicted += len(positions)
        return MaskedBatch(
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            torch.from_numpy(np.flatnonzero(targets != IGNORED)),
            indices,
            share.step_tokens,
            share.parts,
            predicted,
            int(lengths.sum()) + AROUND * len(indices) if share.real else 0,
        )

    def chosen(self, indices: Indices, epoch: int) -> int:
        """How many tokens of these segments are chosen."""
        if not self.masker.masking.whole_words:
            return int(self.masker.masking.counts(self.segments.lengths[indices]).sum())
        return sum(self.masker.count(self.segments[i], epoch, i) for i in indices.tolist())


class MaskedSampler(TokenBatchSampler):
    """Batches of segments of like length; the loss is divided by the tokens chosen in them.

    Args:
        data: The training segments.
        batch_tokens: Budget of a global batch: rows x the longest, BOS, EOS and padding included.
        seed: With the epoch, decides the order.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches of one process in an optimizer step.
        reshuffle: Give each epoch an order of its own; False repeats that of epoch 0.
    """

    def __init__(
        self,
        data: MaskedSegments,
        batch_tokens: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        reshuffle: bool = True,
    ) -> None:
        lengths = data.segments.lengths + AROUND
        super().__init__(
            np.zeros_like(lengths),  # There is one side, and its lengths are exact.
            lengths,
            batch_tokens,
            seed=seed,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            reshuffle=reshuffle,
        )
        self.data = data
        self._counted = (-1, -1, 0)  # step, epoch, tokens

    def step_tokens(self, step: int, epoch: int) -> int:
        if self._counted[:2] != (step, epoch):  # All turns of an accumulation ask for the same.
            self._counted = (step, epoch, self.data.chosen(self.plan()[step], epoch))
        return self._counted[2]


class MaskedShards(ShardSampler):
    """The evaluation batches of masked segments, from the longest to the shortest.

    Args:
        data: The segments of the split.
        batch_tokens: Budget of a batch.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, data: MaskedSegments, batch_tokens: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        lengths = data.segments.lengths + AROUND
        super().__init__(lengths, lengths, batch_tokens, rank=rank, world_size=world_size)
        self.data = data

    def step_tokens(self, batch: Indices) -> int:
        return self.data.chosen(batch, epoch=0)


class MaskedLanguageModelingData(SegmentData[MaskedBatch]):
    """Texts of a source, tokenized once, in which some tokens are hidden anew in each epoch.

    A text is cut into segments, one row each: BOS, tokens, EOS. What is hidden is a function of
    (seed, epoch, segment) in training; in validation and test it is the same in all epochs and
    runs. An empty text is dropped, and counted.

    Args:
        source: Where the texts come from.
        vocab_size: Rows of the embedding table. The last is the mask, unless the tokenizer has one:
            a vocabulary that is learned has at most one entry less.
        tokenizer: How the vocabulary is learned from the training split.
        masking: How many tokens are hidden, and how.
        max_length: Most tokens of a row, BOS and EOS included: at most the network's max_length.
        batch_tokens: Budget of an optimizer step, over all processes and accumulated batches: rows
            x the longest among them, padding included.
        eval_batch_tokens: The same for a batch of validation and test; null: `batch_tokens`.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        test_split: Name of the split to test on.
        num_workers: Processes of each rank that prepare training batches; 0: the rank itself.
        seed: Decides, with the epoch, the order of training and what is hidden.
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
        masking: Masking = Masking(),  # noqa: B008  # frozen
        max_length: int = 128,
        batch_tokens: int = 8192,
        eval_batch_tokens: int | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            source,
            vocab_size,
            reserved=1,
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
        self.masking = masking

    def train_batches(self) -> MaskedSegments:
        return self._masked(self.train_store, self.seed)

    def evaluation_batches(self, store: Store) -> MaskedSegments:
        return self._masked(store, EVALUATION_SEED)

    def train_sampler(self) -> MaskedSampler:
        place = self.place()
        return MaskedSampler(
            self.train_batches(),
            self.batch_tokens,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            accumulate=place.accumulate,
            reshuffle=place.reshuffle,
        )

    def evaluation_sampler(self, store: Store) -> EvaluationSampler:
        place = self.place()
        return MaskedShards(
            self.evaluation_batches(store),
            self.eval_batch_tokens,
            rank=place.rank,
            world_size=place.world_size,
        )

    def _masked(self, store: Store, seed: int) -> MaskedSegments:
        tokenizer = self.tokenizers.source
        pad, bos, eos = row_ids(tokenizer)
        masker = Masker(self.masking, tokenizer, self.vocab_size, seed)
        return MaskedSegments(self.segments(store), masker, pad_id=pad, bos_id=bos, eos_id=eos)
