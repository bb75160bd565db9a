"""Sources of documents: what is one, how splits are cut, what is refused by file and line."""

import gzip
import math
import pickle
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_download import Server, serving
from tx_lightning.data import grammar, text_sources
from tx_lightning.data.errors import DataError
from tx_lightning.data.grammar import Grammar
from tx_lightning.data.sources import TSV
from tx_lightning.data.synchronous_grammar import Rule, SynchronousGrammar
from tx_lightning.data.text_sources import (
    Document,
    GrammarText,
    HuggingFaceTexts,
    Piece,
    SideOf,
    TextFiles,
    TextSource,
    TinyShakespeare,
)


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names keep the expected messages short."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(source: TextSource, split: str = "train") -> list[str]:
    return list(source.texts(split))


# Files


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_is_a_document_as_it_stands(name: str) -> None:
    text = "\n  First line\t\n\n\u2028 last \x0c\u00a0é🙂\n\n"
    source = TextFiles(write(name, text))
    source.prepare()
    assert source.splits() == ["train"]
    assert texts(source) == texts(source) == [text]
    assert texts(pickle.loads(pickle.dumps(source))) == [text]
    assert source.optimum_log_loss("train") is None


def test_line_ends_and_byte_order_mark_of_windows_are_not_text() -> None:
    file = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\r\n\r\n\xef\xbb\xbf")
    assert texts(TextFiles(file)) == ["one\ntwo\nthree\n\n\ufeff"]


def test_lines_and_paragraphs() -> None:
    file = write("a.txt", "\n one\r\ntwo \r\n \t\n\nthree\n\n")
    assert texts(TextFiles(file, document="line")) == [" one", "two ", "three"]
    assert texts(TextFiles(file, document="paragraph")) == [" one\ntwo ", "three"]


def test_files_of_blank_lines_have_no_documents() -> None:
    file = write("a.txt", "\n \n")
    for document in get_args(Document)[1:]:
        source = TextFiles(file, document=document)
        expected = "TextFiles: the files of 'train' have only blank lines"
        assert refusal(lambda: texts(source)) == expected  # noqa: B023 -- called at once


def test_several_files_are_read_in_the_order_given() -> None:
    names = [write(name, name) for name in ("b", "c", "a")]
    source = TextFiles(names, val="a")
    assert texts(source) == ["b", "c", "a"]
    assert texts(source, "val") == ["a"]


def test_a_folder_is_all_matching_files_below_it_in_order() -> None:
    for name in ("x/b.txt", "x/a/z.txt", "x/a/b/c.txt", "x/a.md", "x/d.txt.gz"):
        write(name, name)
    write("x/empty.txt", "")
    assert texts(TextFiles("x")) == ["x/a/b/c.txt", "x/a/z.txt", "x/b.txt"]
    assert texts(TextFiles(["x/a.md", "x"], pattern="*.gz")) == ["x/a.md", "x/d.txt.gz"]


def test_a_folder_without_matching_files_says_what_is_there() -> None:
    write("x/a/readme.md", "")
    write("x/notes.text", "")
    Path("nothing").mkdir()
    assert refusal(TextFiles("x").prepare) == (
        "no file below x matches the pattern '*.txt'; there are 'notes.text', 'a/readme.md'"
    )
    assert refusal(lambda: texts(TextFiles("nothing"))) == (
        "no file below nothing matches the pattern '*.txt'; there is no file"
    )
    empty = TextFiles("x", pattern="*.md")
    assert refusal(empty.prepare) == "all files below x that match '*.md' are empty"


