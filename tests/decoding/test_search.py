"""What holds for every strategy."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from jsonargparse import ArgumentParser

from tests.decoding.toy import BOS, EOS, Network, NetworkState, start, table_step
from tx_lightning.decoding import (
    Beam,
    Decoding,
    Filter,
    Greedy,
    Hypothesis,
    MinLength,
    NoRepeatNgram,
    Sampling,
)

VOCAB = 9
LENGTHS = [3, 7, 4, 1, 6, 5, 2, 6]  # of eight sources
PREFIXES = [[], [5, 4], [3], [], [7, 7, 7], [], [4], [8]]


def strategies(
    *, filters: Sequence[Filter] = (), max_length_ratio: float = 2.0, max_length_offset: int = 1
) -> list[Decoding]:
    return [
        Greedy(
            filters=filters,
            max_length_ratio=max_length_ratio,
            max_length_offset=max_length_offset,
        ),
        Beam(
            beam_size=4,
            n_best=3,
            filters=filters,
            max_length_ratio=max_length_ratio,
            max_length_offset=max_length_offset,
        ),
        Sampling(
            n_samples=3,
            filters=filters,
            max_length_ratio=max_length_ratio,
            max_length_offset=max_length_offset,
        ),
    ]


def decode(
    decoding: Decoding,
    network: Network,
    sentences: list[int],
    *,
    prefixes: bool = False,
    vocabulary_size: int | None = None,
) -> list[list[Hypothesis]]:
    return decoding(
        network.step,
        network.start(sentences),
        torch.tensor([LENGTHS[i] for i in sentences]),
        [PREFIXES[i] for i in sentences] if prefixes else None,
        indices=sentences,
        vocabulary_size=vocabulary_size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("decoding", strategies(filters=[NoRepeatNgram(3)]))
def test_a_sentence_does_not_depend_on_its_batch(
    decoding: Decoding, prefixes: bool, dtype: torch.dtype
) -> None:
    network = Network(VOCAB, dtype=dtype, seed=1)
    alone = [decode(decoding, network, [i], prefixes=prefixes)[0] for i in range(8)]
    assert len({len(found[0].tokens) for found in alone}) > 2
    for order in [[7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 7, 5], [2, 4, 1, 6]]:
        together = decode(decoding, network, order, prefixes=prefixes)
        assert together == [alone[i] for i in order]


@pytest.mark.parametrize("decoding", strategies())
def test_log_prob_is_the_models_own_and_score_divides_it(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float64, seed=3)
    found = decode(decoding, network, [*range(8)], prefixes=True)
    found += decode(decoding, network, [*range(8)], prefixes=False)
    assert {h.finished for group in found for h in group} == {True, False}
    for i, group in enumerate(found):
        sentence = i % 8
        assert [h.score for h in group if h.finished] == sorted(
            (h.score for h in group if h.finished), reverse=True
        )
        for h in group:
            given = len(PREFIXES[sentence]) if i < 8 else 0
            expected = network.log_prob(sentence, h.tokens, given=given, ends=h.finished)
            assert h.log_prob == pytest.approx(expected, abs=1e-9)
            length = len(h.tokens) - given + h.finished
            assert h.score == pytest.approx(h.log_prob / ((5 + length) / 6) ** 0.6, abs=1e-9)


@pytest.mark.parametrize("decoding", strategies())
def test_prefixes_of_different_lengths_are_kept(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=3)
    for sentence, group in enumerate(decode(decoding, network, list(range(8)), prefixes=True)):
        prefix = PREFIXES[sentence]
        assert all(h.tokens[: len(prefix)] == prefix for h in group)


@pytest.mark.parametrize("decoding", strategies())
def test_a_shared_prefix_is_decoded_with_one_row_per_sentence(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=3)
    state = network.start([0, 1])
    decoding(network.step, state, torch.tensor([9, 9]), [[4, 5, 6], [7, 8, 3, 4]])
    assert state.row_counts[:4] == [2, 2, 2, 2]
    assert state.row_counts[4] > 2 or isinstance(decoding, Greedy)


PROMPTS = [[4], [5, 4, 8], [3, 3], [6, 7, 7, 7, 5, 3], [8, 4], [4, 4, 4], [7, 3], [5, 8, 5, 8, 5]]


def complete(
    decoding: Decoding,
    network: Network,
    sentences: list[int],
    *,
    prefill: bool = True,
    bos_id: int | None = None,
) -> tuple[list[list[Hypothesis]], NetworkState]:
    """Go on after the prompts, at most six tokens; also return the state."""
    state = network.start(sentences)
    found = decoding(
        network.step,
        state,
        None,
        [PROMPTS[i] for i in sentences],
        max_lengths=torch.tensor([len(PROMPTS[i]) + 6 for i in sentences]),
        indices=sentences,
        prefill=network.prefill if prefill else None,
        bos_id=bos_id,
    )
    return found, state


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("decoding", strategies(filters=[NoRepeatNgram(3)]))
def test_a_prefilled_prompt_goes_on_like_one_fed_token_by_token(
    decoding: Decoding, bos_id: int | None
) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=7)
    for sentences, shared in [([*range(8)], 1), ([3, 7, 1, 5], 3), ([7], 5)]:
        found, state = complete(decoding, network, sentences, bos_id=bos_id)
        plain, stepped = complete(decoding, network, sentences, prefill=False, bos_id=bos_id)
        assert found == plain
        assert state.prefilled == [shared + (bos_id is not None)]
        assert stepped.prefilled == []
        assert stepped.row_counts == [len(sentences)] * state.prefilled[0] + state.row_counts


@pytest.mark.parametrize("decoding", strategies(filters=[NoRepeatNgram(3)]))
def test_what_a_prompt_becomes_does_not_depend_on_the_others(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=7)
    alone = [complete(decoding, network, [i])[0][0] for i in range(8)]
    assert len({len(found[0].tokens) for found in alone}) > 2
    for order in [[7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 7, 5], [3, 7]]:
        assert complete(decoding, network, order)[0] == [alone[i] for i in order]


@pytest.mark.parametrize("decoding", strategies())
def test_without_bos_the_prompt_is_all_there_is_before(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float64, seed=3)
    found, _ = complete(decoding, network, [*range(8)])
    for sentence, group in enumerate(found):
        for h in group:
            given = len(PROMPTS[sentence])
            assert h.tokens[:given] == PROMPTS[sentence]
            expected = network.log_prob(sentence, h.tokens, given=given, bos=False, ends=h.finished)
            assert h.log_prob == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("decoding", strategies())
def test_what_shall_never_come_does_not_come(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=3)
    found = decoding(
        network.step, network.start([*range(8)]), torch.tensor(LENGTHS), never=[3, EOS]
    )
    for length, group in zip(LENGTHS, found, strict=True):
        assert all(3 not in h.tokens for h in group)
        assert [(len(h.tokens), h.finished) for h in group] == [(2 * length + 1, False)] * len(
            group
        )


@pytest.mark.parametrize("decoding", strategies())
def test_an_impossible_prompt_is_followed_all_the_same(decoding: Decoding) -> None:
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.4, 0.6, 0.0])
    found = decoding(step, start(2), None, [[4, 4], []], max_lengths=torch.tensor([3, 3]))
    assert all(h.tokens[:2] == [4, 4] for h in found[0])
    for h in found[0]:
        assert h.log_prob == pytest.approx(math.log(0.6 if h.tokens[2:] == [3] else 0.4))


@pytest.mark.parametrize(
    "decoding", strategies(filters=[MinLength(2)], max_length_ratio=0, max_length_offset=4)
)
def test_padding_bos_and_ids_beyond_the_vocabulary_are_never_generated(decoding: Decoding) -> None:
    # They are by far the most probable ones.
    follow = [0.3, 0.3, 0.02, 0.02, 0.02, 0.04, 0.1, 0.2]
    found = decoding(
        table_step(lambda sentence, tokens: follow),
        start(4),
        torch.tensor([1, 1, 1, 1]),
        vocabulary_size=6,
    )
    tokens = {token for group in found for h in group for token in h.tokens}
    assert tokens <= {3, 4, 5}
    assert 5 in tokens


@pytest.mark.parametrize("decoding", strategies(filters=[MinLength(4)]))
def test_minimum_and_maximum_length(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=4)
    lengths = [2, 3, 4, 5]
    for length, group in zip(
        lengths,
        decoding(network.step, network.start([0, 1, 2, 3]), torch.tensor(lengths)),
        strict=True,
    ):
        for h in group:
            most = 2 * length + 1
            assert 4 <= len(h.tokens) <= most - h.finished
            assert h.finished or len(h.tokens) == most


@pytest.mark.parametrize("decoding", strategies(filters=[NoRepeatNgram(2)]))
def test_no_bigram_occurs_twice(decoding: Decoding) -> None:
    network = Network(5, dtype=torch.float32, seed=4)

    def repeats(strategy: Decoding) -> int:
        found = strategy(network.step, network.start([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]))
        bigrams = [list(pairwise(h.tokens)) for group in found for h in group]
        return sum(len(each) - len(set(each)) for each in bigrams)

    assert repeats(decoding) == 0
    decoding.filters.clear()
    assert repeats(decoding) > 0


@pytest.mark.parametrize("decoding", strategies(filters=[NoRepeatNgram(1), MinLength(9)]))
def test_a_row_that_may_do_nothing_else_ends(decoding: Decoding) -> None:
    found = decoding(
        table_step(lambda sentence, tokens: [0.0, 0.0, 0.1, 0.5, 0.4]), start(1), torch.tensor([9])
    )
    assert all(sorted(h.tokens) == [3, 4] and h.finished for h in found[0])


@pytest.mark.parametrize("decoding", strategies())
def test_max_lengths_limit_without_a_source_and_on_top_of_it(decoding: Decoding) -> None:
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.0, 0.6, 0.4])

    def lengths(source_lengths: list[int] | None, limits: list[int]) -> list[int]:
        found = decoding(
            step,
            start(2),
            None if source_lengths is None else torch.tensor(source_lengths),
            max_lengths=torch.tensor(limits),
        )
        return [len(group[0].tokens) for group in found]

    assert lengths(None, [4, 7]) == [4, 7]
    assert lengths([1, 9], [4, 7]) == [3, 7]


@pytest.mark.parametrize("decoding", strategies())
def test_a_prefix_longer_than_the_source_allows_leaves_room_for_one_token(
    decoding: Decoding,
) -> None:
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.0, 0.6, 0.4])
    found = decoding(step, start(1), torch.tensor([1]), [[4, 4, 4, 4]])
    assert found[0][0].tokens[:4] == [4, 4, 4, 4]
    assert len(found[0][0].tokens) == 5


@pytest.mark.parametrize("decoding", strategies())
def test_bos_may_be_eos_and_stand_in_a_prompt(decoding: Decoding) -> None:
    logits = torch.tensor([0.0, 0.0, 0.4, 0.3, 0.3]).log()

    def step(tokens: torch.Tensor, state: object) -> torch.Tensor:
        return logits.expand(len(tokens), -1)

    prompts = [[3, EOS, 4], [EOS]]
    found = decoding(step, start(2), None, prompts, max_lengths=torch.tensor([9, 9]), bos_id=EOS)
    for prompt, group in zip(prompts, found, strict=True):
        assert any(h.finished for h in group)
        for h in group:
            assert h.tokens[: len(prompt)] == prompt
            assert EOS not in h.tokens[len(prompt) :]


def test_strategies_and_filters_are_reached_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--decoding", type=Decoding)
    given = {
        "class_path": "tx_lightning.decoding.Beam",
        "init_args": {
            "beam_size": 3,
            "filters": [
                {"class_path": "tx_lightning.decoding.NoRepeatNgram", "init_args": {"size": 2}}
            ],
        },
    }
    decoding = parser.instantiate(parser.parse_object({"decoding": given})).decoding
    assert isinstance(decoding, Beam)
    assert (decoding.beam_size, decoding.n_best) == (3, 1)
    assert isinstance(decoding.filters[0], NoRepeatNgram)
    assert decoding.filters[0].size == 2


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.tensor([0.0, 0.0, 1.0, 3.0, 2.0], dtype=torch.bfloat16)

    def step(tokens: torch.Tensor, state: object) -> torch.Tensor:
        return logits.expand(len(tokens), -1)

    expected = 3 * float(logits.float().log_softmax(0)[3])
    for decoding in (Greedy(), Beam(beam_size=1)):
        found = decoding(step, start(1), max_lengths=torch.tensor([3]))
        assert found[0][0].log_prob == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("decoding", strategies())
def test_no_gradient_is_recorded(decoding: Decoding) -> None:
    network = Network(VOCAB, dtype=torch.float32, seed=0)
    network.embedding.requires_grad_()
    state = network.start([0])
    decoding(network.step, state, torch.tensor([3]))
    assert not state.hidden.requires_grad


@pytest.mark.parametrize("decoding", strategies())
def test_logits_are_left_as_they_are(decoding: Decoding) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    def step(tokens: torch.Tensor, state: object) -> torch.Tensor:
        return logits.expand(len(tokens), -1)

    decoding(step, start(2), torch.tensor([2, 3]), [[3], []], vocabulary_size=4)
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("decoding", strategies())
def test_diverged_weights_are_reported(decoding: Decoding) -> None:
    def step(tokens: torch.Tensor, state: object) -> torch.Tensor:
        return torch.full((len(tokens), 5), math.nan)

    with pytest.raises(ValueError, match=r"logits: .* have most likely diverged"):
        decoding(step, start(2), torch.tensor([2, 3]))


@pytest.mark.parametrize("decoding", strategies())
def test_no_sentences_give_no_hypotheses(decoding: Decoding) -> None:
    step = table_step(lambda sentence, tokens: [1.0])
    assert decoding(step, start(0), torch.tensor([], dtype=torch.int64)) == []


def test_impossible_calls_are_refused() -> None:
    step, lengths = table_step(lambda sentence, tokens: [1.0]), torch.tensor([3, 3])
    with pytest.raises(ValueError, match="source_lengths or max_lengths must be given"):
        Greedy()(step, start(2))
    with pytest.raises(ValueError, match="prefixes has 1 entries for 2 sentences"):
        Greedy()(step, start(2), lengths, [[3]])
    with pytest.raises(ValueError, match="id 8 is not between 0 and the vocabulary size, 8"):
        Greedy()(step, start(2), lengths, [[3], [8]], vocabulary_size=8)
    with pytest.raises(ValueError, match="max_lengths: 2 leaves no token after a prefix of 2"):
        Greedy()(step, start(2), None, [[], [3, 3]], max_lengths=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="that of sentence 1 is empty and bos_id is None"):
        Greedy()(step, start(2), lengths, [[3], []], bos_id=None)
    with pytest.raises(ValueError, match="that of sentence 0 is empty and bos_id is None"):
        Greedy()(step, start(2), lengths, bos_id=None)
    with pytest.raises(ValueError, match="max_length_ratio must be at least 0; it is -1"):
        Greedy(max_length_ratio=-1)
