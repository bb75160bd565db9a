"""Sources of sentences with a tag for each word."""

import gzip
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tx_lightning.data.errors import DataError
from tx_lightning.data.grammar import Grammar
from tx_lightning.data.tagged_sources import (
    CoNLL,
    GrammarTags,
    TaggedJSONLines,
    TaggedSentence,
    TaggedSource,
)


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names keep the expected messages short."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def sentences(source: TaggedSource, split: str = "train") -> list[TaggedSentence]:
    return list(source.sentences(split))


def conll(content: str | bytes) -> CoNLL:
    return CoNLL(write("a.conll", content))


def json_lines(content: str | bytes) -> TaggedJSONLines:
    return TaggedJSONLines(write("a.jsonl", content))


SAME: list[tuple[Callable[[str], TaggedSource], str]] = [
    (conll, "EU B-ORG\nrejects O\n\n\nit O\n"),
    (
        json_lines,
        (
            '{"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}\n\n\n'
            '{"words": ["it"], "tags": ["O"]}\n'
        ),
    ),
]


@pytest.mark.parametrize(("make", "content"), SAME)
def test_every_format_yields_the_same_sentences(
    make: Callable[[str], TaggedSource], content: str
) -> None:
    source = make(content)
    source.prepare()
    assert source.splits() == ["train"]
    expected = [(["EU", "rejects"], ["B-ORG", "O"]), (["it"], ["O"])]
    assert [sentence[:2] for sentence in sentences(source)] == expected
    assert [sentence[:2] for sentence in sentences(source)] == expected  # again, from the start
    assert sentences(pickle.loads(pickle.dumps(source))) == sentences(source)
    assert source.tags() == ["B-ORG", "O"]
    before = source.fingerprint("train")
    assert make(content).fingerprint("train") == before
    assert make(content.replace("EU", "eu")).fingerprint("train") != before


@pytest.mark.parametrize(("make", "content"), SAME)
def test_a_missing_split_lists_those_there_are(
    make: Callable[[str], TaggedSource], content: str
) -> None:
    source = make(content)
    expected = f"{type(source).__name__} has no split 'val'; it has 'train'"
    assert refusal(lambda: source.sentences("val")) == expected
    assert refusal(lambda: source.tags("val")) == expected
    assert refusal(lambda: source.fingerprint("val")) == expected


@pytest.mark.parametrize("kind", [CoNLL, TaggedJSONLines])
def test_files_that_are_not_there_are_said(kind: Any) -> None:
    assert refusal(kind) == f"{kind.__name__} has no files: give at least one of train, val, test"
    good = write("a", "EU B-ORG\n")
    assert refusal(kind(good, test="b").prepare) == "there is no file b; the folder has 'a'"
    assert refusal(kind(good, val=write("c", "")).prepare) == "c is empty: it has no lines"


@pytest.mark.parametrize(("make", "content"), SAME)
def test_what_is_no_text_is_refused_by_line(
    make: Callable[[bytes], TaggedSource], content: str
) -> None:
    line = content.count("\n") + 1
    source = make(content.encode() + b"one \xe9 O\n")
    assert f", line {line}: byte 5 (0xe9) is not UTF-8" in refusal(lambda: sentences(source))


# CoNLL


def test_documents_comments_and_blank_lines_are_left_out() -> None:
    source = conll(
        "-DOCSTART- -X- -X- O\n\n# text = EU rejects\n#\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n"
        " \n# one more\n\n# and more\n# # O O\n"
    )
    assert sentences(source) == [
        TaggedSentence(["EU", "rejects"], ["B-ORG", "O"], "a.conll, line 5")
    ]


def test_a_hash_may_be_a_word_within_a_sentence() -> None:
    source = conll("#\tO\n#tag\tO\n\nGive VB\n# $\n")
    assert [s.words for s in sentences(source)] == [["#", "#tag"], ["Give", "#"]]


def test_columns_of_conll_u() -> None:
    file = write(
        "a.conllu.gz",
        "# sent_id = 1\n1-2\tzum\t_\t_\n1\tzu\tzu\tADP\n2\tdem\tder\tDET\n2.1\tx\tx\tVERB\n"
        "3\tNew York\tNew York\tPROPN\n\n",
    )
    source = CoNLL(file, word_column=1, tag_column=3)
    assert sentences(source) == [
        TaggedSentence(["zu", "dem", "New York"], ["ADP", "DET", "PROPN"], "a.conllu.gz, line 3")
    ]
    assert source.fingerprint("train") != CoNLL(file).fingerprint("train")


def test_only_blanks_and_tabs_separate_columns() -> None:
    source = conll("a\u00a0b   X\n\u2028c\tY\r\n")
    assert sentences(source)[0][:2] == (["a\u00a0b", "\u2028c"], ["X", "Y"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a X\nb\n", "a.conll, line 2 has 1 columns, but the first word of the file has 2"),
        ("a X\n\nb Y Z\n", "a.conll, line 3 has 3 columns, but the first word of the file has 2"),
        ("a\tX\nb\t\n", "a.conll, line 2: tag_column -1 is empty"),
        ("# only\n\n-DOCSTART- O\n", "a.conll is empty: it has no words"),
    ],
)
def test_mistakes_in_conll(content: str, expected: str) -> None:
    assert refusal(lambda: sentences(conll(content))) == expected