def test_prepare_refuses_missing_and_empty_files_of_every_split() -> None:
    good = write("a.txt", "text")
    assert refusal(TextFiles(good, test="b.txt").prepare) == (
        "there is no file b.txt; the folder has 'a.txt'"
    )
    for content in (b"", b"\xef\xbb\xbf"):
        empty = TextFiles(good, val=write("c.txt", content))
        assert refusal(empty.prepare) == "c.txt is empty: it has no text"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"one\ntwo\nthr\xe9e\n",
            "a.txt, line 3: the byte 0xe9 is not UTF-8; if the file is LATIN",
        ),
        (
            "\ufeffone\n".encode("utf-16-le"),
            "a.txt, line 1: the byte 0xff is not UTF-8; if the fil",
        ),
        (b"one\ntw\0o\n", "a.txt, line 2 holds a NUL byte"),
        (b"one\n" * 600_000 + b"\xc3", "a.txt, line 600001: the byte 0xc3 is not UTF-8"),
        (b"one\n" * 600_000 + b"\0", "a.txt, line 600001 holds a NUL byte"),
    ],
)
def test_what_is_no_text_is_refused_by_line(content: bytes, expected: str) -> None:
    assert refusal(lambda: texts(TextFiles(write("a.txt", content)))).startswith(expected)


def test_utf16_is_recognized() -> None:
    file = write("a.txt", "one".encode("utf-16"))
    assert "iconv -f UTF-16 -t UTF-8" in refusal(lambda: texts(TextFiles(file)))


def test_a_gzip_file_cut_in_half_is_refused() -> None:
    Path("a.txt.gz").write_bytes(gzip.compress(b"some text " * 1000)[:-20])
    assert "a damaged gzip file" in refusal(lambda: texts(TextFiles("a.txt.gz")))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "TextFiles has no files: give at least one of train, val, test"),
        ({"train": []}, "TextFiles: train is empty; name a file or a folder"),
        ({"document": "lines"}, "TextFiles: document is 'lines'; there are 'line', 'file', 'parag"),
        ({"train": "a", "pattern": ""}, "TextFiles: pattern is empty; give one such as '*.txt'"),
        ({"train": "a", "val_share": 0}, "TextFiles: val_share is 0; it must be between 0 and 1"),
        ({"train": "a", "test_share": 1}, "TextFiles: test_share is 1; it must be between 0 and 1"),
        (
            {"train": "a", "val": "b", "val_share": 0.1},
            "TextFiles: give val or val_share, not both",
        ),
        (
            {"val": "b", "test_share": 0.1},
            "TextFiles: test_share is a share of train, which is not",
        ),
        (
            {"train": "a", "val_share": 0.5, "test_share": 0.5},
            "TextFiles: val_share and test_share are 0.5 and 0.5; together they must leave",
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], expected: str) -> None:
    assert refusal(lambda: TextFiles(**options)).startswith(expected)


def test_a_missing_split_lists_those_there_are() -> None:
    source = TextFiles("a", val_share=0.1)
    expected = "TextFiles has no split 'dev'; it has 'train', 'val'"
    assert refusal(lambda: source.texts("dev")) == expected
    assert refusal(lambda: source.pieces("dev")) == expected
    assert refusal(lambda: source.fingerprint("dev")) == expected
    assert refusal(lambda: source.optimum_log_loss("dev")) == expected


# Pieces of a long document


def test_a_long_document_comes_in_pieces_that_begin_before_a_blank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_sources, "_CHUNK", 16)
    source = TextFiles([write("a", "one two three\n\n  four five sixteen"), write("b", "x" * 40)])
    assert list(source.pieces("train")) == [
        Piece("one two three", last=False),
        Piece("\n\n  four five", last=False),
        Piece(" sixteen", last=True),
        Piece("x" * 16, last=False),
        Piece("x" * 16, last=False),
        Piece("x" * 8, last=True),
    ]
    assert texts(source) == ["one two three\n\n  four five sixteen", "x" * 40]


@given(st.text(st.sampled_from("aé🙂 \n\r\t\u2028"), min_size=1))
def test_pieces_joined_are_the_text_whatever_is_cut_where(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sources, "_CHUNK", 5)
        file = write("a.txt", text)
        expected = text.replace("\r\n", "\n").replace("\r", "\n")
        assert texts(TextFiles(file)) == [expected]
        pieces = list(TextFiles(file).pieces("train"))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text for piece in pieces)


