from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_lightning.data import plans
from tx_lightning.data.errors import DataError
from tx_lightning.data.plans import EpochPlan, LengthPlanner, cut
from tx_lightning.data.sampler import ShardSampler, Share, TokenBatchSampler

IntArray = npt.NDArray[np.int32]
BUDGET = 64
lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=80)


def arrays(pairs: list[tuple[int, int]]) -> tuple[IntArray, IntArray]:
    source, target = np.array(pairs, dtype=np.int32).T
    return source, target


def plan_batches(
    source: IntArray, target: IntArray, budget: int, seed: int, epoch: int, pool: int = 2**22
) -> EpochPlan:
    return LengthPlanner(source, target, budget, pool=pool).epoch(seed, epoch)


def corpus(n: int = 500) -> tuple[IntArray, IntArray]:
    random = np.random.default_rng(7)
    source = random.integers(1, 30, n).astype(np.int32)
    target = np.clip(source + random.integers(-5, 6, n), 1, 30).astype(np.int32)
    return source, target


def batches_of(plan: EpochPlan) -> list[list[int]]:
    return [plan[b].tolist() for b in range(len(plan))]


def sampler(
    rank: int = 0, world_size: int = 1, accumulate: int = 1, reshuffle: bool = True, n: int = 500
) -> TokenBatchSampler:
    return TokenBatchSampler(
        *corpus(n),
        BUDGET,
        seed=3,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        reshuffle=reshuffle,
    )


def real(shares: list[Share]) -> list[int]:
    return [i for share in shares if share.real for i in share.indices.tolist()]


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 3), st.integers(0, 3), st.integers(1, 90))
def test_a_plan_holds_every_pair_once_within_the_budget(
    pairs: list[tuple[int, int]], seed: int, epoch: int, pool: int
) -> None:
    source, target = arrays(pairs)
    batches = batches_of(plan_batches(source, target, BUDGET, seed, epoch, pool))
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) * max(source[batch].max(), target[batch].max()) <= BUDGET


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 3), st.integers(1, 90))
def test_every_epoch_has_the_same_number_of_batches(
    pairs: list[tuple[int, int]], seed: int, pool: int
) -> None:
    source, target = arrays(pairs)
    assert len({len(plan_batches(source, target, BUDGET, seed, e, pool)) for e in range(5)}) == 1


def test_the_number_of_batches_does_not_hang_on_the_tie_break() -> None:
    # Ties of the sort have sources of 20 to 23 tokens: 3 rows fit or 2.
    source = np.random.default_rng(0).integers(20, 24, 300).astype(np.int32)
    target = np.full(300, 5, dtype=np.int32)
    assert len({len(plan_batches(source, target, BUDGET, 0, epoch)) for epoch in range(10)}) == 1


def test_epochs_and_seeds_differ_in_batches_and_in_their_order() -> None:
    first = batches_of(plan_batches(*corpus(), BUDGET, 0, 0))
    assert first == batches_of(plan_batches(*corpus(), BUDGET, 0, 0))
    for seed, epoch in ((0, 1), (1, 0)):
        other = batches_of(plan_batches(*corpus(), BUDGET, seed, epoch))
        assert [len(batch) for batch in first] != [len(batch) for batch in other]
        assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}


