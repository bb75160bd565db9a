"""Masks: exact numbers, honest shares, and nothing but (seed, epoch, example) decides them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx_lightning.data.errors import DataError
from tx_lightning.data.masking import Flags, Masked, Masker, Masking, mask_id
from tx_lightning.data.tokenizers import (
    ByteLevelBPE,
    Characters,
    SpecialIds,
    Tokenizer,
    TokenizerTrainer,
    Unigram,
    Words,
)

TEXTS = [f"the {a} man saw {b} old boats, and {b}!" for a in "abcdefgh" for b in "ijklmnop"] * 4
WORDS = Words().train(TEXTS, 100)
V = WORDS.vocab_size + 1  # the last row is the mask

PIECES = "[PAD] [CLS] [SEP] [UNK] [MASK] un ##able able ##s boat !".split()
WORD_PIECES = {
    "version": "1.0",
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "added_tokens": [],
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": dict(zip(PIECES, range(len(PIECES)), strict=True)),
    },
}


def word_pieces() -> Tokenizer:
    """A tokenizer like BERT's, with a mask of its own."""
    names = {0: "[PAD]", 1: "[CLS]", 2: "[SEP]", 3: "[UNK]", 4: "[MASK]"}
    ids = SpecialIds(pad=0, bos=1, eos=2, unk=3, mask=4)
    return Tokenizer.foreign(json.dumps(WORD_PIECES), ids, names)


def text(length: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """So many ordinary tokens."""
    return np.arange(length) % (WORDS.vocab_size - 4) + 4


def masker(masking: Masking | None = None, seed: int = 1) -> Masker:
    return Masker(masking or Masking(), WORDS, V, seed)


def same(one: Masked, other: Masked) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.positions, other.positions)


def test_how_many_tokens_are_chosen() -> None:
    lengths = np.array([1, 3, 10, 30, 100, 126])
    assert Masking().counts(lengths).tolist() == [1, 1, 2, 4, 15, 19]
    assert Masking(rate=0.4).counts(lengths).tolist() == [1, 1, 4, 12, 40, 50]


@given(st.integers(1, 200), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(0, 1000))
def test_the_number_is_a_function_of_the_length(
    length: int, rate: float, epoch: int, example: int
) -> None:
    masking = Masking(rate=rate)
    ids = text(length)
    masked = masker(masking)(ids, epoch, example)
    assert len(masked.positions) == masking.counts(np.array([length]))[0] <= length
    assert len(set(masked.positions.tolist())) == len(masked.positions)
    assert np.array_equal(np.sort(masked.positions), masked.positions)
    elsewhere = np.ones(length, dtype=bool)
    elsewhere[masked.positions] = False
    assert np.array_equal(masked.ids[elsewhere], ids[elsewhere])


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_mask_belongs_to_seed_epoch_and_example(whole_words: bool) -> None:
    masking, ids = Masking(whole_words=whole_words), text(60)
    first = masker(masking)(ids, 3, 7)
    assert same(first, masker(masking)(ids, 3, 7))
    for other in (
        masker(masking)(ids, 4, 7),
        masker(masking)(ids, 3, 8),
        masker(masking)(ids, 7, 3),
        masker(masking, seed=2)(ids, 3, 7),
    ):
        assert not np.array_equal(first.positions, other.positions)
    assert masker(masking).count(ids, 3, 7) == len(first.positions)


def test_masks_do_not_follow_the_random_numbers_that_order_the_examples() -> None:
    # numpy takes [1, 0] and [1, 0, 0] for the same seed.
    order = np.random.default_rng([1, 0]).permutation(60)[:9]
    assert not np.array_equal(np.sort(order), masker()(text(60), 0, 0).positions)


def test_shares_of_masks_random_and_untouched_tokens() -> None:
    ids, rows = text(100), 2000
    hidden = random = 0
    at = np.zeros(100)
    for example in range(rows):
        masked = masker()(ids, 0, example)
        at[masked.positions] += 1
        chosen = masked.ids[masked.positions]
        hidden += int((chosen == V - 1).sum())
        random += int(((chosen != V - 1) & (chosen != ids[masked.positions])).sum())
    n = 15 * rows
    assert int(at.sum()) == n
    assert abs(hidden - 0.8 * n) < 5 * (n * 0.8 * 0.2) ** 0.5
    # A random token is now and then the one that stood there.
    share = 0.1 * (1 - 1 / (WORDS.vocab_size - 4))
    assert abs(random - share * n) < 5 * (n * share * (1 - share)) ** 0.5
    assert np.abs(at - 0.15 * rows).max() < 5 * (rows * 0.15 * 0.85) ** 0.5


def test_random_tokens_are_all_ordinary_ones_and_no_others() -> None:
    only_random = masker(Masking(rate=0.9, mask_share=0.0, random_share=1.0))
    seen = {int(i) for example in range(100) for i in only_random(text(100), 0, example).ids}
    assert seen == set(range(4, WORDS.vocab_size))