def test_pieces_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "_CHUNK", 2**16)
    write("a.txt", "some words of a text\n" * 400_000)
    source = TextFiles("a.txt", val_share=0.5)
    tracemalloc.start()
    try:
        length = sum(len(piece.text) for piece in source.pieces("val"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length == 21 * 200_000
    assert peak < length / 4


def test_a_line_of_any_length_is_a_document() -> None:
    (text,) = texts(TextFiles(write("a.txt", "word " * 4_000_000)))
    assert len(text) == 20_000_000


# Shares


def test_shares_cut_a_single_file_at_a_character() -> None:
    file = write("a.txt", "0123456789" * 10)
    source = TextFiles(file, val_share=0.1)
    assert source.splits() == ["train", "val"]
    assert texts(source) == ["0123456789" * 9]
    assert texts(source, "val") == ["0123456789"]
    three = TextFiles(file, val_share=0.25, test_share=0.05)
    assert three.splits() == ["train", "val", "test"]
    assert [len(texts(three, split)[0]) for split in three.splits()] == [70, 25, 5]
    only_test = TextFiles(file, val=write("b.txt", "own"), test_share=0.8)
    assert texts(only_test, "val") == ["own"]
    assert [len(texts(only_test, split)[0]) for split in ("train", "test")] == [20, 80]


def test_shares_count_characters_over_all_files() -> None:
    source = TextFiles([write("a", "ääää"), write("b", "bbbbbb"), write("c", "cc")], val_share=0.5)
    assert texts(source) == ["ääää", "bb"]
    assert texts(source, "val") == ["bbbb", "cc"]
    at_an_end = TextFiles(["a", "b", "c"], val_share=8 / 12)
    assert texts(at_an_end) == ["ääää"]
    assert texts(at_an_end, "val") == ["bbbbbb", "cc"]


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_shares_cut_before_a_document(document: Any) -> None:
    end = "\n" if document == "line" else "\n\n"
    file = write("a.txt", end.join(["aaaa", "bbbb", "cccc", "dddd", "eeee"]))
    source = TextFiles(file, document=document, val_share=0.5, test_share=0.2)
    # The cuts at characters 6 and 16 move to the next document that begins there or later.
    assert texts(source) == ["aaaa", "bbbb"]
    assert texts(source, "val") == ["cccc", "dddd"]
    assert texts(source, "test") == ["eeee"]


def test_a_share_too_small_for_one_document_is_refused() -> None:
    file = write("a.txt", "one\ntwo\n")
    source = TextFiles(file, document="line", val_share=0.01)
    assert texts(source) == ["one", "two"]
    assert refusal(lambda: texts(source, "val")) == (
        "TextFiles: nothing is left for 'val': the 6 characters of train are too few documents to "
        "be cut by val_share 0.01; take other shares, or document: file"
    )


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_splits_joined_are_all_of_the_text(contents: list[str], val: int, test: int) -> None:
    names = [write(f"{n}.txt", content) for n, content in enumerate(contents)]
    source = TextFiles(names, val_share=val / 10, test_share=test / 10)
    whole = "".join(contents)
    if len(whole) < 10:
        return
    parts = ["".join(texts(source, split)) for split in source.splits()]
    assert "".join(parts) == whole
    assert len(parts[0]) == len(whole) * (10 - val - test) // 10
    assert len(parts[0]) + len(parts[1]) == len(whole) * (10 - test) // 10


# Fingerprints


def test_fingerprint_follows_the_content_and_how_it_is_read() -> None:
    a, b = write("a.txt", "one\n\ntwo"), write("b.txt", "three")
    prints = [
        TextFiles(a).fingerprint("train"),
        TextFiles(b).fingerprint("train"),
        TextFiles([a, b]).fingerprint("train"),
        TextFiles([b, a]).fingerprint("train"),
        TextFiles(a, document="line").fingerprint("train"),
        TextFiles(a, document="paragraph").fingerprint("train"),
        *(TextFiles(a, val_share=0.1).fingerprint(split) for split in ("train", "val")),
        *(TextFiles(a, val_share=0.2).fingerprint(split) for split in ("train", "val")),
    ]
    assert len(set(prints)) == len(prints)
    assert TextFiles(a).fingerprint("train") == TextFiles(b, val=a).fingerprint("val")
    assert TextFiles(".").fingerprint("train") == TextFiles([a, b]).fingerprint("train")
    write("a.txt", "One\n\ntwo")
    assert TextFiles(a).fingerprint("train") != prints[0]


# Tiny Shakespeare


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


def test_tiny_shakespeare_is_cut_as_usual(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TX_LIGHTNING_DATA", str(real_data))
    source = TinyShakespeare()
    source.prepare()
    assert source.splits() == ["train", "val"]
    (train,), (val,) = texts(source), texts(source, "val")
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert train.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:")
    assert val.endswith("wink'st\nWhiles thou art waking.\n")
    file = str(real_data / "tinyshakespeare" / "input.txt")
    assert train + val == Path(file).read_text()
    by_share = TextFiles(file, val_share=0.1)
    assert [texts(by_share, split) for split in by_share.splits()] == [[train], [val]]


def test_tiny_shakespeare_needs_no_file_for_its_fingerprints() -> None:
    source = TinyShakespeare()
    assert source.fingerprint("train") != source.fingerprint("val")
    assert refusal(lambda: source.texts("test")) == (
        "TinyShakespeare has no split 'test'; it has 'train', 'val'"
    )
    assert refusal(lambda: source.texts("val")).startswith(
        "there is no tinyshakespeare/input.txt here; try again, or put input.txt from https://raw."
    )


def test_tiny_shakespeare_that_is_wrong_or_cut_is_not_kept(server: Server, tmp_path: Path) -> None:
    source = TinyShakespeare(server.url)
    server.files["input.txt"] = b"To be, or not to be\n" * 1000
    message = refusal(source.prepare)
    assert message.startswith(f"{server.url}/input.txt is not the file that was published")
    server.cut.add("input.txt")
    assert "the connection was cut" in refusal(source.prepare)
    assert not list((tmp_path / "cache").rglob("input.txt"))


# The embedded language


def test_grammar_text_is_the_sentences_of_the_grammar() -> None:
    pairs = list(Grammar("de", "en", n_val=20, seed=3).pairs("val"))
    english = GrammarText(n_val=20, seed=3)
    german = GrammarText("de", n_val=20, seed=3)
    assert english.splits() == ["train", "val", "test"]
    assert texts(english, "val") == [target for _, target in pairs]
    assert texts(german, "val") == [source for source, _ in pairs]
    assert english.fingerprint("val") != german.fingerprint("val")
    assert english.fingerprint("val") == GrammarText(n_val=20, seed=3).fingerprint("val")
    assert english.fingerprint("val") != Grammar("en", "de", n_val=20, seed=3).fingerprint("val")


def test_grammar_text_refuses_what_the_grammar_refuses() -> None:
    french: Any = "fr"
    assert "'fr'; there are 'de' and 'en'" in refusal(lambda: GrammarText(french))
    assert "n_test is 0" in refusal(lambda: GrammarText(n_test=0))
    assert "no split 'dev'" in refusal(lambda: texts(GrammarText(), "dev"))


def test_optimum_in_english_is_that_of_the_grammar() -> None:
    source = GrammarText(n_val=50)
    expected = -sum(grammar.english_log_prob(text) for text in source.texts("val"))
    assert source.optimum_log_loss("val") == pytest.approx(expected)


def test_optimum_in_german_shares_an_english_sentence_among_its_word_orders() -> None:
    def log_prob(german: str) -> float:
        (tree,) = grammar.parse(german, "de")
        return text_sources._german_log_prob(tree)

    helps = grammar.english_log_prob("The woman helps the child.")
    assert log_prob("Die Frau hilft dem Kind.") == pytest.approx(helps - math.log(2))
    assert log_prob("Dem Kind hilft die Frau.") == pytest.approx(helps - math.log(2))
    loves = grammar.english_log_prob("The woman loves the child.")
    assert log_prob("Die Frau liebt das Kind.") == pytest.approx(loves)
    # In a subordinate clause the order is fixed.
    because = grammar.english_log_prob("The woman lies because she helps the child.")
    assert log_prob("Die Frau lügt, weil sie dem Kind hilft.") == pytest.approx(because)


def test_german_probabilities_of_a_small_language_sum_to_one() -> None:
    rules = [
        Rule("Sentence", 2, {"german": "{clause.main}"}, {"clause": "Clause"}),
        Rule("Sentence", 1, {"german": "that {clause.final}"}, {"clause": "Clause"}),
        Rule(
            "Clause",
            1,
            {"main": ("{verb.word} now", "now {verb.word}"), "final": "{verb.word}"},
            {"verb": "Verb"},
        ),
        Rule("Verb", 3, {"word": "go"}),
        Rule("Verb", 1, {"word": ("come", "arrive")}),
    ]
    trees = {tree.text("german"): tree for tree in SynchronousGrammar(rules).trees()}
    assert len(trees) == 9
    log_probs = {text: text_sources._german_log_prob(tree) for text, tree in trees.items()}
    assert sum(map(math.exp, log_probs.values())) == pytest.approx(1)
    assert math.exp(log_probs["go now"]) == pytest.approx(2 / 3 * 3 / 4 / 2)
    assert math.exp(log_probs["that arrive"]) == pytest.approx(1 / 3 * 1 / 4 / 2)


def test_optimum_in_german_is_the_sum_over_the_split() -> None:
    source = GrammarText("de", n_val=30)
    trees = [grammar.parse(text, "de")[0] for text in source.texts("val")]
    expected = -sum(map(text_sources._german_log_prob, trees))
    assert source.optimum_log_loss("val") == pytest.approx(expected)
    english = GrammarText("en", n_val=30).optimum_log_loss("val")
    assert english < source.optimum_log_loss("val") < english + 30 * math.log(2)


# A side of sentence pairs


def test_sides_of_pairs() -> None:
    pairs = TSV(train=write("a.tsv", "one\teins\n\tzwei\nthree\t\n"))
    assert texts(SideOf(pairs)) == ["one", "three"]
    assert texts(SideOf(pairs, "target")) == ["eins", "zwei"]
    both = SideOf(pairs, "both")
    both.prepare()
    assert both.splits() == ["train"]
    assert texts(both) == ["one", "eins", "zwei", "three"]
    sides: Any = ("source", "target", "both")
    prints = {SideOf(pairs, side).fingerprint("train") for side in sides}
    assert len(prints | {pairs.fingerprint("train")}) == 4
    with pytest.raises(DataError, match="no split 'val'"):
        both.texts("val")


def test_an_unknown_side_is_refused() -> None:
    left: Any = "left"
    assert refusal(lambda: SideOf(Grammar(), left)) == (
        "SideOf: side is 'left'; there are 'source', 'target', 'both'"
    )


def test_a_source_of_short_documents_has_one_piece_for_each() -> None:
    source = SideOf(Grammar(n_val=3), "target")
    assert list(source.pieces("val")) == [Piece(text, last=True) for text in texts(source, "val")]


# Hugging Face


class Rows(list[dict[str, Any]]):
    """Stands in for a `datasets.Dataset`."""

    _fingerprint = "abc"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the optional package, with one dataset; returns the calls made to it."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, revision: str | None, split: str) -> Rows:
        calls.append((name, config, revision, split))
        return Rows([{"text": "a\r\nb\n"}, {"text": ""}, {"text": "c"}, {"text": None}])

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hugging_face_texts(hub: list[tuple[Any, ...]]) -> None:
    source = HuggingFaceTexts("some/books", config="raw", revision="v1", val=None)
    assert source.splits() == ["train", "test"]
    source.prepare()
    assert hub == [("some/books", "raw", "v1", "train"), ("some/books", "raw", "v1", "test")]
    rows = source.texts("train")
    assert list(islice(rows, 2)) == ["a\nb\n", "c"]
    assert refusal(lambda: next(rows)) == "some/books, train, row 3: 'text' is null, not a text"
    other = HuggingFaceTexts("some/books", "title", val=None)
    assert source.fingerprint("train") != other.fingerprint("train")
    assert refusal(lambda: next(other.texts("train"))) == (
        "some/books, train, row 0 has no key 'title'; it has 'text'"
    )
    assert "no split 'val'" in refusal(lambda: source.texts("val"))
