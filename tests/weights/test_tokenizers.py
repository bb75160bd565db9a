"""Tokenizers of others: the ids that transformers gives, the text back, special words as text."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, MarianTokenizer

from tests.weights import hugging_face as hf
from tx_lightning.data.tokenizers import Tokenizer, Tokenizers
from tx_lightning.weights import WeightsError, bert, gpt2, seq2seq
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.plans import Family
from tx_lightning.weights.sentencepieces import read_pieces
from tx_lightning.weights.tokenizer_files import read_tokenizers, tokenizer_documents

FAMILIES = {
    "gpt2": (gpt2.FAMILY, hf.gpt2_tokenizer, {"eos_token_id": 0}),
    "bert": (bert.FAMILY, hf.bert_tokenizer, {}),
    "bart": (seq2seq.BART, hf.bart_tokenizer, {}),
}
SPECIAL_WORDS = {"gpt2": "<|endoftext|>", "bert": "[SEP]", "bart": "</s>"}


def read(folder: Path, family: Family, **values: Any) -> Tokenizers:
    config = Configuration({"vocab_size": hf.ROWS, **values}, family.defaults, "config.json")
    return read_tokenizers(folder, config, family)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("files", ["fast", "vocabulary"])
def test_ids_equal_from_either_kind_of_files(name: str, files: str, tmp_path: Path) -> None:
    family, build, values = FAMILIES[name]
    theirs = build(tmp_path / "vocabulary")
    theirs.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.json").is_file()
    found = read(tmp_path / files, family, **values)
    assert found.source is found.target
    prefix = [0] if name == "bart" else []
    assert hf.encoded(found.source) == [prefix + row for row in hf.theirs(theirs)]
    texts = ["the lazy fox", "hello world"]
    assert found.source.decode_batch(hf.encoded(found.source, texts)) == texts


@pytest.mark.parametrize("name", FAMILIES)
def test_special_words_in_text_are_text(name: str, tmp_path: Path) -> None:
    family, build, values = FAMILIES[name]
    theirs = build(tmp_path / "vocabulary")
    theirs.save_pretrained(tmp_path / "fast")
    word = SPECIAL_WORDS[name]
    special = theirs.convert_tokens_to_ids(word)
    assert special in hf.theirs(theirs, [f"the {word} fox"])[0]
    tokenizer = read(tmp_path / "fast", family, **values).source
    assert special not in hf.encoded(tokenizer, [f"the {word} fox"])[0]
    assert tokenizer.decode_batch([[special]]) == [""]
    assert tokenizer.tokens([special]) == [word]


def test_special_ids(tmp_path: Path) -> None:
    def ids(name: str) -> tuple[int | None, ...]:
        family, build, values = FAMILIES[name]
        build(tmp_path / name)
        t = read(tmp_path / name, family, **values).source
        return t.pad_id, t.bos_id, t.eos_id, t.unk_id, t.mask_id

    assert ids("gpt2") == (0, 0, 0, 0, None)
    assert ids("bert") == (0, 2, 3, 1, 4)
    assert ids("bart") == (1, 2, 2, 3, 4)


def test_a_bert_without_cls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\nthe\n", "utf-8")
    with pytest.raises(WeightsError, match="the tokenizer has no cls_token"):
        read(tmp_path, bert.FAMILY)


@pytest.mark.parametrize("options", [{"do_lower_case": False}, {"strip_accents": False}])
def test_the_options_of_bert_hold(options: dict[str, Any], tmp_path: Path) -> None:
    hf.bert_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options), "utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path, tokenizer_type="bert")
    texts = ["The café", "the abc déj"]
    assert hf.encoded(read(tmp_path, bert.FAMILY).source, texts) == hf.theirs(theirs, texts)


def test_names_of_special_tokens_may_be_objects(tmp_path: Path) -> None:
    hf.byte_pairs(tmp_path, ["<eot>", "<fill>"])
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<eot>"}, "pad_token": "<fill>", "x": 3}), "utf-8"
    )
    tokenizer = read(tmp_path, gpt2.FAMILY, eos_token_id=0).source
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 1)


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer in JSON"),
        ("vocab.json", "[]", "are no vocabulary of byte pairs"),
    ],
)
def test_damaged_files_are_refused(file: str, text: str, line: str, tmp_path: Path) -> None:
    hf.byte_pairs(tmp_path, ["<|endoftext|>"])
    (tmp_path / file).write_text(text, "utf-8")
    with pytest.raises(WeightsError, match=line):
        read(tmp_path, gpt2.FAMILY, eos_token_id=0)


def test_more_entries_than_rows_are_refused(tmp_path: Path) -> None:
    hf.byte_pairs(tmp_path, ["<|endoftext|>"])
    with pytest.raises(WeightsError, match=r"has ids up to 29\d, .* vocab_size is 250"):
        read(tmp_path, gpt2.FAMILY, eos_token_id=0, vocab_size=250)


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    """Tokens beyond the number of entries would never be generated."""
    hf.byte_pairs(tmp_path, ["<|endoftext|>"])
    path = tmp_path / "vocab.json"
    entries = json.loads(path.read_text("utf-8"))
    last = max(entries, key=entries.__getitem__)
    path.write_text(json.dumps({**entries, last: 310}), "utf-8")
    with pytest.raises(WeightsError, match="its ids have gaps: 300 entries, ids up to 310"):
        read(tmp_path, gpt2.FAMILY, eos_token_id=0)


@pytest.mark.parametrize("value", [3, True, [], ["</s>"], {}, {"content": 4}, 1.5])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_names_of_special_tokens_are_text(file: str, value: Any, tmp_path: Path) -> None:
    hf.byte_pairs(tmp_path, ["<|endoftext|>"])
    values = {"pad_token": value, "add_bos_token": True, "unk_token": None}
    (tmp_path / file).write_text(json.dumps(values), "utf-8")
    with pytest.raises(WeightsError, match=f"{file}: pad_token is .*; supported: the text of a to"):
        read(tmp_path, gpt2.FAMILY, eos_token_id=0)


@pytest.mark.parametrize("value", ["yes", 1, 0, [], {}])
def test_options_of_tokenizers_are_true_or_false(value: Any, tmp_path: Path) -> None:
    hf.byte_pairs(tmp_path / "pairs", ["<|endoftext|>"])
    hf.bert_tokenizer(tmp_path / "words")
    for folder, family, option in (
        ("pairs", gpt2.FAMILY, "add_prefix_space"),
        ("words", bert.FAMILY, "do_lower_case"),
        ("words", bert.FAMILY, "strip_accents"),
        ("words", bert.FAMILY, "tokenize_chinese_chars"),
    ):
        path = tmp_path / folder / "tokenizer_config.json"
        path.write_text(json.dumps({option: value}), "utf-8")
        with pytest.raises(WeightsError, match=f"{option} is .*; supported: true or false"):
            read(tmp_path / folder, family, eos_token_id=0)


# Marian and SentencePiece


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    hf.sentence_pieces(folder)
    return folder


def marian(folder: Path) -> Tokenizers:
    entries = json.loads((folder / "vocab.json").read_text("utf-8"))
    pad = entries["<pad>"]
    return read(folder, seq2seq.MARIAN, pad_token_id=pad, decoder_start_token_id=pad)


SOURCES = [
    *hf.SAMPLES,
    "ﬁne \uff37\uff49\uff44\uff45\u3000space\u00a0here",
    "the мир fox",  # a run that the target's pieces could spell, but are not asked
    "Здравствуй",
    "ß fox ü",
    "мир fox мир",
    "quick▁brown",
    ">>fr<< the fox",
    "a  b   c ",
    "</i> & [x] ^-^",
]


def test_ids_equal_those_of_marian_and_sentencepiece(pieces: Path) -> None:
    theirs, ours = MarianTokenizer.from_pretrained(pieces), marian(pieces)
    for text in [*SOURCES, *hf.TEXTS[:2], *hf.OTHERS[:2]]:
        expected = theirs(text)["input_ids"][:-1]
        assert hf.encoded(ours.source, [text]) == [expected], text
        expected = theirs(text_target=text)["input_ids"][:-1]
        assert hf.encoded(ours.target, [text]) == [expected], text
    assert ours.shared
    assert ours.source.sha256 != ours.target.sha256
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "source.spm"))
    for text in hf.TEXTS[:2]:
        cut = ["".join(ours.source.tokens([i])) for i in hf.encoded(ours.source, [text])[0]]
        assert cut == model.encode(text, out_type=str)


def test_text_of_marian_comes_back(pieces: Path) -> None:
    theirs, ours = MarianTokenizer.from_pretrained(pieces), marian(pieces)
    for text in [*hf.OTHERS[:2], "der  Hund ", ""]:
        ids = hf.encoded(ours.target, [text])
        assert ours.target.decode_batch(ids) == [" ".join(text.split())]
        assert ours.target.decode_batch(ids) == [theirs.decode(ids[0])]
    every = list(range(2, ours.target.vocab_size - 2))  # pieces of the other side as well
    assert ours.target.decode_batch([every]) == [theirs.decode(every)]


def test_special_words_of_marian_are_text(pieces: Path) -> None:
    tokenizer = marian(pieces).source
    for word in ("</s>", "<pad>", "<unk>"):
        ids = hf.encoded(tokenizer, [f"the {word} fox"])[0]
        assert tokenizer.eos_id not in ids
        assert tokenizer.pad_id not in ids
    assert tokenizer.tokens([tokenizer.eos_id, tokenizer.pad_id]) == ["</s>", "<pad>"]
    assert tokenizer.decode_batch([[tokenizer.eos_id, tokenizer.pad_id]]) == [""]


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc_cf"},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False},
    ],
)
def test_other_settings_of_sentencepiece_hold(options: dict[str, Any], tmp_path: Path) -> None:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hf.TEXTS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    hf.sentence_pieces(tmp_path)
    (tmp_path / "source.spm").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    entries = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    del entries["<pad>"]
    for i in range(3, processor.get_piece_size()):
        entries.setdefault(processor.id_to_piece(i), len(entries))
    entries["<pad>"] = len(entries)
    (tmp_path / "vocab.json").write_text(json.dumps(entries), "utf-8")
    ours = marian(tmp_path).source
    for text in SOURCES:
        if text.startswith(">>"):
            continue
        expected = [entries.get(piece, 1) for piece in processor.encode(text, out_type=str)]
        assert hf.encoded(ours, [text]) == [expected], text


def test_a_piece_without_an_id_is_cut_into_others(pieces: Path, tmp_path: Path) -> None:
    for file in ("source.spm", "target.spm", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((pieces / file).read_bytes())
    entries = json.loads((pieces / "vocab.json").read_text("utf-8"))
    long = max(read_pieces(pieces / "source.spm").scores, key=len)
    assert len(long) > 3
    word = long.removeprefix("▁")
    assert hf.encoded(marian(pieces).source, [word]) == [[entries.pop(long)]]
    text = json.dumps({entry: i for i, entry in enumerate(entries)})
    (tmp_path / "vocab.json").write_text(text, "utf-8")
    tokenizer = marian(tmp_path).source
    ids = hf.encoded(tokenizer, [word])[0]
    assert len(ids) > 1
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode_batch([ids]) == [word]


def test_damaged_pieces_and_other_models_are_refused(pieces: Path, tmp_path: Path) -> None:
    data = (pieces / "source.spm").read_bytes()
    path = tmp_path / "source.spm"
    for content in (b"", b"not a model", data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="truncated or no SentencePiece model"):
            read_pieces(path)
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hf.TEXTS), model_writer=model, vocab_size=60,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    with pytest.raises(WeightsError, match="model_type is 2; supported: 1, unigram"):
        read_pieces(path)


@pytest.mark.parametrize(
    ("entries", "line"),
    [({"</s>": 0, "a": 1}, "has no <unk>"), ({"</s>": 0, "<unk>": 2}, "its ids are not 0 to 1")],
)
def test_a_vocabulary_of_marian_is_checked(
    entries: dict[str, int], line: str, pieces: Path, tmp_path: Path
) -> None:
    for file in ("source.spm", "target.spm"):
        (tmp_path / file).write_bytes((pieces / file).read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(entries), "utf-8")
    with pytest.raises(WeightsError, match=line):
        read(tmp_path, seq2seq.MARIAN, pad_token_id=0, decoder_start_token_id=0)


# Written


@pytest.mark.parametrize("name", [*FAMILIES, "marian"])
def test_what_is_written_is_read_again_by_both(name: str, pieces: Path, tmp_path: Path) -> None:
    if name == "marian":
        found, values = marian(pieces), {}
        values = {
            "pad_token_id": found.source.pad_id,
            "decoder_start_token_id": found.source.pad_id,
        }
        family = seq2seq.MARIAN
    else:
        family, build, values = FAMILIES[name]
        build(tmp_path / "vocabulary")
        found = read(tmp_path / "vocabulary", family, **values)
    for file, content in tokenizer_documents(found, family.model_type, 24):
        (tmp_path / file).write_text(json.dumps(content), "utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.model_type}), "utf-8")
    again = read(tmp_path, family, **values)
    for before, after in ((found.source, again.source), (found.target, again.target)):
        assert special_ids(before) == special_ids(after)
        assert hf.encoded(before) == hf.encoded(after)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = [row[1:] if name == "bart" else row for row in hf.encoded(found.source)]
    assert hf.theirs(theirs) == ids
    assert theirs.model_max_length == 24
    assert theirs.eos_token_id == found.source.eos_id
    assert theirs.pad_token_id == found.source.pad_id
    whole = theirs("the fox")["input_ids"]
    inner = hf.encoded(found.source, ["the fox"])[0]
    if name == "bert":
        inner = [found.source.bos_id, *inner]
    assert whole == inner + ([] if name == "gpt2" else [found.source.eos_id])


def special_ids(t: Tokenizer) -> tuple[int | None, ...]:
    return t.pad_id, t.bos_id, t.eos_id, t.unk_id, t.mask_id
