"""The cache is concatenation along the positions, only faster."""

import pytest
import torch

from tx_lightning.nn.cache import KeyValueCache, KeyValues


def new(rows: int, length: int = 1) -> KeyValues:
    return KeyValues(torch.randn(rows, 2, length, 3), torch.randn(rows, 2, length, 3))


def concatenate(parts: list[KeyValues]) -> KeyValues:
    keys, values = zip(*parts, strict=True)
    return KeyValues(torch.cat(keys, dim=2), torch.cat(values, dim=2))


@pytest.mark.parametrize("lengths", [[1] * 70, [31, 1, 1, 1], [5, 40, 200], [64]])
def test_append_is_concatenation(lengths: list[int]) -> None:
    cache, parts = KeyValueCache(), []
    for length in lengths:
        parts.append(new(4, length))
        so_far = cache.append(parts[-1])
        torch.testing.assert_close(so_far, concatenate(parts), rtol=0, atol=0)
    assert cache.length == sum(lengths)


def test_the_buffer_grows_seldom() -> None:
    cache, buffers = KeyValueCache(), set()
    for _ in range(200):
        buffers.add(cache.append(new(1)).keys.data_ptr())
    assert len(buffers) <= 4


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 2, 2], []])
def test_select_keeps_reorders_and_repeats(rows: list[int]) -> None:
    cache, first, second = KeyValueCache(), new(3, 4), new(len(rows), 33)
    cache.append(first)
    cache.select(torch.tensor(rows, dtype=torch.long))
    expected = concatenate([KeyValues(first.keys[rows], first.values[rows]), second])
    torch.testing.assert_close(cache.append(second), expected, rtol=0, atol=0)


def test_repeated_rows_are_copies() -> None:
    cache = KeyValueCache()
    cache.append(new(1))
    cache.select(torch.tensor([0, 0]))
    newest = new(2)
    assert torch.equal(cache.append(newest).keys[:, :, 1:], newest.keys)


def test_select_before_the_first_append() -> None:
    cache, first = KeyValueCache(), new(2)
    cache.select(torch.tensor([0, 0, 0]))
    torch.testing.assert_close(cache.append(first), first)


def test_key_values_select() -> None:
    pair = new(3)
    chosen = pair.select(torch.tensor([2, 2]))
    assert torch.equal(chosen.keys, pair.keys[[2, 2]])
    assert torch.equal(chosen.values, pair.values[[2, 2]])


def test_types_are_kept() -> None:
    pair = KeyValues(*(t.bfloat16() for t in new(2)))
    assert KeyValueCache().append(pair).values.dtype == torch.bfloat16
