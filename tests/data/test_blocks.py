"""Blocks of a stream: each token predicted once, from what stands before it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tx_lightning.data.blocks import (
    IGNORED,
    BlockBatch,
    BlockBatches,
    BlockSampler,
    Windows,
    WindowSampler,
)
from tx_lightning.data.errors import DataError
from tx_lightning.data.sampler import Share

EOS = 2
STREAM = np.array([10, 11, 12, EOS, 20, 21, EOS, 30, EOS, 40, 41], dtype=np.uint16)


def evaluated(windows: Windows, length: int, batch_tokens: int = 8) -> list[BlockBatch]:
    data = BlockBatches(STREAM, length, EOS, windows)
    return [data.__getitems__(share) for share in WindowSampler(windows, length, batch_tokens)]


def predictions(batches: list[BlockBatch]) -> list[tuple[tuple[int, ...], int]]:
    """What each predicted token is predicted from, and the token."""
    found = []
    for batch in batches:
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            for i, target in enumerate(targets):
                if target != IGNORED:
                    found.append((tuple(ids[: i + 1]), target))
    return found


def test_a_training_batch_value_by_value() -> None:
    share = Share(np.array([0, 4]), step_tokens=12, parts=2)
    batch = BlockBatches(STREAM, 3, EOS).__getitems__(share)
    assert batch.ids.tolist() == [[EOS, 10, 11], [EOS, 20, 21]]
    assert batch.targets.tolist() == [[10, 11, 12], [20, 21, EOS]]
    assert (batch.predicted, batch.step_tokens, batch.parts, batch.rows) == (6, 12, 2, 2)
    assert (batch.tokens, batch.positions, batch.loss_tokens) == (6, 6, 6)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64


def test_a_share_that_is_not_real_predicts_nothing() -> None:
    share = Share(np.array([4]), step_tokens=12, parts=2, real=False)
    batch = BlockBatches(STREAM, 3, EOS).__getitems__(share)
    assert batch.targets.tolist() == [[IGNORED] * 3]
    assert batch.predicted == batch.tokens == 0


def test_blocks_side_by_side_predict_every_token_once() -> None:
    found = predictions(evaluated(Windows.side_by_side(len(STREAM), 4), 4))
    assert [target for _, target in found] == STREAM.tolist()
    assert found[0] == ((EOS,), 10)
    assert found[4] == ((EOS,), 20)
    assert found[6] == ((EOS, 20, 21), EOS)
    assert found[-1] == ((30, EOS, 40), 41)


def test_a_window_of_stride_one_gives_each_token_a_full_context() -> None:
    found = predictions(evaluated(Windows.sliding(len(STREAM), 4, 1), 4))
    whole = [EOS, *STREAM.tolist()]
    assert found == [
        (tuple(whole[max(0, i - 3) : i + 1]), int(target)) for i, target in enumerate(STREAM)
    ]


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_count_every_token_once_with_the_promised_context(
    n_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    for windows in (
        Windows.side_by_side(n_tokens, length),
        Windows.sliding(n_tokens, length, stride),
    ):
        counted = [
            position
            for first, end in zip(windows.firsts, windows.ends, strict=True)
            for position in range(first, end)
        ]
        assert counted == list(range(n_tokens))
        assert (windows.starts <= windows.firsts).all()
        assert (windows.ends - windows.starts <= length).all()
    before = windows.firsts - windows.starts
    assert (before[windows.starts > 0] >= length - stride).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_evaluation_without_repeating(world_size: int) -> None:
    windows = Windows.side_by_side(len(STREAM), 2)
    data = BlockBatches(STREAM, 2, EOS, windows)
    seen = []
    for rank in range(world_size):
        sampler = WindowSampler(windows, 2, 4, rank=rank, world_size=world_size)
        batches = [data.__getitems__(share) for share in sampler]
        assert len(batches) == len(sampler)
        seen += [target for _, target in predictions(batches)]
    assert sorted(seen) == sorted(STREAM.tolist())


def starts_of(sampler: BlockSampler) -> list[list[int]]:
    return [share.indices.tolist() for share in sampler]


@given(st.integers(5, 200), st.integers(1, 5), st.integers(0, 5))
def test_an_epoch_takes_each_token_at_most_once(n_tokens: int, length: int, epoch: int) -> None:
    sampler = BlockSampler(n_tokens, length, 3 * length, seed=1)
    sampler.set_epoch(epoch)
    starts = sorted(start for batch in starts_of(sampler) for start in batch)
    assert len(starts) >= 1
    assert starts[0] >= 0
    assert starts[-1] + length <= n_tokens
    assert (np.diff(starts) == length).all()
    assert n_tokens - length * len(starts) < 2 * length


def test_epochs_differ_in_offset_and_order_but_not_in_length() -> None:
    sampler = BlockSampler(1000, 7, 28, seed=3)
    epochs = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        epochs.append(starts_of(sampler))
        assert len(epochs[-1]) == len(sampler)
    assert len({len(epoch) for epoch in epochs}) == 1
    assert len({min(start for batch in epoch for start in batch) for epoch in epochs}) > 2
    again = BlockSampler(1000, 7, 28, seed=3)
    again.set_epoch(4)
    assert starts_of(again) == epochs[4]
    fixed = BlockSampler(1000, 7, 28, seed=3, reshuffle=False)
    fixed.set_epoch(4)
    assert starts_of(fixed) == epochs[0]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 4)])
def test_parts_of_a_step_add_up_to_it(world_size: int, accumulate: int) -> None:
    data = BlockBatches(np.arange(100, dtype=np.uint16), 4, EOS)
    whole = starts_of(BlockSampler(100, 4, 20, seed=0))
    parts: list[list[int]] = [[] for _ in whole]
    counted = [0] * len(whole)
    for rank in range(world_size):
        sampler = BlockSampler(
            100, 4, 20, seed=0, rank=rank, world_size=world_size, accumulate=accumulate
        )
        for i, share in enumerate(sampler):
            batch = data.__getitems__(share)
            parts[i // accumulate] += batch.indices if share.real else []
            counted[i // accumulate] += batch.predicted
            assert batch.step_tokens == 4 * len(whole[i // accumulate])
            assert batch.parts == world_size * accumulate
    assert [sorted(part) for part in parts] == [sorted(batch) for batch in whole]
    assert counted == [4 * len(batch) for batch in whole]


def test_too_little_text_and_too_small_a_budget_are_refused() -> None:
    with pytest.raises(DataError, match=r"block_length is 8, but .* only 7 tokens"):
        BlockSampler(7, 8, 64, seed=0)
    with pytest.raises(DataError, match=r"batch_tokens is 7, less than one block"):
        BlockSampler(70, 8, 7, seed=0)
