import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import (
    BOS,
    EOS,
    PAD,
    UNK,
    ByteLevelBPE,
    Characters,
    Tokenizer,
    Tokenizers,
    TokenizerTrainer,
    Unigram,
    Words,
    check_capacity,
)

# Literal special names are in the training text on purpose: no vocabulary may learn their ids.
TEXTS = [
    "A man in a blue shirt is standing on a ladder.",
    "Two dogs, one brown and one black, play in the snow!",
    'He said: "the snow is blue", and left.',
    "</s> <s> <pad> <unk> [EOS] <eos>",
] * 20
KINDS = [ByteLevelBPE, Unigram, Words, Characters]
SPECIAL_TEXT = "<pad> <s> </s> <unk> [PAD] [EOS] <pad>  </s>"


def trained(kind: type[TokenizerTrainer], lowercase: bool = False) -> Tokenizer:
    return kind(lowercase).train(TEXTS, 300)


BPE = trained(ByteLevelBPE)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[TokenizerTrainer]:
    kind: type[TokenizerTrainer] = request.param
    return kind


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0]


def test_training_text_comes_back_exactly(kind: type[TokenizerTrainer]) -> None:
    tokenizer = trained(kind)
    texts = [*TEXTS[:4], " leading, and  two spaces ", ""]
    assert tokenizer.decode_batch(tokenizer.encode_batch(texts[:4])) == texts[:4]
    if kind is not Words:  # "leading" is not a word of the text.
        assert tokenizer.decode_batch(tokenizer.encode_batch(texts)) == texts


@pytest.mark.parametrize("lowercase", [False, True])
def test_special_names_in_text_are_text(kind: type[TokenizerTrainer], lowercase: bool) -> None:
    tokenizer = trained(kind, lowercase)
    for text in (SPECIAL_TEXT, "</s> ", "<pad> ", " <s>"):
        assert not {PAD, BOS, EOS} & set(encode(tokenizer, text))
    known = TEXTS[3].lower() if lowercase else TEXTS[3]
    assert UNK not in encode(tokenizer, known)
    assert tokenizer.decode_batch([encode(tokenizer, known)]) == [known]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_lose_nothing(text: str) -> None:
    ids = encode(BPE, text)
    assert BPE.decode_batch([ids]) == [text]
    assert all(UNK < i < BPE.vocab_size for i in ids)


def test_special_ids_are_dropped_from_text() -> None:
    ids = encode(BPE, "A man")
    assert BPE.decode_batch([[BOS, *ids, EOS, PAD, UNK]]) == ["A man"]
    assert BPE.decode_batch([[], [EOS]]) == ["", ""]


def test_a_word_is_the_same_token_at_the_start_and_within() -> None:
    assert encode(BPE, "the the the") == encode(BPE, "the") * 3


@pytest.mark.parametrize("kind", [Unigram, Words, Characters])
def test_unseen_characters_are_unknown(kind: type[TokenizerTrainer]) -> None:
    assert encode(trained(kind), "☃")[-1] == UNK


def test_lowercase_folds_before_the_vocabulary(kind: type[TokenizerTrainer]) -> None:
    tokenizer = trained(kind, lowercase=True)
    assert encode(tokenizer, "TWO DOGS") == encode(tokenizer, "two dogs")
    assert tokenizer.decode_batch([encode(tokenizer, TEXTS[0])]) == [TEXTS[0].lower()]


def test_tokens_join_to_the_text_with_visible_spaces(kind: type[TokenizerTrainer]) -> None:
    tokenizer = trained(kind)
    tokens = tokenizer.tokens(encode(tokenizer, "Two dogs, one"))
    assert "".join(tokens).removeprefix("▁") == "Two▁dogs,▁one"
    assert tokenizer.tokens([PAD, BOS, EOS, UNK]) == ["<pad>", "<s>", "</s>", "<unk>"]


def test_byte_tokens_are_shown_as_text() -> None:
    tokenizer = ByteLevelBPE().train(["über"] * 50, 300)
    assert tokenizer.tokens(encode(tokenizer, "über")) == ["▁über"]


