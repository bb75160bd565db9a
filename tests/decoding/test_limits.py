"""Numbers at and beyond their limits: a right result, or one line, and no memory for them all."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoding.toy import BOS, EOS, Network, start, table_step
from tx_lightning.decoding import Beam, Decoding, Greedy, MinLength, NoRepeatNgram, Sampling
from tx_lightning.decoding.limits import MOST_TOKENS
from tx_lightning.decoding.sampling import _STEPS, tempered
from tx_lightning.decoding.search import _ROOM, widened

SENTENCES = list(range(8))
LENGTHS = torch.arange(1, 9)


def decoded(decoding: Decoding) -> list[list[list[int]]]:
    network = Network(9, dtype=torch.float32, seed=0)
    found = decoding(network.step, network.start(SENTENCES), LENGTHS)
    return [[hypothesis.tokens for hypothesis in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_a_temperature_of_almost_nothing_is_greedy_decoding(temperature: float) -> None:
    assert decoded(Sampling(temperature=temperature)) == decoded(Greedy())


@pytest.mark.parametrize("temperature", [1e30, 1e300, 1.7e308, 10**18])
def test_an_endless_temperature_is_uniform_over_what_may_follow(temperature: float) -> None:
    follow = [0.0, 0.0, 0.05, 0.0, 0.9, 0.05]
    n = 2000
    found = Sampling(n_samples=n, temperature=temperature)(
        table_step(lambda sentence, tokens: follow, torch.float32),
        start(1),
        max_lengths=torch.tensor([1]),
    )
    ids = [h.tokens[0] if h.tokens else EOS for h in found[0]]
    shares = [ids.count(token) / n for token in range(6)]
    assert shares == pytest.approx([0, 0, 1 / 3, 0, 1 / 3, 1 / 3], abs=0.05)
    assert shares[0] == shares[BOS] == shares[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_divides_log_probabilities(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 7, dtype=dtype) * 5
    logits[0, :3] = -math.inf
    for temperature in (1e-2, 0.3, 1.0, 7.0, 1e4):
        expected = (logits.double() / temperature).softmax(dim=1)
        found = tempered(logits.log_softmax(dim=1), temperature).softmax(dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_numbers_are_drawn_as_far_as_the_search_comes_and_are_those_of_one_draw() -> None:
    """A sample of more steps than are drawn at once is that of numbers drawn in one go."""
    steps = 3 * _STEPS
    follow = [0.0, 0.0, 0.0, 0.25, 0.25, 0.5]
    found = Sampling(seed=7)(
        table_step(lambda sentence, tokens: follow),
        start(1),
        max_lengths=torch.tensor([steps]),
        indices=[5],
    )
    stream = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(5, 0)))
    draws = stream.random(steps, np.float32)
    assert found[0][0].tokens == [3 if u < 0.25 else 4 if u < 0.5 else 5 for u in draws]


@pytest.mark.parametrize("make", [Greedy, Sampling, Beam, lambda **a: Beam(n_best=3, **a)])
def test_limits_that_are_never_reached_change_nothing_and_cost_nothing(make: Any) -> None:
    """Every hypothesis ends by itself; 64 rows of a million tokens would be half a gigabyte."""
    follow = [0.0, 0.0, 0.5, 0.25, 0.15, 0.1]
    step = table_step(lambda sentence, tokens: follow if len(tokens) < 20 else [0, 0, 1, 0, 0, 0])
    results = []
    for offset, ratio in ((100, 2.0), (MOST_TOKENS, 1000.0)):
        decoding = make(max_length_offset=offset, max_length_ratio=ratio)
        found = decoding(step, start(4), torch.tensor([1, 2, 3, 9]))
        results.append([[h.tokens for h in hypotheses] for hypotheses in found])
    assert results[0] == results[1]


def test_room_for_tokens_is_made_as_they_come() -> None:
    tokens = torch.ones(2, 3, 5, dtype=torch.int64)
    once = widened(tokens, 6, MOST_TOKENS, 0)
    assert once.shape == (2, 3, _ROOM)
    assert once[:, :, :5].eq(1).all()
    assert once[:, :, 5:].eq(0).all()
    assert widened(once, _ROOM + 1, MOST_TOKENS, 0).shape[-1] == 2 * _ROOM
    assert widened(once, 1000, MOST_TOKENS, 0).shape[-1] == 1000
    assert widened(tokens, 6, 7, 0).shape[-1] == 7


@pytest.mark.parametrize(
    ("search", "plain"),
    [
        (Sampling(top_k=10**12), Sampling()),
        (Sampling(top_k=10**18, top_p=1.0, min_p=0.0), Sampling()),
        (Sampling(length_penalty=10.0, n_samples=1), Sampling()),
        (Greedy(length_penalty=10.0), Greedy()),
        (
            Greedy(max_length_ratio=0, max_length_offset=-MOST_TOKENS),
            Greedy(max_length_ratio=0, max_length_offset=1),
        ),
        (Greedy(filters=[NoRepeatNgram(10**18)]), Greedy()),
        (Beam(beam_size=2000), Beam(beam_size=1000)),
    ],
)
def test_huge_numbers_mean_what_they_say(search: Decoding, plain: Decoding) -> None:
    assert decoded(search) == decoded(plain)


def test_a_minimum_beyond_the_maximum_is_the_maximum() -> None:
    """The end is not reached before the maximum length cuts what there is."""
    limits = (2 * LENGTHS + 10).tolist()
    for [tokens], limit in zip(decoded(Greedy(filters=[MinLength(10**18)])), limits, strict=True):
        assert len(tokens) == limit


def test_the_strongest_penalty_orders_by_length() -> None:
    """Exponents beyond it would overflow; at it, quotients of 1,000 tokens are still told apart."""
    follow = [0.0, 0.0, 0.5, 0.5, 0.0, 0.0]
    found = Beam(beam_size=4, n_best=4, length_penalty=10.0)(
        table_step(lambda sentence, tokens: follow), start(1), max_lengths=torch.tensor([200])
    )
    scores = [hypothesis.score for hypothesis in found[0]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4
    assert all(math.isfinite(score) and score < 0 for score in scores)


@pytest.mark.parametrize(
    ("make", "argument", "says"),
    [
        (Beam, {"beam_size": 10**9}, "beam_size must be at most 100,000; it is 1000000000"),
        (Beam, {"beam_size": True}, "beam_size must be an integer; it is True"),
        (Beam, {"beam_size": "3"}, "beam_size must be an integer; it is '3'"),
        (Beam, {"beam_size": 3.0}, "beam_size must be an integer; it is 3.0"),
        (Beam, {"length_penalty": 1e300}, "length_penalty must be from 0 to 10; it is 1e"),
        (Beam, {"length_penalty": math.nan}, "length_penalty must be from 0 to 10; it is nan"),
        (Beam, {"length_penalty": "1"}, "length_penalty must be a number; it is '1'"),
        (Greedy, {"max_length_ratio": 1e300}, "max_length_ratio must be from 0 to 1000; it is"),
        (Greedy, {"max_length_offset": 10**18}, "max_length_offset must be at most 1,000,000"),
        (Sampling, {"temperature": math.inf}, "temperature must be a finite number; it is inf"),
        (Sampling, {"temperature": math.nan}, "temperature must be above 0; it is nan"),
        (Sampling, {"top_p": math.nan}, "top_p must be above 0 and at most 1; it is nan"),
        (Sampling, {"min_p": math.nan}, "min_p must be between 0 and 1; it is nan"),
        (Sampling, {"n_samples": 10**9}, "n_samples must be at most 100,000"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, argument: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(**argument)
