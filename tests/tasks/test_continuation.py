"""Prompts are continued: by the tokens a full forward gives, whatever the batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizer, Words
from tx_lightning.decoding import Beam, Decoding, Greedy, NoRepeatNgram, Sampling
from tx_lightning.models import LanguageModel, LanguageModelState
from tx_lightning.nn.positions import RotaryPositions
from tx_lightning.tasks.continuation import Continuation, PromptError, continue_texts

WORDS = "one two three four five six seven eight nine ten".split()
PROMPTS = ["one two", "three", "seven eight nine ten", "two two one", "six", "five four one"]
CONTEXT = 8
SEARCHES = [Greedy(), Sampling(n_samples=3, seed=5), Beam(beam_size=4, n_best=2)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Words().train(WORDS, 16)


@pytest.fixture
def network(tokenizer: Tokenizer) -> LanguageModel:
    """Untrained, with weights large enough for continuations that differ."""
    return tiny(tokenizer)


def tiny(tokenizer: Tokenizer, context_length: int = CONTEXT) -> LanguageModel:
    torch.manual_seed(3)
    network = LanguageModel(
        tokenizer.vocab_size + 2,
        d_model=16,
        n_heads=2,
        n_layers=2,
        context_length=context_length,
        dropout=0.5,
        positions=RotaryPositions,
    )
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4)
    return network.double()


def go_on(
    network: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    n: int = 5,
    first_index: int = 0,
    batch_tokens: int = 16384,
) -> list[list[Continuation]]:
    return continue_texts(
        network,
        tokenizer,
        prompts,
        decoding,
        max_new_tokens=n,
        first_index=first_index,
        batch_tokens=batch_tokens,
    )


def by_forwards(
    network: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[int],
    n: int,
    *,
    stride: int = 1,
    ends: bool = True,
) -> tuple[list[int], float]:
    """What always choosing the most probable token gives, each from a forward of its window."""
    network.eval()
    banned = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id]
    banned += [] if ends else [tokenizer.eos_id]
    new: list[int] = []
    total, held = 0.0, len(ids)  # of the latest tokens, the network sees so many
    for _ in range(n):
        if held > CONTEXT:
            held = CONTEXT + 1 - stride
        with torch.no_grad():
            logits = network(torch.tensor([[*ids, *new][-held:]]))[0, -1]
        log_probs = logits.log_softmax(0)
        log_probs[banned] = -torch.inf
        token = int(log_probs[: tokenizer.vocab_size].argmax())
        total += float(log_probs[token])
        if token == tokenizer.eos_id:
            break
        new.append(token)
        held += 1
    return new, total


def test_greedy_takes_the_most_probable_token_of_full_forwards(
    network: LanguageModel, tokenizer: Tokenizer
) -> None:
    found = go_on(network, tokenizer, PROMPTS, Greedy())
    for prompt, (best,) in zip(PROMPTS, found, strict=True):
        tokens, log_prob = by_forwards(network, tokenizer, tokenizer.encode_batch([prompt])[0], 5)
        assert best.tokens == tokens
        assert best.log_prob == pytest.approx(log_prob)
        assert best.finished == (len(tokens) < 5)
        assert prompt + best.text == " ".join([prompt, *tokenizer.tokens(tokens)]).replace("▁", "")
    assert len({tuple(best.tokens) for (best,) in found}) > 3


@pytest.mark.parametrize("decoding", SEARCHES)
def test_what_a_prompt_becomes_does_not_depend_on_the_others(
    network: LanguageModel, tokenizer: Tokenizer, decoding: Decoding
) -> None:
    together = go_on(network, tokenizer, PROMPTS, decoding)
    alone = [
        go_on(network, tokenizer, [prompt], decoding, first_index=i)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    in_pairs = go_on(network, tokenizer, PROMPTS, decoding, batch_tokens=2 * CONTEXT)
    for ours in (together, in_pairs):
        assert [[c.tokens for c in group] for group in ours] == [
            [c.tokens for c in group] for group in alone
        ]
        assert [c.log_prob for group in ours for c in group] == pytest.approx(
            [c.log_prob for group in alone for c in group]
        )


def test_prompts_are_read_at_once_up_to_the_shortest(
    network: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    prefill = network.prefill

    def recorded(ids: Tensor, state: LanguageModelState) -> Tensor:
        shapes.append(tuple(ids.shape))
        return prefill(ids, state)

    monkeypatch.setattr(network, "prefill", recorded)
    go_on(network, tokenizer, PROMPTS, Greedy(), batch_tokens=3 * CONTEXT)
    assert shapes == [(3, 3), (3, 1)]


@pytest.mark.parametrize("stride", [1, 3, CONTEXT])
def test_sliding_is_a_forward_of_the_window(
    network: LanguageModel, tokenizer: Tokenizer, stride: int
) -> None:
    prompts = [*PROMPTS, "one two three four five six seven eight nine ten"]
    for given in (prompts, prompts[-1:]):
        found = continue_texts(
            network,
            tokenizer,
            given,
            Greedy(),
            max_new_tokens=20,
            past_context="slide",
            stride=stride,
            stop_at_end=False,
        )
        for prompt, (best,) in zip(given, found, strict=True):
            ids = tokenizer.encode_batch([prompt])[0][-CONTEXT:]
            expected, log_prob = by_forwards(network, tokenizer, ids, 20, stride=stride, ends=False)
            assert best.tokens == expected
            assert best.log_prob == pytest.approx(log_prob)
            assert len(best.tokens) == 20


def test_seeds_places_and_samples_give_texts_of_their_own(
    network: LanguageModel, tokenizer: Tokenizer
) -> None:
    def texts(seed: int, prompts: list[str]) -> list[str]:
        found = go_on(network, tokenizer, prompts, Sampling(n_samples=4, seed=seed))
        assert [len(group) for group in found] == [4] * len(prompts)
        return [c.text for group in found for c in group]

    first = texts(1, ["one", "one"])
    assert texts(1, ["one", "one"]) == first
    assert texts(2, ["one", "one"]) != first
    assert set(first[:4]) != set(first[4:])


def test_a_new_document_begins_after_the_end_of_another(
    network: LanguageModel, tokenizer: Tokenizer
) -> None:
    ((empty,), (begun,)) = continue_texts(
        network, tokenizer, ["", "one"], Greedy(), max_new_tokens=4, new_document=True
    )
    eos, one = tokenizer.eos_id, tokenizer.encode_batch(["one"])[0]
    assert empty.tokens == by_forwards(network, tokenizer, [eos], 4)[0]
    assert begun.tokens == by_forwards(network, tokenizer, [eos, *one], 4)[0]
    assert not empty.text.startswith(" ")


def test_the_end_of_the_text_may_be_forbidden(network: LanguageModel, tokenizer: Tokenizer) -> None:
    sampling = Sampling(n_samples=20)
    for stop_at_end in (True, False):
        (found,) = continue_texts(
            network, tokenizer, ["one"], sampling, max_new_tokens=7, stop_at_end=stop_at_end
        )
        assert any(c.finished for c in found) == stop_at_end
        assert all(c.finished or len(c.tokens) == 7 for c in found)


@pytest.mark.parametrize(
    "decoding", [Greedy(), Sampling(seed=3), Sampling(filters=[NoRepeatNgram(2)])]
)
@pytest.mark.parametrize("stop_at_end", [True, False])
def test_what_is_told_on_the_way_is_the_text(decoding: Decoding, stop_at_end: bool) -> None:
    tokenizer = ByteLevelBPE().train([], 260)  # bytes, most of which are no character alone
    network = tiny(tokenizer)
    for prompt in ("é", "ab"):
        pieces: list[str] = []
        ((best,),) = continue_texts(
            network,
            tokenizer,
            [prompt],
            decoding,
            max_new_tokens=40,
            past_context="slide",
            stop_at_end=stop_at_end,
            observe=pieces.append,
        )
        assert pieces[0] == ""
        assert all(pieces[1:])
        assert "".join(pieces) == best.text
        assert best.tokens == (
            continue_texts(
                network,
                tokenizer,
                [prompt],
                decoding,
                max_new_tokens=40,
                past_context="slide",
                stop_at_end=stop_at_end,
            )[0][0].tokens
        )


def test_a_character_is_told_when_all_its_bytes_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = ByteLevelBPE().train([], 260)
    wanted = tokenizer.encode_batch(["x hé€𝄞!"])[0]
    assert len(wanted) == 14  # a space is put before a text
    network = tiny(tokenizer, 32)
    chosen = iter([*wanted[2:], tokenizer.eos_id])

    def certain(ids: Tensor, state: object) -> Tensor:
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, next(chosen)] = 9.0
        return logits

    monkeypatch.setattr(network, "prefill", certain)
    monkeypatch.setattr(network, "step", certain)
    pieces: list[str] = []
    ((best,),) = continue_texts(
        network, tokenizer, ["x"], Greedy(), max_new_tokens=20, observe=pieces.append
    )
    assert best.text == " hé€𝄞!"
    assert pieces == ["", " ", "h", "é", "€", "𝄞", "!"]


def test_evaluation_mode_is_for_the_time_of_the_call(
    network: LanguageModel, tokenizer: Tokenizer
) -> None:
    found = []
    for training in (True, False):
        network.train(training)
        found.append(go_on(network, tokenizer, PROMPTS, Greedy()))
        assert network.training == training
    assert found[0] == found[1]
    assert go_on(network, tokenizer, [], Greedy()) == []


def test_impossible_prompts_are_refused(network: LanguageModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"prompt 1: it is empty, .* new_document=true") as info:
        go_on(network, tokenizer, ["one", ""], Greedy())
    assert info.value.index == 1
    nine = " ".join(WORDS[:9])
    with pytest.raises(PromptError, match=r"prompt 0: it has 9 tokens, .* network 8: shorten"):
        go_on(network, tokenizer, [nine], Greedy())
    with pytest.raises(PromptError, match=r"its 4 tokens and 6 new ones .* 8 .* to 5 at most"):
        go_on(network, tokenizer, PROMPTS, Greedy(), n=6)
    assert len(go_on(network, tokenizer, PROMPTS, Greedy(), n=5)) == len(PROMPTS)


def test_impossible_settings_are_refused(network: LanguageModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1; it is 0"):
        go_on(network, tokenizer, ["one"], Greedy(), n=0)
    for stride in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"stride must be between 1 and the 8 .* is {stride}"):
            continue_texts(network, tokenizer, ["one"], Greedy(), max_new_tokens=1, stride=stride)
    for prompts, decoding in [(["one", "two"], Greedy()), (["one"], Sampling(n_samples=2))]:
        with pytest.raises(ValueError, match="observe needs one prompt and a search of one row"):
            continue_texts(
                network, tokenizer, prompts, decoding, max_new_tokens=1, observe=lambda piece: None
            )
