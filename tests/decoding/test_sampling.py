import pytest
import torch

from tests.decoding.toy import Network, start, table_step
from tx_lightning.decoding import Greedy, Hypothesis, Sampling
from tx_lightning.decoding.sampling import draw

FOLLOW = [0.0, 0.0, 0.05, 0.15, 0.5, 0.3]
DRAWS = 2000


def frequencies(sampling: Sampling) -> list[float]:
    """Decode one token of very many samples; return the share of each id, EOS included."""
    found = sampling(
        table_step(lambda sentence, tokens: FOLLOW), start(1), max_lengths=torch.tensor([1])
    )
    ids = [h.tokens[0] if h.tokens else 2 for h in found[0]]
    assert len(ids) == DRAWS
    return [ids.count(token) / DRAWS for token in range(len(FOLLOW))]


def shares(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


# 2000 draws: a share of 0.5 has a standard deviation of 0.011.
TOLERANCE = 0.04


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(n_samples=DRAWS), FOLLOW),
        (Sampling(n_samples=DRAWS, temperature=0.5), shares(*(p**2 for p in FOLLOW))),
        (Sampling(n_samples=DRAWS, temperature=2.0), shares(*(p**0.5 for p in FOLLOW))),
        (Sampling(n_samples=DRAWS, top_k=2), shares(0, 0, 0, 0, 0.5, 0.3)),
        (Sampling(n_samples=DRAWS, top_p=0.9), shares(0, 0, 0, 0.15, 0.5, 0.3)),
        (Sampling(n_samples=DRAWS, min_p=0.5), shares(0, 0, 0, 0, 0.5, 0.3)),
        (Sampling(n_samples=DRAWS, top_k=3, top_p=0.6), shares(0, 0, 0, 0, 0.5, 0.3)),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, expected: list[float]) -> None:
    found = frequencies(sampling)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert [share > 0 for share in found] == [share > 0 for share in expected]


def test_temperature_comes_before_the_nucleus() -> None:
    # Flattened by 2 the nucleus of 0.7 needs 4 tokens' square roots, not the two of the plain one.
    found = frequencies(Sampling(n_samples=DRAWS, temperature=2.0, top_p=0.7))
    assert found == pytest.approx(shares(0, 0, 0, 0.15**0.5, 0.5**0.5, 0.3**0.5), abs=TOLERANCE)


def test_one_probable_token_is_greedy_decoding() -> None:
    network, lengths = Network(9, dtype=torch.float32, seed=0), torch.arange(1, 9)
    sentences = list(range(8))
    greedy = Greedy()(network.step, network.start(sentences), lengths)
    assert Sampling(top_k=1)(network.step, network.start(sentences), lengths) == greedy
    assert Sampling(temperature=1e-3)(network.step, network.start(sentences), lengths) == greedy


def sample(sampling: Sampling, sentences: list[int]) -> list[list[Hypothesis]]:
    network = Network(9, dtype=torch.float32, seed=0)
    lengths = torch.tensor([10] * len(sentences))
    return sampling(network.step, network.start(sentences), lengths, indices=sentences)


def test_draws_depend_on_seed_index_and_number_of_the_sample_only() -> None:
    first = sample(Sampling(seed=1), [0, 1, 2])
    assert first == sample(Sampling(seed=1), [0, 1, 2])
    assert first != sample(Sampling(seed=2), [0, 1, 2])
    assert first[2] == sample(Sampling(seed=1), [2])[0]
    several = sample(Sampling(seed=1, n_samples=8), [2])[0]
    assert first[2][0] in several
    assert len({tuple(h.tokens) for h in several}) > 3


def test_draws_belong_to_positions_in_the_row_prefix_included() -> None:
    # What follows depends on nothing: with a prefix of two tokens the draws of places 2 to 9 are
    # the same as without, whatever the longest prefix and the longest row of the batch are.
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.0, 0.4, 0.6])
    sampling = Sampling(n_samples=2, length_penalty=0)

    def texts(prefixes: list[list[int]], max_lengths: list[int]) -> set[tuple[int, ...]]:
        found = sampling(
            step,
            start(len(prefixes)),
            None,
            prefixes,
            max_lengths=torch.tensor(max_lengths),
            indices=[5, 6, 7][: len(prefixes)],
        )
        return {tuple(h.tokens) for h in found[0]}

    free = {tokens[2:] for tokens in texts([[]], [10])}
    assert len(free) == 2
    for others, lengths in [([], []), ([[3] * 4], [14]), ([[3] * 7, [4]], [8, 20])]:
        found = texts([[4, 4], *others], [10, *lengths])
        assert {tokens[2:] for tokens in found} == free


def test_equal_sentences_of_different_index_draw_differently() -> None:
    step = table_step(lambda sentence, tokens: FOLLOW)
    found = Sampling()(step, start(2), torch.tensor([10, 10]))
    assert found[0] != found[1]


def test_samples_come_best_first_and_finished_rows_leave() -> None:
    network = Network(9, dtype=torch.float32, seed=0)
    state = network.start([0, 1])
    found = Sampling(n_samples=5)(network.step, state, torch.tensor([4, 6]))
    for group in found:
        scores = [h.score for h in group]
        assert scores == sorted(scores, reverse=True)
        assert len(group) == 5
    steps = sum(len(h.tokens) + h.finished for group in found for h in group)
    assert state.row_counts[0] == 2  # before the first choice samples are alike
    assert sum(state.row_counts[1:]) + 10 == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_inverts_the_cumulative_sum(dtype: torch.dtype) -> None:
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=dtype).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1.0])
    assert draw(probs, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature must be above 0; it is 0 .*use Greedy"):
        Sampling(temperature=0)
    with pytest.raises(ValueError, match="top_k must be at least 1; it is 0"):
        Sampling(top_k=0)
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1; it is 0"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="min_p must be between 0 and 1; it is 2"):
        Sampling(min_p=2)
    with pytest.raises(ValueError, match="n_samples must be at least 1; it is 0"):
        Sampling(n_samples=0)
