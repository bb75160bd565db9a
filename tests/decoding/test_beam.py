from collections.abc import Sequence

import pytest
import torch

from tests.decoding.toy import Network, start, table_step
from tx_lightning.decoding import Beam, Greedy, Hypothesis
from tx_lightning.decoding.scores import length_penalty

VOCAB = 6


def best(
    network: Network,
    sentence: int,
    *,
    max_length: int,
    strength: float,
    n: int,
    prefix: Sequence[int] = (),
) -> list[tuple[list[int], float]]:
    """Score everything there is: finished ones by score, then the cut ones by score."""
    allowed = list(range(3, VOCAB))
    scored = [
        (
            finished,
            log_prob / length_penalty(len(tokens) - len(prefix) + finished, strength),
            tokens,
        )
        for tokens, log_prob, finished in network.every(sentence, allowed, max_length, prefix)
    ]
    scored.sort(reverse=True)
    return [(tokens, score) for _, score, tokens in scored[:n]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beam_is_exhaustive_search(seed: int, strength: float, dtype: torch.dtype) -> None:
    network = Network(VOCAB, dtype=dtype, seed=seed)
    lengths = [5, 2, 4]
    found = Beam(beam_size=324, n_best=7, length_penalty=strength)(
        network.step, network.start([0, 1, 2]), max_lengths=torch.tensor(lengths)
    )
    for sentence, length in enumerate(lengths):
        expected = best(network, sentence, max_length=length, strength=strength, n=7)
        assert [h.tokens for h in found[sentence]] == [tokens for tokens, _ in expected]
        assert [h.score for h in found[sentence]] == pytest.approx([s for _, s in expected])


@pytest.mark.parametrize("prefixes", [[[], [4], [4, 3, 5]], [[3, 5], [4, 4], [3, 5, 2, 4]]])
@pytest.mark.parametrize("strength", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beam_is_exhaustive_search_for_what_follows_a_prefix(
    seed: int, strength: float, prefixes: list[list[int]]
) -> None:
    network = Network(VOCAB, dtype=torch.float64, seed=seed)
    lengths = [len(prefix) + free for prefix, free in zip(prefixes, [5, 2, 4], strict=True)]
    for beam_size, n in [(324, 7), (40, 1)]:  # the second prunes earlier, and loses nothing here
        beam = Beam(beam_size=beam_size, n_best=n, length_penalty=strength)
        found = beam(
            network.step,
            network.start([0, 1, 2]),
            None,
            prefixes,
            max_lengths=torch.tensor(lengths),
        )
        for sentence, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
            expected = best(
                network, sentence, max_length=length, strength=strength, n=n, prefix=prefix
            )
            assert [h.tokens for h in found[sentence]] == [tokens for tokens, _ in expected]
            assert [h.score for h in found[sentence]] == pytest.approx([s for _, s in expected])


def test_the_exhaustive_best_differ_in_length_with_the_penalty() -> None:
    # Otherwise the test above would not see the penalty.
    network = Network(VOCAB, dtype=torch.float64, seed=0)
    firsts = [
        best(network, 0, max_length=5, strength=strength, n=1)[0][0] for strength in (0.0, 3.0)
    ]
    assert len(firsts[0]) < len(firsts[1])


@pytest.mark.parametrize("strength", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_beam_of_one_is_greedy(seed: int, strength: float) -> None:
    network = Network(11, dtype=torch.float32, seed=seed)
    sentences, lengths = list(range(12)), torch.arange(1, 13)
    prefixes = [[3] * (i % 3) for i in sentences]
    beam = Beam(beam_size=1, length_penalty=strength)
    greedy = Greedy(length_penalty=strength)
    found = [
        decoding(network.step, network.start(sentences), lengths, prefixes)
        for decoding in (beam, greedy)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours[0].tokens == theirs[0].tokens
        assert ours[0].finished == theirs[0].finished
        assert ours[0].log_prob == pytest.approx(theirs[0].log_prob, rel=1e-6)
        assert ours[0].score == pytest.approx(theirs[0].score, rel=1e-6)


# Greedy takes 3 (0.6) and then ends with 0.4; by way of 4 the end is certain.
GARDEN_PATH = {
    (): [0.0, 0.0, 0.0, 0.6, 0.4],
    (3,): [0.0, 0.0, 0.4, 0.3, 0.3],
    (4,): [0.0, 0.0, 0.99, 0.005, 0.005],
}


def follow(sentence: int, tokens: list[int]) -> list[float]:
    return GARDEN_PATH.get(tuple(tokens), [0.0, 0.0, 0.8, 0.1, 0.1])


def test_beam_leaves_the_garden_path() -> None:
    step, limits = table_step(follow), torch.tensor([6])
    assert Greedy()(step, start(1), max_lengths=limits)[0][0].tokens == [3]
    found = Beam(beam_size=2, n_best=2, length_penalty=0)(step, start(1), max_lengths=limits)
    assert [h.tokens for h in found[0]] == [[4], [3]]
    assert [h.score for h in found[0]] == pytest.approx(
        torch.tensor([0.4 * 0.99, 0.6 * 0.4], dtype=torch.float64).log().tolist()
    )


def test_a_sentence_ends_once_nothing_alive_can_win() -> None:
    # After two steps [4] is set aside with 0.396; [3] ends with 0.24, [3, 3] is at most 0.18.
    state = start(1)
    Beam(beam_size=3, length_penalty=0)(table_step(follow), state, max_lengths=torch.tensor([50]))
    assert state.row_counts == [1, 3]


def test_a_sentence_goes_on_while_the_penalty_lets_a_longer_hypothesis_win() -> None:
    # [3] of score log 0.4 / 1 is set aside first; certain tokens after [4] win by their length:
    # log 0.3 / (16 / 6) > log 0.4.
    def chain(sentence: int, tokens: list[int]) -> list[float]:
        if not tokens:
            return [0.0, 0.0, 0.4, 0.3, 0.3]
        if tokens[0] == 3:
            return [0.0, 0.0, 0.2, 0.4, 0.4]
        return [0.0, 0.0, 1.0, 0.0, 0.0] if len(tokens) == 10 else [0.0, 0.0, 0.0, 0.0, 1.0]

    beam = Beam(beam_size=3, length_penalty=1)
    found = beam(table_step(chain), start(1), max_lengths=torch.tensor([11]))
    assert found[0][0].tokens == [4] * 10
    # With room for five tokens the chain cannot end, and [] is the best finished one.
    found = beam(table_step(chain), start(1), max_lengths=torch.tensor([5]))
    assert found[0][0].tokens == []


def test_cut_hypotheses_come_after_finished_ones() -> None:
    def rarely(sentence: int, tokens: list[int]) -> list[float]:
        return [0.0, 0.0, 0.04, 0.95, 0.01] if not tokens else [0.0, 0.0, 0.04, 0.94, 0.02]

    found = Beam(beam_size=4, n_best=4, length_penalty=0)(
        table_step(rarely), start(1), max_lengths=torch.tensor([2])
    )
    assert [(h.tokens, h.finished) for h in found[0]] == [
        ([], True),
        ([3], True),
        ([3, 3], False),
        ([3, 4], False),
    ]


def test_n_best_differ_and_come_in_order() -> None:
    network = Network(20, dtype=torch.float32, seed=5)
    found = Beam(beam_size=6, n_best=6)(
        network.step, network.start(list(range(10))), torch.arange(3, 13)
    )
    for group in found:
        assert len(group) == 6
        assert len({tuple(h.tokens) for h in group}) == 6
        for finished in (True, False):
            scores = [h.score for h in group if h.finished == finished]
            assert scores == sorted(scores, reverse=True)
        assert sorted((h.finished for h in group), reverse=True) == [h.finished for h in group]


def test_the_first_of_n_best_is_no_worse_than_the_best_alone() -> None:
    network = Network(20, dtype=torch.float32, seed=6)

    def first(n_best: int) -> list[Hypothesis]:
        found = Beam(beam_size=5, n_best=n_best)(
            network.step, network.start(list(range(10))), torch.arange(3, 13)
        )
        return [group[0] for group in found]

    for alone, among in zip(first(1), first(5), strict=True):
        assert among.score >= alone.score - 1e-6


def test_sentences_leave_the_batch_and_keep_their_place() -> None:
    ends = [3, 1, 0, 2]

    def certain(sentence: int, tokens: list[int]) -> list[float]:
        end = len(tokens) == ends[sentence]
        return [0.0, 0.0, 1.0 if end else 0.0, 0.0 if end else 0.9, 0.0 if end else 0.1]

    state = start(4)
    found = Beam(beam_size=2, length_penalty=0)(
        table_step(certain), state, torch.tensor([9, 9, 9, 9])
    )
    assert [group[0].tokens for group in found] == [[3] * end for end in ends]
    assert state.row_counts == [4, 6, 4, 2]


def test_sentences_may_leave_just_when_the_batch_widens() -> None:
    # Five sentences of one row become one of five rows: the state asserts the difference.
    def at_once(sentence: int, tokens: list[int]) -> list[float]:
        return [0.0, 0.0, 0.2, 0.5, 0.3] if sentence == 3 and not tokens else [0, 0, 1.0, 0, 0]

    state = start(5)
    found = Beam(beam_size=5)(table_step(at_once), state, torch.tensor([9] * 5))
    assert state.row_counts[0] == 5
    assert [group[0].tokens for group in found] == [[], [], [], [3], []]


def test_a_beam_wider_than_all_there_is_returns_what_there_is() -> None:
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.3, 0.7])
    found = Beam(beam_size=9, n_best=9)(step, start(1), max_lengths=torch.tensor([2]))
    assert [h.tokens for h in found[0]] == [[], [3], [3, 3]]
    assert [h.finished for h in found[0]] == [True, True, False]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="beam_size must be at least 1; it is 0"):
        Beam(beam_size=0)
    with pytest.raises(ValueError, match="n_best must be at most beam_size, 2; it is 3"):
        Beam(beam_size=2, n_best=3)
    with pytest.raises(ValueError, match=r"length_penalty must be at least 0; it is -0\.5"):
        Beam(length_penalty=-0.5)