def test_a_column_that_is_not_there_lists_the_columns() -> None:
    source = CoNLL(write("a", "EU NNP B-ORG\n"), tag_column=3)
    assert refusal(lambda: sentences(source)) == (
        "a, line 1 has no tag_column 3; its columns are 0, 1, 2"
    )
    source = CoNLL("a", word_column=-4)
    assert refusal(lambda: sentences(source)) == (
        "a, line 1 has no word_column -4; its columns are 0, 1, 2"
    )


# JSON lines


def test_json_tags_may_be_numbers_and_keys_nested() -> None:
    file = write("a.jsonl", '{"x": {"tokens": ["New\\nYork", "is"]}, "y": [10, 9]}\n')
    source = TaggedJSONLines(file, words_key="x.tokens", tags_key="y")
    assert sentences(source) == [TaggedSentence(["New York", "is"], ["10", "9"], "a.jsonl, line 1")]
    assert source.tags() == ["9", "10"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "a.jsonl, line 2 is not JSON: "),
        ("[]", "a.jsonl, line 2 is a list, not an object with the key 'words'"),
        ('{"word": [], "tags": []}', "a.jsonl, line 2 has no key 'words'; it has 'word', 'tags'"),
        ('{"words": "a b", "tags": []}', "a.jsonl, line 2: 'words' is a text, not a list"),
        ('{"words": ["a"], "tags": {}}', "a.jsonl, line 2: 'tags' is an object, not a list"),
        ('{"words": ["a", "b"], "tags": ["X"]}', "a.jsonl, line 2 has 2 words but 1 tags: each "),
        ('{"words": [], "tags": []}', "a.jsonl, line 2 has no words; remove the line"),
        ('{"words": ["a", 1], "tags": ["X", "Y"]}', "a.jsonl, line 2, word 2 is a number, not a "),
        ('{"words": [" "], "tags": ["X"]}', "a.jsonl, line 2, word 1 is empty"),
        ('{"words": ["a"], "tags": [""]}', "a.jsonl, line 2, word 1: the label is empty"),
        ('{"words": ["a"], "tags": [null]}', "a.jsonl, line 2, word 1: the label is null, but "),
    ],
)
def test_json_mistakes_are_said_by_file_and_line(line: str, expected: str) -> None:
    source = json_lines(f'{{"words": ["a"], "tags": ["X"]}}\n{line}\n')
    assert refusal(lambda: sentences(source)).startswith(expected)


# The embedded language


def test_grammar_tags_are_the_cases_of_its_german_words() -> None:
    source = GrammarTags(n_val=300)
    assert source.splits() == ["train", "val", "test"]
    tagged = {
        " ".join(s.words): " ".join(tag[:3] for tag in s.tags) for s in sentences(source, "val")
    }
    assert list(tagged) == list(
        dict.fromkeys(german for german, _ in Grammar("de", "en", n_val=300).pairs("val"))
    )
    assert tagged["Ein Mädchen hat dir die Blumen gestohlen."] == "nom nom ver dat acc acc ver"
    assert tagged["Den Schlüssel hat mein altes Mädchen heute weggeworfen."] == (
        "acc acc ver nom nom nom oth ver"
    )
    assert tagged[
        "Das Mädchen, das diese alten Ärztinnen angelacht hat, hat das Buch angenommen."
    ] == ("nom nom oth acc acc acc ver ver ver acc acc ver")
    assert sentences(source, "val")[4].where == "val of the embedded language, sentence 5"


def test_every_noun_form_is_in_the_case_it_is_tagged_with() -> None:
    seen = defaultdict(set)
    for sentence in GrammarTags(n_train=2000).sentences("train"):
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            seen[word.rstrip(".,")].add(tag)
    assert seen["Männern"] == seen["ihm"] == seen["einem"] == {"dative"}
    assert seen["er"] == seen["wir"] == {"nominative"}
    assert seen["ihn"] == {"accusative"}
    assert seen["Mann"] == {"nominative", "accusative", "dative"}
    assert seen["mit"] == seen["nicht"] == seen["weil"] == seen["denen"] == {"other"}
    assert seen["weggeworfen"] == seen["hat"] == seen["zu"] == {"verb"}


def test_a_word_alone_does_not_tell_its_tag() -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in GrammarTags(n_train=3000).sentences("train"):
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
    best = sum(max(tags.values()) for tags in counts.values())
    assert best / sum(sum(tags.values()) for tags in counts.values()) < 0.85


def test_tags_of_the_grammar_need_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GrammarTags(n_train=50)
    found = {tag for s in source.sentences("train") for tag in s.tags}
    assert source.fingerprint("train") != source.grammar.fingerprint("train")
    assert source.fingerprint("train") == GrammarTags(n_train=50).fingerprint("train")
    monkeypatch.delattr(Grammar, "examples")
    assert source.tags() == sorted(found) == ["accusative", "dative", "nominative", "other", "verb"]


def test_grammar_tags_refuse_what_the_grammar_refuses() -> None:
    assert "n_train is 0" in refusal(lambda: GrammarTags(n_train=0))
    assert "no split 'dev'" in refusal(lambda: GrammarTags().sentences("dev"))
