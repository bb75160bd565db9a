"""Fixed-length blocks of a token stream: how a language model is trained and evaluated.

A stream is the ids of all documents, an end token after each; before its first token stands an end
token too, so that every token of every document is predicted. A block of L tokens that starts at s
predicts tokens s to s + L - 1 from the tokens s - 1 to s + L - 2.

Shapes: B blocks, L tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tx_lightning.data.batches import Batch
from tx_lightning.data.errors import DataError
from tx_lightning.data.plans import Indices, Plan
from tx_lightning.data.sampler import EvaluationSampler, Share, StepSampler
from tx_lightning.data.store import Slices

IGNORED = -1  # where nothing is predicted


@dataclass
class BlockBatch(Batch):
    """Blocks of a stream.

    Args:
        ids: (B, L) int64, what the network reads.
        targets: (B, L) int64, the token that follows each; IGNORED where nothing is predicted.
        places: (N,) int64, where something is predicted in the flattened targets.
        indices: In training where each block starts in the stream, in evaluation its number.
        step_tokens: Predicted tokens of the whole optimizer step.
        parts: Batches that make up the optimizer step, over all ranks.
        predicted: Predicted tokens of this batch.
        sliding: Whether these are blocks of a window that slides.
    """

    ids: Tensor
    targets: Tensor
    places: Tensor
    indices: list[int]
    step_tokens: int
    parts: int
    predicted: int
    sliding: bool = False

    @property
    def loss_tokens(self) -> int:
        return self.predicted

    @property
    def tokens(self) -> int:
        return self.predicted

    @property
    def padded(self) -> bool:
        return False

    @property
    def positions(self) -> int:
        return self.ids.numel()

    def describe(self) -> str:
        return f"{self.rows} blocks of {self.ids.shape[1]} tokens"


@dataclass(frozen=True)
class Windows:
    """Which blocks of a stream are evaluated, and which of their tokens count.

    Args:
        starts: Where each block starts.
        firsts: The first token that counts in each; those from there to `ends` do.
        ends: The end of each block.
        overlap: Whether they do.
    """

    starts: Indices
    firsts: Indices
    ends: Indices
    overlap: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def side_by_side(cls, n_tokens: int, length: int) -> "Windows":
        """Blocks that do not overlap; the last may be shorter. Every token counts once."""
        starts = np.arange(0, n_tokens, length, dtype=np.int64)
        return cls(starts, starts, np.minimum(starts + length, n_tokens))

    @classmethod
    def sliding(cls, n_tokens: int, length: int, stride: int) -> "Windows":
        """Blocks that move on by `stride` tokens, which are those that count.

        So every token, but the first ones of the stream, has at least length - stride tokens before
        it; with a stride of 1 as many as the block can hold.
        """
        ends = np.arange(min(length, n_tokens), n_tokens + stride, stride, dtype=np.int64)
        ends = np.unique(np.minimum(ends, n_tokens))
        firsts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        return cls(np.maximum(ends - length, 0), firsts, ends, overlap=True)


class BlockBatches(Dataset[BlockBatch]):
    """Turns shares of a sampler into blocks.

    Args:
        stream: The ids of all documents.
        length: Tokens of a block (L).
        eos_id: Stands before the stream.
        windows: The blocks that the indices of a share name; None: they name starts themselves.
    """

    def __init__(
        self,
        stream: Slices | npt.NDArray[Any],
        length: int,
        eos_id: int,
        windows: Windows | None = None,
    ) -> None:
        self.stream = stream
        self.length = length
        self.eos_id = eos_id
        self.windows = windows

    def __getitems__(self, share: Share) -> BlockBatch:
        if self.windows is None:
            return self._training(share)
        windows, chosen = self.windows, share.indices
        starts, firsts, ends = (
            bounds[chosen] for bounds in (windows.starts, windows.firsts, windows.ends)
        )
        width = int((ends - starts).max())
        ids = np.full((len(chosen), width + 1), self.eos_id, dtype=np.int64)
        targets = np.full((len(chosen), width), IGNORED, dtype=np.int64)
        for row, (start, first, end) in enumerate(zip(starts, firsts, ends, strict=True)):
            ids[row, : end - start + 1] = self._tokens(int(start) - 1, int(end))
            targets[row, first - start : end - start] = self.stream[first:end]
        predicted = int((ends - firsts).sum())
        return BlockBatch(
            torch.from_numpy(ids[:, :-1]),
            torch.from_numpy(targets),
            torch.from_numpy(np.flatnonzero(targets != IGNORED)),
            chosen.tolist(),
            predicted,
            1,
            predicted,
            windows.overlap,
        )

    def _training(self, share: Share) -> BlockBatch:
        starts = share.indices.tolist()
        ids = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for row, start in zip(ids, starts, strict=True):
            row[:] = self._tokens(start - 1, start + self.length)
        whole = torch.from_numpy(ids)
        targets = whole[:, 1:] if share.real else torch.full_like(whole[:, 1:], IGNORED)
        predicted = targets.numel() if share.real else 0
        places = torch.arange(predicted)
        return BlockBatch(
            whole[:, :-1], targets, places, starts, share.step_tokens, share.parts, predicted
        )

    def _tokens(self, start: int, end: int) -> npt.NDArray[Any]:
        """The stream from start to end; an end token stands before its beginning."""
        if start >= 0:
            return self.stream[start:end]
        return np.concatenate([[self.eos_id], self.stream[:end]])


class BlockSampler(StepSampler):
    """The training blocks of a stream: whole ones, side by side, from an offset new in each epoch.

    A token is a target at most once in an epoch; those before the first block and after the last,
    fewer than two blocks, wait for another epoch.

    Args:
        n_tokens: Tokens of the stream.
        length: Tokens of a block.
        batch_tokens: Budget of a global batch; it holds batch_tokens // length blocks.
        seed: With the epoch, decides offset and order.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches of one process in an optimizer step.
        reshuffle: Give each epoch an order of its own; False repeats that of epoch 0.

    Raises:
        DataError: When the stream or the budget is shorter than one block.
    """

    def __init__(
        self,
        n_tokens: int,
        length: int,
        batch_tokens: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        reshuffle: bool = True,
    ) -> None:
        super().__init__(
            seed=seed,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            reshuffle=reshuffle,
        )
        if n_tokens < length:
            raise DataError(
                f"block_length is {length}, but the training split has only {n_tokens:,} tokens; "
                "lower block_length or give more text"
            )
        if batch_tokens < length:
            raise DataError(
                f"batch_tokens is {batch_tokens}, less than one block (block_length {length}); "
                "raise batch_tokens or lower block_length"
            )
        self.n_tokens = n_tokens
        self.length = length
        self.blocks_per_step = batch_tokens // length

    def plan_epoch(self, epoch: int) -> Plan:
        random = np.random.default_rng([self.seed, epoch])
        offsets = min(self.length, self.n_tokens - self.length + 1)
        n_blocks = (self.n_tokens - offsets + 1) // self.length
        starts = int(random.integers(offsets)) + self.length * np.arange(n_blocks, dtype=np.int64)
        n_batches = -(-n_blocks // self.blocks_per_step)
        bounds = np.minimum(np.arange(n_batches + 1) * self.blocks_per_step, n_blocks)
        return Plan(starts[random.permutation(n_blocks)], bounds.astype(np.int64))

    def step_tokens(self, step: int, epoch: int) -> int:
        return len(self.plan()[step]) * self.length


class WindowSampler(EvaluationSampler):
    """The evaluation blocks of a stream, in its order.

    Args:
        windows: All blocks.
        length: Tokens of a block.
        batch_tokens: Budget of a batch; at least one block.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        windows: Windows,
        length: int,
        batch_tokens: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        rows = max(1, batch_tokens // length)
        starts = np.append(np.arange(0, len(windows), rows), len(windows)).astype(np.int64)
        plan = Plan(np.arange(len(windows), dtype=np.int64), starts)
        super().__init__(plan, rank=rank, world_size=world_size)
        self.windows = windows

    def step_tokens(self, batch: Indices) -> int:
        return int((self.windows.ends[batch] - self.windows.firsts[batch]).sum())
