import math

import pytest
import torch
from torch import Tensor

from tx_lightning.decoding import BeginWith, MinLength, NoRepeatNgram
from tx_lightning.decoding.filters import ban, force, keep_min_p, keep_top_k, keep_top_p

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def probabilities(*rows: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).log()


def kept(log_probs: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in log_probs]


@DTYPES
def test_min_length_bans_eos_until_the_length_is_reached(dtype: torch.dtype) -> None:
    for length, expected in [(0, [0, 1, 3]), (1, [0, 1, 3]), (2, [0, 1, 2, 3])]:
        log_probs = torch.zeros(1, 4, dtype=dtype)
        MinLength(2)(log_probs, torch.zeros(1, length, dtype=torch.int64), 2)
        assert kept(log_probs) == [expected]


@DTYPES
def test_begin_with_leaves_one_token_at_each_of_the_first_places(dtype: torch.dtype) -> None:
    for length, expected in [(0, [3]), (1, [1]), (2, [0, 1, 3])]:
        log_probs = probabilities([0.2, 0.3, 0.0, 0.5], dtype=dtype)
        before = log_probs.clone()
        BeginWith([3, 1])(log_probs, torch.zeros(1, length, dtype=torch.int64), 0)
        assert kept(log_probs) == [expected]
        assert torch.equal(log_probs[0, expected], before[0, expected])


@DTYPES
def test_no_repeat_ngram_bans_what_would_complete_a_seen_ngram(dtype: torch.dtype) -> None:
    # Row 0 has seen 3 4 and 3 5 and stands after 3; row 1 stands after 5, seen only just now.
    tokens = torch.tensor([[3, 4, 3, 5, 3], [3, 3, 3, 4, 5]])
    log_probs = torch.zeros(2, 7, dtype=dtype)
    NoRepeatNgram(2)(log_probs, tokens, 2)
    assert kept(log_probs) == [[0, 1, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_no_repeat_ngram_of_three_needs_two_matching_tokens() -> None:
    tokens = torch.tensor([[3, 4, 5, 3, 4], [3, 4, 5, 6, 4]])
    log_probs = torch.zeros(2, 7)
    NoRepeatNgram(3)(log_probs, tokens, 2)
    assert kept(log_probs) == [[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_no_repeat_ngram_of_one_bans_every_token_seen() -> None:
    log_probs = torch.zeros(1, 6)
    NoRepeatNgram(1)(log_probs, torch.tensor([[3, 5, 3]]), 2)
    assert kept(log_probs) == [[0, 1, 2, 4]]


def test_no_repeat_ngram_leaves_short_rows_alone_and_keeps_earlier_bans() -> None:
    log_probs = torch.tensor([[0.0, -math.inf, -1.0]])
    NoRepeatNgram(3)(log_probs, torch.tensor([[2, 2]]), 0)
    assert log_probs.tolist() == [[0.0, -math.inf, -1.0]]
    NoRepeatNgram(2)(log_probs, torch.tensor([[1, 1, 2]]), 0)
    assert log_probs.tolist() == [[0.0, -math.inf, -1.0]]


@DTYPES
def test_top_k_keeps_the_k_most_probable(dtype: torch.dtype) -> None:
    log_probs = probabilities([0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1], dtype=dtype)
    keep_top_k(log_probs, 2)
    assert kept(log_probs) == [[1, 3], [0, 1]]


def test_top_k_of_the_whole_vocabulary_changes_nothing() -> None:
    log_probs = probabilities([0.1, 0.4, 0.5], dtype=torch.float32)
    keep_top_k(log_probs, 5)
    assert kept(log_probs) == [[0, 1, 2]]


@DTYPES
@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.01, [1]), (0.45, [1]), (0.55, [1, 3]), (0.8, [1, 2, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_nucleus(
    p: float, expected: list[int], dtype: torch.dtype
) -> None:
    log_probs = probabilities([0.05, 0.5, 0.2, 0.25], dtype=dtype)
    keep_top_p(log_probs, p)
    assert kept(log_probs) == [expected]


def test_top_p_counts_shares_of_what_earlier_filters_left() -> None:
    log_probs = probabilities([0.0, 0.3, 0.1, 0.0], dtype=torch.float64)
    keep_top_p(log_probs, 0.7)
    assert kept(log_probs) == [[1]]


def test_top_p_of_one_keeps_even_the_rarest() -> None:
    log_probs = probabilities([1.0, 1e-12, 1e-12], dtype=torch.float32)
    keep_top_p(log_probs, 1.0)
    assert kept(log_probs) == [[0, 1, 2]]


@DTYPES
def test_min_p_compares_with_the_most_probable(dtype: torch.dtype) -> None:
    log_probs = probabilities([0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.3, 0.3], dtype=dtype)
    keep_min_p(log_probs, 0.5)
    assert kept(log_probs) == [[0, 1], [0, 1, 2, 3]]
    keep_min_p(log_probs, 0.0)
    assert kept(log_probs) == [[0, 1], [0, 1, 2, 3]]


def test_ban_and_force() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    ban(log_probs, [0])
    force(log_probs, torch.tensor([-1, 0]))
    assert log_probs.tolist() == [[-math.inf, -2.0, -3.0], [0.0, -math.inf, -math.inf]]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1; it is 0"):
        NoRepeatNgram(0)
    with pytest.raises(ValueError, match="length must be at least 0; it is -1"):
        MinLength(-1)