def test_random_tokens_of_a_tokenizer_from_elsewhere_are_ordinary_too() -> None:
    tokenizer = word_pieces()
    masker = Masker(Masking(rate=0.9, mask_share=0.5, random_share=0.5), tokenizer, 50, 1)
    ids = np.array([5, 6, 7, 8, 9, 10])
    seen = {int(i) for example in range(200) for i in masker(ids, 0, example).ids}
    assert seen == {4, 5, 6, 7, 8, 9, 10}


def test_the_mask_is_the_tokenizers_own_or_the_last_row() -> None:
    assert mask_id(WORDS, 500) == 499
    assert mask_id(word_pieces(), 500) == 4


def test_extreme_shares() -> None:
    ids = text(50)
    everything = masker(Masking(mask_share=1.0, random_share=0.0))(ids, 0, 0)
    assert (everything.ids[everything.positions] == V - 1).all()
    nothing = masker(Masking(mask_share=0.0, random_share=0.0))(ids, 0, 0)
    assert np.array_equal(nothing.ids, ids)
    assert len(nothing.positions) == 8


# Whole words.


def flags(starts: str) -> Flags:
    """A word begins at each x."""
    return np.array([letter == "x" for letter in starts])


@given(st.text("x.", min_size=1, max_size=60), st.floats(0.05, 0.9), st.integers(0, 100))
def test_words_are_chosen_whole_and_within_the_number(starts: str, rate: float, seed: int) -> None:
    masking = Masking(rate=rate, whole_words=True)
    chosen = masking.choose(np.random.default_rng(seed), flags(starts)).tolist()
    words = np.cumsum(flags("x" + starts[1:]))
    taken = {int(words[place]) for place in chosen}
    assert sorted(chosen) == [i for i in range(len(starts)) if int(words[i]) in taken]
    most = int(masking.counts(np.array([len(starts)]))[0])
    sizes = np.bincount(words)[1:]
    if sizes.min() > most:
        assert len(taken) == 1
        assert len(chosen) == sizes.min()
    else:
        assert 1 <= len(chosen) <= most
        left = [size for word, size in enumerate(sizes, start=1) if word not in taken]
        assert all(size > most - len(chosen) for size in left)  # no further one would fit


def test_a_word_that_is_too_long_is_passed_over() -> None:
    masking = Masking(rate=0.3, whole_words=True)  # 3 of 10
    for seed in range(50):
        chosen = masking.choose(np.random.default_rng(seed), flags("x....xx.x.")).tolist()
        assert chosen in ([5, 6, 7], [5, 8, 9])


def test_single_tokens_are_words_where_all_begin_one() -> None:
    random = [np.random.default_rng(5) for _ in range(2)]
    starts = np.ones(40, dtype=bool)
    whole = Masking(whole_words=True).choose(random[0], starts)
    assert np.array_equal(whole, Masking().choose(random[1], starts))


@pytest.mark.parametrize(
    ("trainer", "size"),
    [(Words(), 100), (ByteLevelBPE(), 300), (Unigram(), 40), (Characters(), 99)],
)
def test_words_begin_with_a_blank(trainer: TokenizerTrainer, size: int) -> None:
    tokenizer = trainer.train(TEXTS, size)
    starts = tokenizer.word_starts()
    assert starts.shape == (tokenizer.vocab_size,)
    assert starts[:4].all()
    [ids] = tokenizer.encode_batch(["the a man saw i old boats, and i!"])
    tokens = tokenizer.tokens(ids)
    words = "".join(
        f"|{token}" if starts[i] else token for i, token in zip(ids, tokens, strict=True)
    )
    assert words.removeprefix("|") in (
        "▁the|▁a|▁man|▁saw|▁i|▁old|▁boats,|▁and|▁i!",
        "the|▁a|▁man|▁saw|▁i|▁old|▁boats,|▁and|▁i!",
    )


def test_word_pieces_begin_words_unless_they_go_on() -> None:
    tokenizer = word_pieces()
    [ids] = tokenizer.encode_batch(["Unables boat!"])
    assert tokenizer.tokens(ids) == ["un", "##able", "##s", "boat", "!"]
    assert tokenizer.word_starts()[ids].tolist() == [True, False, False, True, True]


def test_without_blanks_every_token_is_a_word() -> None:
    tokenizer = Characters().train(["abc", "cab"], 20)
    assert tokenizer.word_starts().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0; it must be between 0 and 1"),
        ({"rate": 15}, "rate is 15; it must be between 0 and 1"),
        ({"mask_share": 1.1}, "mask_share is 1.1; it must be from 0 to 1"),
        ({"random_share": 0.3}, "mask_share and random_share are 0.8 and 0.3; together"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Masking(**arguments)  # type: ignore[arg-type]
