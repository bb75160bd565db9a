"""Which batches a process computes, in training and in evaluation.

Training: one global batch is one optimizer step, planned from (lengths, budget, seed, epoch) and
nothing else. Its examples are dealt to world_size x accumulate micro-batches, so the steps of a run
are the same on any number of processes. Evaluation: whole batches are dealt to the ranks, so that
each batch, and each score to the last digit, is the same on any number of processes, as long as
there are as many batches as ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from tx_lightning.data.errors import DataError
from tx_lightning.data.plans import (
    EpochBatches,
    EpochPlan,
    Indices,
    LengthPlanner,
    Lengths,
    Plan,
    RowLengths,
    cut,
)


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
        self._plan: tuple[int, EpochBatches] | None = None

    @abstractmethod
    def plan_epoch(self, epoch: int) -> EpochBatches:
        """The global batches of an epoch, equally many in each; a function of seed and epoch."""

    @abstractmethod
    def step_tokens(self, step: int, epoch: int) -> int:
        """What the summed loss of a global batch of the current plan is divided by."""

    @property
    def sampler(self) -> "StepSampler":
        """Itself: Lightning looks for `set_epoch` at `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; one of another epoch begins at its start."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def plan(self) -> EpochBatches:
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
        step_tokens = self.step_tokens(step, epoch)
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
        source_lengths: RowLengths,
        target_lengths: RowLengths,
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
        self.planner = LengthPlanner(source_lengths, target_lengths, batch_tokens)

    def plan_epoch(self, epoch: int) -> EpochPlan:
        return self.planner.epoch(self.seed, epoch)

    def plan(self) -> EpochPlan:
        plan = super().plan()
        assert isinstance(plan, EpochPlan)
        return plan

    def step_tokens(self, step: int, epoch: int) -> int:
        return self.plan().target_tokens(step)

    def largest(self) -> int:
        """The step whose batch has the most tokens, padding included, in the current epoch."""
        return self.plan().largest()


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
