import pytest
import torch

from tests.decoding.toy import EOS, start, table_step
from tx_lightning.decoding import Greedy


def test_takes_the_most_probable_token_until_eos() -> None:
    follow = {
        (): [0.0, 0.0, 0.2, 0.7, 0.1],
        (3,): [0.0, 0.0, 0.2, 0.3, 0.5],
        (3, 4): [0.0, 0.0, 0.9, 0.05, 0.05],
    }
    found = Greedy()(
        table_step(lambda sentence, tokens: follow[tuple(tokens)]), start(1), torch.tensor([4])
    )
    (h,) = found[0]
    assert (h.tokens, h.finished) == ([3, 4], True)
    assert h.log_prob == pytest.approx(torch.tensor(0.7 * 0.5 * 0.9).log().item())


def test_finished_rows_leave_the_batch() -> None:
    ends = [2, 0, 3, 0]  # number of tokens of each sentence

    def follow(sentence: int, tokens: list[int]) -> list[float]:
        end = len(tokens) == ends[sentence]
        return [0.0, 0.0, 0.9 if end else 0.1, 0.1 if end else 0.9]

    state = start(4)
    found = Greedy()(table_step(follow), state, torch.tensor([9, 9, 9, 9]))
    assert [len(group[0].tokens) for group in found] == ends
    assert state.row_counts == [4, 2, 2, 1]


def test_rows_at_their_maximum_length_leave_the_batch() -> None:
    state = start(3)
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.1, 0.9])
    Greedy(max_length_ratio=1, max_length_offset=0)(step, state, torch.tensor([1, 3, 2]))
    assert state.row_counts == [3, 2, 1]


def test_equally_probable_tokens_give_the_lowest_id() -> None:
    step = table_step(lambda sentence, tokens: [0.0, 0.0, 0.1, 0.3, 0.3, 0.3])
    found = Greedy()(step, start(1), max_lengths=torch.tensor([2]))
    assert found[0][0].tokens == [3, 3]
    assert EOS not in found[0][0].tokens
