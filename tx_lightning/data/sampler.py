"""Which sentence pairs make a batch, in which order, on which rank: a pure function of lengths.

Lengths here count EOS. A batch of n pairs costs n x the longest side in it, padding included, and
stays within a budget of tokens.

Training: one global batch is one optimizer step, planned from (lengths, budget, seed, epoch) and
nothing else. Its examples are dealt to world_size x accumulate micro-batches, so the steps of a run
are the same on any number of processes. Evaluation: whole batches are dealt to the ranks, so that
each batch, and each score to the last digit, is the same on any number of processes, as long as
there are as many batches as ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from tx_lightning.data.errors import DataError

Lengths = npt.NDArray[np.integer[Any]]
Indices = npt.NDArray[np.int64]

_GRAIN = 4  # source lengths are sorted in steps of this many tokens


@dataclass(frozen=True)
class Plan:
    """Batches of pairs: batch b holds `order[starts[b]:starts[b + 1]]`.

    Args:
        order: Each pair's position in the store once, batch after batch.
        starts: Where each batch starts in `order`, and the end of the last.
    """

    order: Indices
    starts: Indices

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, batch: int) -> Indices:
        return self.order[self.starts[batch] : self.starts[batch + 1]]


@dataclass(frozen=True)
class Share:
    """What one rank computes at once: a micro-batch.

    Args:
        indices: Positions in the store.
        step_tokens: What the summed loss of the whole global batch is divided by; for pairs its
            target tokens, EOS included.
        parts: Micro-batches the global batch is dealt to: world size x accumulation.
        real: False for the one example lent to a share that would be empty; it counts nothing.
        epoch: The epoch; 0 in evaluation.
    """

    indices: Indices
    step_tokens: int
    parts: int
    real: bool = True
    epoch: int = 0


def plan_batches(
    source_lengths: Lengths, target_lengths: Lengths, batch_tokens: int, seed: int, epoch: int
) -> Plan:
    """The global batches of one epoch, in training order; every pair exactly once.

    Pairs are sorted by target length, then roughly by source length; ties are broken at random, and
    then the batches are shuffled. Every epoch has the same number of batches, because the sequence
    of sort keys is the same and the cuts see nothing but the keys.

    Args:
        source_lengths: Source tokens of each pair, EOS included.
        target_lengths: Target tokens of each pair, EOS included.
        batch_tokens: Budget of a batch: pairs x longest side. A longer pair is a batch alone.
        seed: With `epoch`, decides the order.
        epoch: Counts from 0.
    """
    random = np.random.default_rng([seed, epoch])
    coarse = source_lengths.astype(np.int64) // _GRAIN
    ranks = _ranks(target_lengths.astype(np.int64) * (int(coarse.max(initial=0)) + 1) + coarse)
    shuffled = random.permutation(len(ranks))
    order = shuffled[np.argsort(ranks[shuffled], kind="stable")]
    # Upper bound of the cost over all pairs of a key, so that no cut depends on the tie-break.
    cost = np.maximum(target_lengths[order], coarse[order] * _GRAIN + _GRAIN - 1)
    starts = cut(cost, batch_tokens)
    batches = random.permutation(len(starts) - 1)
    return _reorder(order, starts, batches)


def _ranks(keys: Indices) -> npt.NDArray[Any]:
    """Keys replaced by their rank, in 16 bits when that is enough: numpy then sorts in O(n)."""
    values, ranks = np.unique(keys, return_inverse=True)
    return ranks.astype(np.uint16) if len(values) <= 2**16 else ranks


def cut(cost: Lengths, budget: int) -> Indices:
    """Cut a sequence greedily where rows x the largest cost since the last cut exceeds a budget.

    Args:
        cost: Tokens of each row.
        budget: Largest rows x cost of a batch; a single row may exceed it.

    Returns:
        Where each batch starts, and the length of the sequence.
    """
    starts = [0]
    while starts[-1] < len(cost):
        start = starts[-1]
        # No batch of this first row has more rows than `most`.
        most = max(1, budget // max(1, int(cost[start])))
        widest = np.maximum.accumulate(cost[start : start + most])
        fits = widest * np.arange(1, len(widest) + 1) <= budget
        rows = len(fits) if fits.all() else int(np.argmin(fits))
        starts.append(start + max(1, rows))
    return np.array(starts, dtype=np.int64)


def _reorder(order: Indices, starts: Indices, batches: Indices) -> Plan:
    """Put whole batches into another order."""
    sizes = np.diff(starts)[batches]
    ends = np.cumsum(sizes)
    within = np.arange(len(order)) - np.repeat(ends - sizes, sizes)
    return Plan(
        order=order[np.repeat(starts[:-1][batches], sizes) + within],
        starts=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
    )


class StepSampler(Sampler[Share], ABC):
    """The micro-batches of one rank in training; all ranks have the same number of them.

    Micro-batch k of a global batch holds its examples k, k + parts, k + 2 parts, ...; rank r
    computes k = r, r + world_size, ... in the course of the accumulation. So world size and
    accumulation may be traded for each other without a change to any micro-batch.

    Args:
        seed: With the epoch, decides the order.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches of one process in an optimizer step.
        reshuffle: Give each epoch an order of its own; False repeats that of epoch 0.

    Attributes:
        start: Micro-batch at which the next pass begins, to resume within an epoch.
    """

    def __init__(
        self,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        reshuffle: bool = True,
    ) -> None:
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.reshuffle = reshuffle
        self.epoch = 0
        self.start = 0
        self._plan: tuple[int, Plan] | None = None

    @abstractmethod
    def plan_epoch(self, epoch: int) -> Plan:
        """The global batches of an epoch, equally many in each; a function of seed and epoch."""

    @abstractmethod
    def step_tokens(self, batch: Indices, epoch: int) -> int:
        """What the summed loss of a global batch is divided by."""

    @property
    def sampler(self) -> "StepSampler":
        """Itself: Lightning looks for `set_epoch` at `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; one of another epoch begins at its start."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def plan(self) -> Plan:
        """The global batches of the current epoch."""
        epoch = self._ordering_epoch()
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self.plan_epoch(epoch))
        return self._plan[1]

    def _ordering_epoch(self) -> int:
        return self.epoch if self.reshuffle else 0

    def __len__(self) -> int:
        return len(self.plan()) * self.accumulate

    def __iter__(self) -> Iterator[Share]:
        """The rest of the epoch from micro-batch `start`, which goes back to 0."""
        plan = self.plan()
        start, self.start = self.start, 0
        for position in range(start, len(plan) * self.accumulate):
            step, turn = divmod(position, self.accumulate)
            yield self.share(step, turn)

    def share(self, step: int, turn: int) -> Share:
        """This rank's part of a global batch at one turn of the accumulation."""
        batch, epoch = self.plan()[step], self._ordering_epoch()
        parts = self.world_size * self.accumulate
        indices = batch[turn * self.world_size + self.rank :: parts]
        step_tokens = self.step_tokens(batch, epoch)
        if len(indices) == 0:
            return Share(batch[:1], step_tokens, parts, real=False, epoch=epoch)
        return Share(indices, step_tokens, parts, epoch=epoch)


class TokenBatchSampler(StepSampler):
    """Batches of pairs of like length within a budget of tokens.

    Args:
        source_lengths: Source tokens of each pair, EOS included.
        target_lengths: Target tokens of each pair, EOS included; what the loss is divided by.
        batch_tokens: Budget of a global batch: pairs x longest side.
        seed: With the epoch, decides the order.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches of one process in an optimizer step.
        reshuffle: Give each epoch an order of its own; False repeats that of epoch 0.
    """

    def __init__(
        self,
        source_lengths: Lengths,
        target_lengths: Lengths,
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
        self.source_lengths = source_lengths
        self.target_lengths = target_lengths
        self.batch_tokens = batch_tokens

    def plan_epoch(self, epoch: int) -> Plan:
        lengths = (self.source_lengths, self.target_lengths)
        return plan_batches(*lengths, self.batch_tokens, self.seed, epoch)

    def step_tokens(self, batch: Indices, epoch: int) -> int:
        return int(self.target_lengths[batch].sum())

    def largest(self) -> int:
        """The step whose batch has the most tokens, padding included, in the current epoch."""
        plan = self.plan()
        widths = np.maximum(self.source_lengths, self.target_lengths)[plan.order]
        widest = np.maximum.reduceat(widths, plan.starts[:-1])
        return int(np.lexsort((widest, np.diff(plan.starts) * widest))[-1])


def _cut_smaller(plan: Plan, n: int) -> Plan:
    """The same examples in the same order, in n batches."""
    if len(plan.order) < n:
        raise DataError(
            f"there are {len(plan.order)} examples to evaluate for {n} processes: give at least "
            "one for each, or fewer processes"
        )
    return Plan(plan.order, np.arange(n + 1, dtype=np.int64) * len(plan.order) // n)


class EvaluationSampler(Sampler[Share], ABC):
    """The batches of one rank in validation, test and prediction: nothing padded in or repeated.

    Whole batches are dealt to the ranks. Where there are fewer than ranks they are cut smaller: the
    trainer does not evaluate on a rank that has none, and the others would wait for it for ever.

    Args:
        plan: All batches.
        rank: This process.
        world_size: Number of processes.

    Raises:
        DataError: When there are fewer examples than ranks.
    """

    def __init__(self, plan: Plan, *, rank: int = 0, world_size: int = 1) -> None:
        if 0 < len(plan) < world_size:
            plan = _cut_smaller(plan, world_size)
        self.plan = plan
        self.batches = range(rank, len(plan), world_size)

    @abstractmethod
    def step_tokens(self, batch: Indices) -> int:
        """The labels of a batch."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Share]:
        for b in self.batches:
            indices = self.plan[b]
            yield Share(indices, self.step_tokens(indices), parts=1)


class ShardSampler(EvaluationSampler):
    """Batches of pairs, from the longest to the shortest.

    That keeps the ranks equally busy and shows at once whether memory suffices.

    Args:
        source_lengths: Source tokens of each pair, EOS included.
        target_lengths: Target tokens of each pair, EOS included.
        batch_tokens: Budget of a batch: pairs x longest side. A longer pair is a batch alone.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        source_lengths: Lengths,
        target_lengths: Lengths,
        batch_tokens: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        order = np.lexsort((target_lengths, source_lengths))[::-1]
        cost = np.maximum(source_lengths, target_lengths)[order]
        super().__init__(Plan(order, cut(cost, batch_tokens)), rank=rank, world_size=world_size)
        self.target_lengths = target_lengths

    def step_tokens(self, batch: Indices) -> int:
        return int(self.target_lengths[batch].sum())