def test_tokens_refuses_an_id_outside_the_vocabulary() -> None:
    with pytest.raises(DataError, match=f"999 is not below vocab_size \\({BPE.vocab_size}\\)"):
        BPE.tokens([999])


def test_json_and_pickle_keep_everything(kind: type[TokenizerTrainer]) -> None:
    tokenizer = trained(kind, lowercase=True)
    for copy in (Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.sha256 == tokenizer.sha256
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_all_ids_are_below_vocab_size_which_is_within_capacity(
    kind: type[TokenizerTrainer],
) -> None:
    tokenizer = trained(kind)
    assert tokenizer.vocab_size <= 300
    assert max(max(row) for row in tokenizer.encode_batch(TEXTS)) < tokenizer.vocab_size


@pytest.mark.parametrize(("kind", "kept"), [(Words, ["▁b", "▁a"]), (Characters, ["▁", "b"])])
def test_the_most_frequent_are_kept(kind: type[TokenizerTrainer], kept: list[str]) -> None:
    tokenizer = kind().train(["b b b b a a c"], 4 + 2)
    assert tokenizer.vocab_size == 4 + 2
    assert tokenizer.tokens([4, 5]) == kept
    assert UNK not in encode(tokenizer, "b")
    assert UNK in encode(tokenizer, "c")


@pytest.mark.parametrize("kind", [ByteLevelBPE, Words, Characters])
def test_training_is_deterministic(kind: type[TokenizerTrainer]) -> None:
    assert trained(kind).to_json() == trained(kind).to_json()


@pytest.mark.parametrize(
    ("kind", "vocab_size", "remedy"),
    [
        (ByteLevelBPE, 259, "at least 260"),
        (Unigram, 10, "raise vocab_size"),
        (Words, 4, "above 4"),
        (Characters, 4, "above 4"),
    ],
)
def test_a_capacity_too_small_is_refused(
    kind: type[TokenizerTrainer], vocab_size: int, remedy: str
) -> None:
    with pytest.raises(DataError, match=f"vocab_size is {vocab_size}.*{remedy}"):
        kind().train(TEXTS, vocab_size)


def test_a_tokenizer_above_capacity_is_refused() -> None:
    check_capacity(BPE, BPE.vocab_size)
    with pytest.raises(DataError, match=f"vocab_size is 200.*has {BPE.vocab_size} entries"):
        check_capacity(BPE, 200)


def test_errors_of_the_text_reach_the_user(kind: type[TokenizerTrainer]) -> None:
    def texts() -> Iterator[str]:
        yield "fine"
        raise DataError("line 2 is not UTF-8")

    with pytest.raises(DataError, match="line 2"):
        kind().train(texts(), 300)


@pytest.mark.parametrize("text", ["", "{}", "[1", BPE.to_json().replace("<pad> ", "[PAD]")])
def test_what_is_not_a_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="tokenizer: "):
        Tokenizer.from_json(text)


def test_fingerprints_tell_kinds_and_settings_apart() -> None:
    trainers: list[TokenizerTrainer] = []
    for lowercase in (False, True):
        trainers += [f(lowercase) for f in (ByteLevelBPE, Unigram, Words, Characters)]
    assert len({trainer.fingerprint() for trainer in trainers}) == len(trainers)
    assert Unigram().fingerprint() == Unigram().fingerprint()


def test_tokenizers_survive_a_checkpoint() -> None:
    words = trained(Words)
    both = Tokenizers.from_dict(Tokenizers(BPE, words).to_dict())
    assert (both.source.sha256, both.target.sha256) == (BPE.sha256, words.sha256)
    assert not both.shared
    shared = Tokenizers.from_dict(Tokenizers(BPE, BPE).to_dict())
    assert shared.shared
    assert shared.source is shared.target


def test_a_very_long_line_is_encoded(kind: type[TokenizerTrainer]) -> None:
    assert len(encode(trained(kind), "blue snow " * 10_000)) >= 20_000