def test_pools_mix_all_of_the_corpus_and_come_in_an_order_of_their_own() -> None:
    source, target = corpus(20_000)
    planner = LengthPlanner(source, target, BUDGET, pool=4096)
    assert len(planner.n_batches) == 5
    firsts = []
    for epoch in range(4):
        batches = batches_of(planner.epoch(0, epoch))
        first = np.array(sorted(i for batch in batches[:100] for i in batch))
        assert first.min() < 5 * 1024
        assert first.max() > 15_000  # rows of a pool stand in runs all over the file
        firsts.append(tuple(sorted({int(i) // 1024 % 5 for i in first})))
    assert len(set(firsts)) > 1
    assert all(len(pools) == 1 for pools in firsts)


def test_a_step_can_be_asked_for_out_of_order() -> None:
    planner = LengthPlanner(*corpus(), BUDGET, pool=100)
    whole = batches_of(planner.epoch(1, 2))
    plan = planner.epoch(1, 2)
    for step in (len(whole) - 1, 0, len(whole) // 2, 1):
        assert plan[step].tolist() == whole[step]


@pytest.mark.parametrize("pool", [2**22, 100])
def test_the_largest_batch_is_found(pool: int) -> None:
    source, target = corpus()
    source[17], target[17] = 29, 80  # a batch alone, and the largest
    plan = plan_batches(source, target, BUDGET, 0, 3, pool)
    assert plan[plan.largest()].tolist() == [17]


def test_few_keys_and_many_are_ranked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = batches_of(plan_batches(*corpus(), BUDGET, 0, 0))
    monkeypatch.setattr(plans, "_COUNTED", 0)
    assert batches_of(plan_batches(*corpus(), BUDGET, 0, 0)) == counted


def test_batches_are_not_in_the_order_of_length() -> None:
    _, target = corpus()
    widths = [target[batch].max() for batch in batches_of(plan_batches(*corpus(), BUDGET, 0, 0))]
    assert sum(a > b for a, b in pairwise(widths)) > len(widths) / 4


def test_little_is_padded() -> None:
    source, target = corpus(5000)
    batches = batches_of(plan_batches(source, target, 512, 0, 0))
    cells = sum(len(batch) * target[batch].max() for batch in batches)
    assert target.sum() / cells > 0.97


def cut_by_hand(cost: list[int], budget: int) -> list[int]:
    starts, rows, widest = [0], 0, 0
    for position, width in enumerate(cost):
        if rows and (rows + 1) * max(widest, width) > budget:
            starts.append(position)
            rows, widest = 0, 0
        rows, widest = rows + 1, max(widest, width)
    return [*starts, len(cost)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_cut_is_the_greedy_cut(cost: list[int], budget: int) -> None:
    assert cut(np.array(cost), budget).tolist() == cut_by_hand(cost, budget)


def test_no_pairs_make_no_batches() -> None:
    nothing = np.array([], dtype=np.int32)
    assert len(plan_batches(nothing, nothing, BUDGET, 0, 0)) == 0
    assert list(ShardSampler(nothing, nothing, BUDGET)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_ranks_share_every_epoch_exactly(world_size: int, accumulate: int) -> None:
    ranks = [sampler(rank, world_size, accumulate) for rank in range(world_size)]
    for epoch in range(3):
        for rank in ranks:
            rank.set_epoch(epoch)
        shares = [list(rank) for rank in ranks]
        assert {len(given) for given in shares} == {len(ranks[0])}
        assert len(ranks[0]) % accumulate == 0
        assert sorted(real([s for given in shares for s in given])) == list(range(500))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_global_batches_do_not_depend_on_the_number_of_processes(
    world_size: int, accumulate: int
) -> None:
    one = sampler()
    one.set_epoch(2)
    steps = [(sorted(share.indices.tolist()), share.step_tokens) for share in one]
    ranks = [sampler(rank, world_size, accumulate) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(2)
    shares = [list(rank) for rank in ranks]
    for step, (indices, tokens) in enumerate(steps):
        window = slice(step * accumulate, (step + 1) * accumulate)
        of_step = [share for given in shares for share in given[window]]
        assert sorted(real(of_step)) == indices
        assert {share.step_tokens for share in of_step} == {tokens}
        assert {share.parts for share in of_step} == {world_size * accumulate}


def test_world_size_and_accumulation_may_be_traded() -> None:
    def micro_batches(world_size: int, accumulate: int) -> list[tuple[list[int], bool]]:
        ranks = [list(sampler(r, world_size, accumulate)) for r in range(world_size)]
        turns = zip(*ranks, strict=True)
        return [(share.indices.tolist(), share.real) for turn in turns for share in turn]

    assert micro_batches(6, 1) == micro_batches(3, 2) == micro_batches(2, 3) == micro_batches(1, 6)


def test_step_tokens_counts_the_targets_of_the_whole_step() -> None:
    _, target = corpus()
    for rank in range(2):
        two = sampler(rank, world_size=2)
        for step, share in enumerate(two):
            assert share.step_tokens == target[two.plan()[step]].sum()


def test_an_empty_share_carries_one_example_that_counts_nothing() -> None:
    source = target = np.array([30, 30, 30], dtype=np.int32)  # two rows a batch at most
    shares = [
        share
        for rank in range(4)
        for share in TokenBatchSampler(source, target, BUDGET, seed=0, rank=rank, world_size=4)
    ]
    lent = [share for share in shares if not share.real]
    assert sorted(real(shares)) == [0, 1, 2]
    assert len(lent) == 5
    assert all(len(share.indices) == 1 for share in lent)


def test_a_pass_continues_from_start_once() -> None:
    whole = [share.indices.tolist() for share in sampler(accumulate=2)]
    resumed = sampler(accumulate=2)
    resumed.start = 7
    assert [share.indices.tolist() for share in resumed] == whole[7:]
    assert [share.indices.tolist() for share in resumed] == whole
    assert len(resumed) == len(whole)


def test_another_epoch_begins_at_its_start() -> None:
    resumed = sampler()
    resumed.start = 7
    resumed.set_epoch(0)
    assert resumed.start == 7
    resumed.set_epoch(1)
    assert resumed.start == 0


def test_lightning_finds_set_epoch_at_the_sampler_of_the_batch_sampler() -> None:
    one = sampler()
    one.sampler.set_epoch(5)
    assert one.epoch == 5


def test_without_reshuffling_all_epochs_are_alike() -> None:
    fixed = sampler(reshuffle=False)
    first = real(list(fixed))
    fixed.set_epoch(1)
    assert real(list(fixed)) == first


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 4))
def test_evaluation_neither_pads_nor_repeats(pairs: list[tuple[int, int]], world_size: int) -> None:
    source, target = arrays(pairs)
    if len(pairs) < world_size:
        with pytest.raises(DataError, match=f"{len(pairs)} examples to evaluate for {world_size} "):
            ShardSampler(source, target, BUDGET, world_size=world_size)
        return
    shards = [
        ShardSampler(source, target, BUDGET, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [list(shard) for shard in shards]
    assert [len(shard) for shard in shards] == [len(given) for given in shares]
    assert all(shares), "Lightning would not evaluate on this rank, and the others would wait"
    flat = [i for given in shares for share in given for i in share.indices.tolist()]
    assert sorted(flat) == list(range(len(pairs)))


def test_evaluation_batches_are_the_same_on_any_number_of_processes() -> None:
    def batches(world_size: int) -> set[tuple[int, ...]]:
        shards = [
            ShardSampler(*corpus(), BUDGET, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return {tuple(share.indices.tolist()) for shard in shards for share in shard}

    assert batches(1) == batches(2) == batches(3)


def test_evaluation_starts_with_the_longest_and_keeps_the_budget() -> None:
    source, target = corpus()
    shares = list(ShardSampler(source, target, BUDGET))
    longest = [int(source[share.indices].max()) for share in shares]
    assert longest == sorted(longest, reverse=True)
    for share in shares:
        rows = share.indices
        assert len(rows) * max(source[rows].max(), target[rows].max()) <= BUDGET
        assert (share.step_tokens, share.parts) == (target[rows].sum(), 1)


def test_evaluation_keeps_a_pair_longer_than_the_budget() -> None:
    long = np.array([2 * BUDGET, 3], dtype=np.int32)
    assert [share.indices.tolist() for share in ShardSampler(long, long, BUDGET)] == [[0], [1]]
