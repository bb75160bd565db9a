"""Which rows make a batch, and in which order: a pure function of lengths, budget, seed and epoch.

Lengths here count EOS. A batch of n rows costs n x the longest side in it, padding included, and
stays within a budget of tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.integer[Any]]

POOL = 2**22  # the most rows that are planned at a time
_RUN = 1024  # rows that stand side by side in a file and come into one pool
_GRAIN = 4  # source lengths are sorted in steps of this many tokens
_COUNTED = 2**22  # keys below are counted, which is faster than to sort them


class RowLengths(Protocol):
    """The lengths of all rows of a side: an array, or what reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class EpochBatches(Protocol):
    """The batches of an epoch: positions of rows in the store."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int, /) -> Indices: ...


@dataclass(frozen=True)
class Plan:
    """Batches of rows: batch b holds `order[starts[b]:starts[b + 1]]`.

    Args:
        order: Each row's position in the store once, batch after batch.
        starts: Where each batch starts in `order`, and the end of the last.
    """

    order: Indices
    starts: Indices

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, batch: int) -> Indices:
        return self.order[self.starts[batch] : self.starts[batch + 1]]


class LengthPlanner:
    """Plans epochs of batches of rows of like length.

    Rows are sorted by target length, then roughly by source length; ties are broken at random, and
    then the batches are shuffled. Every epoch has the same number of batches, because the sequence
    of sort keys is the same and the cuts see nothing but the keys.

    Many rows are dealt to pools, each of which is sorted, cut and shuffled for itself, and whose
    order is shuffled as well: so memory is that of one pool, however many rows there are.

    Args:
        source_lengths: Source tokens of each row, EOS included.
        target_lengths: Target tokens of each row, EOS included.
        batch_tokens: Budget of a batch: rows x longest side. A longer row is a batch alone.
        pool: The most rows of a pool.
    """

    def __init__(
        self,
        source_lengths: RowLengths,
        target_lengths: RowLengths,
        batch_tokens: int,
        *,
        pool: int = POOL,
    ) -> None:
        self.source_lengths = source_lengths
        self.target_lengths = target_lengths
        self.batch_tokens = batch_tokens
        self._n_pools = max(1, -(-len(target_lengths) // pool))
        self._run = min(_RUN, pool)
        cuts = [self._cut(number) for number in range(self._n_pools)]
        self._starts = [starts for starts, _ in cuts]
        self.n_batches = [len(starts) - 1 for starts in self._starts]  # of each pool
        self.costs = [cost for _, cost in cuts]  # at most; of the largest batch of each pool

    def epoch(self, seed: int, epoch: int) -> "EpochPlan":
        """The batches of an epoch in the order of training; every row exactly once.

        Args:
            seed: With `epoch`, decides the order.
            epoch: Counts from 0.
        """
        return EpochPlan(self, seed, epoch)

    def pool(self, number: int, seed: int, epoch: int) -> tuple[Plan, Indices]:
        """The batches of one pool in the order of training, and the target tokens of each."""
        parts = [seed, epoch] if self._n_pools == 1 else [seed, epoch, number]
        random = np.random.default_rng(parts)
        rows = self._rows(number)
        keys, of_each = self._keys(rows)
        ranks = _ranked(keys)[0]
        shuffled = random.permutation(np.arange(len(ranks), dtype=np.int32))
        order = shuffled[np.argsort(ranks[shuffled], kind="stable")]
        starts = self._starts[number]
        batches = random.permutation(len(starts) - 1)
        if len(order) == 0:
            return Plan(order.astype(np.int64), starts), np.zeros(0, dtype=np.int64)
        tokens = np.add.reduceat(keys[order] // of_each, starts[:-1])[batches]
        return _reorder(order if rows is None else rows[order], starts, batches), tokens

    def _rows(self, number: int) -> npt.NDArray[np.int32] | None:
        """The rows of a pool; None: all."""
        if self._n_pools == 1:
            return None
        runs = np.arange(number, -(-len(self.target_lengths) // self._run), self._n_pools)
        rows = (runs[:, None] * self._run + np.arange(self._run)).reshape(-1)
        return rows[rows < len(self.target_lengths)].astype(np.int32)

    def _keys(self, rows: npt.NDArray[np.int32] | None) -> tuple[Indices, int]:
        """What rows are sorted by, and how many keys there are for one target length."""
        chosen: Any = slice(None) if rows is None else rows
        coarse = self.source_lengths[chosen] // _GRAIN
        of_each = int(coarse.max(initial=0)) + 1
        keys = self.target_lengths[chosen].astype(np.int64)
        keys *= of_each
        keys += coarse
        return keys, of_each

    def _cut(self, number: int) -> tuple[Indices, int]:
        """Where the batches of a pool start, in the order of keys, and the cost of the largest."""
        keys, of_each = self._keys(self._rows(number))
        _, values, counts = _ranked(keys)
        # Upper bound of the cost over all rows of a key, so that no cut depends on the tie-break.
        widest = np.maximum(values // of_each, values % of_each * _GRAIN + _GRAIN - 1)
        cost = np.repeat(widest, counts)
        starts = cut(cost, self.batch_tokens)
        if len(cost) == 0:
            return starts, 0
        largest = np.diff(starts) * np.maximum.reduceat(cost, starts[:-1])
        return starts, int(largest.max())


class EpochPlan:
    """The batches of one epoch, planned pool by pool as they are asked for.

    Args:
        planner: Plans the pools.
        seed: With `epoch`, decides the order.
        epoch: Counts from 0.
    """

    def __init__(self, planner: LengthPlanner, seed: int, epoch: int) -> None:
        self.planner = planner
        self.seed = seed
        self.epoch = epoch
        n_pools = len(planner.n_batches)
        self._pools = np.random.default_rng([seed, epoch]).permutation(n_pools)
        self._ends = np.cumsum(np.array(planner.n_batches)[self._pools])
        self._planned: tuple[int, Plan, Indices] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, batch: int) -> Indices:
        first, plan, _ = self._at(self._place(batch))
        return plan[batch - first]

    def target_tokens(self, batch: int) -> int:
        """The target tokens of a batch, EOS included."""
        first, _, tokens = self._at(self._place(batch))
        return int(tokens[batch - first])

    def _place(self, batch: int) -> int:
        return int(np.searchsorted(self._ends, batch, side="right"))

    def _at(self, place: int) -> tuple[int, Plan, Indices]:
        """The pool at a place of this epoch: its first batch, its plan, tokens of each batch."""
        if self._planned is None or self._planned[0] != place:
            self._planned = None  # give its memory back first
            number = int(self._pools[place])
            self._planned = place, *self.planner.pool(number, self.seed, self.epoch)
        return int(self._ends[place - 1]) if place else 0, *self._planned[1:]

    def largest(self) -> int:
        """The batch that has the most tokens, padding included, where cuts let most in."""
        costs = np.array(self.planner.costs)[self._pools]
        first, plan, _ = self._at(int(costs.argmax()))
        sides = self.planner.source_lengths, self.planner.target_lengths
        widths = np.maximum(*(lengths[plan.order] for lengths in sides))
        widest = np.maximum.reduceat(widths, plan.starts[:-1])
        return first + int(np.lexsort((widest, np.diff(plan.starts) * widest))[-1])


def _ranked(keys: Indices) -> tuple[npt.NDArray[Any], Indices, Indices]:
    """Each key's rank among all, the different keys in order, and how often each is there.

    Ranks have 16 bits where that is enough: numpy then sorts in O(n).
    """
    if len(keys) and keys.max() < _COUNTED:
        often = np.bincount(keys)
        values = np.flatnonzero(often)
        counts = often[values]
        table = np.zeros(len(often), dtype=np.uint16 if len(values) <= 2**16 else np.uint32)
        table[values] = np.arange(len(values))
        return table[keys], values, counts
    values, ranks, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return (ranks.astype(np.uint16) if len(values) <= 2**16 else ranks), values, counts


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


def _reorder(order: npt.NDArray[Any], starts: Indices, batches: Indices) -> Plan:
    """Put whole batches into another order."""
    sizes = np.diff(starts)[batches]
    ends = np.cumsum(sizes)
    taken = np.repeat(starts[:-1][batches] - (ends - sizes), sizes)
    taken += np.arange(len(order))
    return Plan(order[taken], np.concatenate([np.zeros(1, dtype=np.int64), ends]))
