"""Sources of labelled texts: the same interface over TSV, CSV, JSON lines and named corpora."""

import gzip
import pickle
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_download import Server, serving
from tx_lightning.data import grammar
from tx_lightning.data.errors import DataError
from tx_lightning.data.grammar import Grammar
from tx_lightning.data.labelled_sources import (
    SST2,
    GrammarPolarity,
    HuggingFaceLabelled,
    LabelledCSV,
    LabelledJSONLines,
    LabelledSource,
    LabelledText,
    LabelledTSV,
    sorted_labels,
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


def examples(source: LabelledSource, split: str = "train") -> list[LabelledText]:
    return list(source.examples(split))


def read(source: LabelledSource, split: str = "train") -> list[tuple[str | None, ...]]:
    """The examples without the places they stand at."""
    return [example[:3] for example in source.examples(split)]


def tsv(content: str | bytes) -> LabelledTSV:
    return LabelledTSV(write("a.tsv", content), text_column="text", label_column="label")


def csv(content: str | bytes) -> LabelledCSV:
    return LabelledCSV(write("a.csv", content), text_column="text", label_column="label")


def json_lines(content: str | bytes) -> LabelledJSONLines:
    return LabelledJSONLines(write("a.jsonl", content))


SAME: list[tuple[Callable[[str], LabelledSource], str]] = [
    (tsv, "id\tlabel\ttext\n1\tgood\tone two\n2\tbad\t\n3\tgood\tthree\n"),
    (csv, "id,label,text\n1,good,one two\n2,bad,\n3,good,three\n"),
    (
        json_lines,
        (
            '{"label": "good", "text": "one two"}\n{"label": "bad", "text": ""}\n'
            '{"label": "good", "text": "three"}\n'
        ),
    ),
]


@pytest.mark.parametrize(("make", "content"), SAME)
def test_every_format_yields_the_same_examples(
    make: Callable[[str], LabelledSource], content: str
) -> None:
    source = make(content)
    source.prepare()
    assert source.splits() == ["train"]
    assert not source.pairs
    expected = [("one two", None, "good"), ("", None, "bad"), ("three", None, "good")]
    assert read(source) == expected
    assert read(source) == expected  # again, from the start
    assert read(pickle.loads(pickle.dumps(source))) == expected
    assert source.labels() == ["bad", "good"]
    before = source.fingerprint("train")
    assert make(content).fingerprint("train") == before
    assert make(content.replace("bad", "Bad")).fingerprint("train") != before


@pytest.mark.parametrize(("make", "content"), SAME)
def test_a_missing_split_lists_those_there_are(
    make: Callable[[str], LabelledSource], content: str
) -> None:
    source = make(content)
    expected = f"{type(source).__name__} has no split 'val'; it has 'train'"
    assert refusal(lambda: source.examples("val")) == expected
    assert refusal(lambda: source.labels("val")) == expected
    assert refusal(lambda: source.fingerprint("val")) == expected


@pytest.mark.parametrize("kind", [LabelledTSV, LabelledCSV, LabelledJSONLines])
def test_files_that_are_not_there_are_said(kind: Any) -> None:
    assert refusal(kind) == f"{kind.__name__} has no files: give at least one of train, val, test"
    good = write("a", "text\tlabel\n")
    assert refusal(kind(good, test="b").prepare) == "there is no file b; the folder has 'a'"
    assert refusal(kind(good, val=write("c", "")).prepare) == "c is empty: it has no lines"


@pytest.mark.parametrize("make", [tsv, csv, json_lines])
def test_what_is_no_text_is_refused_by_line(make: Callable[[bytes], LabelledSource]) -> None:
    header = b"text\tlabel\na\tb\n" if make is tsv else b"text,label\na,b\n"
    if make is json_lines:
        header = b'{"text": "a", "label": "b"}\n\n'
    for content, expected in ((b"\xe9\n", "is not UTF-8"), (b"a\0\n", "holds a NUL byte")):
        message = refusal(lambda: examples(make(header + content)))  # noqa: B023
        assert ", line 3" in message
        assert expected in message


# Tables


@pytest.mark.parametrize("kind", [LabelledTSV, LabelledCSV])
def test_columns_by_number_have_no_header(kind: Any) -> None:
    gap = "\t" if kind is LabelledTSV else ","
    file = write("a.gz", gap.join("abc") + "\r\n" + gap.join("def") + "\r\n")
    assert read(kind(file)) == [("a", None, "b"), ("d", None, "e")]
    pair = kind(file, text_column=2, label_column=1, second_column=0)
    assert pair.pairs
    assert examples(pair) == [
        LabelledText("c", "a", "b", "a.gz, line 1"),
        LabelledText("f", "d", "e", "a.gz, line 2"),
    ]
    by_name = kind(file, text_column="a", label_column=1, second_column="c")
    assert read(by_name) == [("d", "f", "e")]
    prints = [source.fingerprint("train") for source in (kind(file), pair, by_name)]
    assert len(set(prints)) == 3


def test_blank_lines_are_no_examples() -> None:
    assert [e.where for e in tsv("\ntext\tlabel\n\na\tb\n  \nc\td\n\n").examples("train")] == [
        "a.tsv, line 4",
        "a.tsv, line 6",
    ]
    assert [e.where for e in csv("\ntext,label\n\na,b\n  \nc,d\n\n").examples("train")] == [
        "a.csv, line 4",
        "a.csv, line 6",
    ]


def test_blanks_around_a_label_are_not_part_of_it() -> None:
    assert read(tsv("text\tlabel\n a \t good \n")) == [(" a ", None, "good")]
    assert read(json_lines('{"text": " a ", "label": " good\\n"}')) == [(" a ", None, "good")]


def test_quotes_are_text_in_tsv() -> None:
    assert read(tsv('text\tlabel\n"a\tb"\n')) == [('"a', None, 'b"')]


def test_csv_quotes_commas_and_line_feeds() -> None:
    source = csv(
        '\ufefflabel,"text"\r\ngood,"one, ""two"""\r\n'
        'bad,"three\r\nfour\r\n\r\nfive"\r\nbad,six\r\n'
    )
    assert examples(source) == [
        LabelledText('one, "two"', None, "good", "a.csv, line 2"),
        LabelledText("three four  five", None, "bad", "a.csv, line 3"),
        LabelledText("six", None, "bad", "a.csv, line 7"),
    ]


@pytest.mark.parametrize(
    "row", ['"one,good\ntwo,bad\n', '"one"two,good\n', f'"{"x" * 200_000}",good\n']
)
def test_csv_that_is_none_is_said_with_the_line_it_begins_in(row: str) -> None:
    source = csv(f"text,label\nzero,good\n{row}")
    assert refusal(lambda: examples(source)).startswith(
        "a.csv, line 3 begins a row that is not CSV: "
    )


@pytest.mark.parametrize("make", [tsv, csv])
def test_mistakes_in_tables(make: Callable[[str], LabelledSource]) -> None:
    def message(content: str) -> str:
        gap = "\t" if make is tsv else ","
        return refusal(lambda: examples(make(content.replace("|", gap)))).replace(".csv", ".tsv")

    assert message("id|txt|label\n1|a|b\n") == (
        "a.tsv has no column 'text'; it has 'txt', 'id', 'label'"
    )
    assert message("text|label\n") == "a.tsv is empty: it has only a header"
    assert message("\n\n") == "a.tsv is empty: it has no rows"
    assert message("text|label\na|b\nc\n") == ("a.tsv, line 3 has 1 fields, but the header has 2")
    assert message("text|label\na|b|c\n") == "a.tsv, line 2 has 3 fields, but the header has 2"
    assert message("text|label\na|b\nc| \n") == (
        "a.tsv, line 3: the label is empty; give it one, or remove the line"
    )
    assert "line 2: the label is empty" in message("text|label\n|\n")


@pytest.mark.parametrize("kind", [LabelledTSV, LabelledCSV])
def test_mistakes_in_tables_without_header(kind: Any) -> None:
    file = write("a", "a\tb\n" if kind is LabelledTSV else "a,b\n")
    assert refusal(lambda: examples(kind(file, label_column=3))) == (
        "a, line 1 has no column 3; its columns are 0, 1"
    )
    assert refusal(lambda: kind(file, second_column=-1)) == (
        f"{kind.__name__}: second_column is -1, but columns are numbered from 0"
    )
    blank = write("b", "\n \n")
    assert refusal(lambda: examples(kind(blank))) == "b is empty: it has no rows"


# JSON lines


def test_json_labels_may_be_numbers_and_booleans() -> None:
    lines = [f'{{"text": "a", "label": {label}}}' for label in ("0", "-1", "2.5", "true", '"x"')]
    assert [e.label for e in examples(json_lines("\n".join(lines)))] == [
        "0",
        "-1",
        "2.5",
        "true",
        "x",
    ]


def test_json_pairs_and_nested_keys() -> None:
    file = write("a.jsonl", '\n{"q": {"a": "one\\ntwo", "b": "three"}, "same": false}\n')
    source = LabelledJSONLines(file, text_key="q.a", second_key="q.b", label_key="same")
    assert source.pairs
    assert examples(source) == [LabelledText("one two", "three", "false", "a.jsonl, line 2")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "label"', "a.jsonl, line 2 is not JSON: "),
        ('"text"', "a.jsonl, line 2 is a text, not an object with the key 'text'"),
        ("[1]", "a.jsonl, line 2 is a list, not an object with the key 'text'"),
        ('{"txt": "a", "label": 1}', "a.jsonl, line 2 has no key 'text'; it has 'txt', 'label'"),
        ('{"text": "a"}', "a.jsonl, line 2 has no key 'label'; it has 'text'"),
        ('{"text": 1, "label": 1}', "a.jsonl, line 2: 'text' is a number, not a text"),
        ('{"text": "", "label": null}', "a.jsonl, line 2: the label is null, but must be a text, "),
        ('{"text": "", "label": [1]}', "a.jsonl, line 2: the label is a list, but must be a text"),
        ('{"text": "", "label": " "}', "a.jsonl, line 2: the label is empty; give it one, or "),
    ],
)
def test_json_mistakes_are_said_by_file_and_line(line: str, expected: str) -> None:
    source = json_lines(f'{{"text": "a", "label": "b"}}\n{line}\n')
    assert refusal(lambda: examples(source)).startswith(expected)


def test_json_fingerprint_follows_the_keys() -> None:
    file = write("a", "{}\n")
    sources = [
        LabelledJSONLines(file),
        LabelledJSONLines(file, second_key="second"),
        LabelledJSONLines(file, text_key="label", label_key="text"),
        LabelledCSV(file),
        LabelledTSV(file),
    ]
    assert len({source.fingerprint("train") for source in sources}) == len(sources)


# Labels


def test_labels_in_their_natural_order() -> None:
    assert sorted_labels(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert sorted_labels(["10", "9", "b"]) == ["10", "9", "b"]
    assert sorted_labels(["positive", "negative"]) == ["negative", "positive"]
    assert sorted_labels(["2.5", "10"]) == ["10", "2.5"]


def test_labels_are_those_of_the_training_split() -> None:
    source = LabelledTSV(write("a", "x\t1\n"), val=write("b", "x\t2\n"))
    assert source.labels() == ["1"]
    assert source.labels("val") == ["2"]


# SST-2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


def test_sst2_is_as_published(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TX_LIGHTNING_DATA", str(real_data))
    source = SST2()
    source.prepare()
    assert not source.pairs
    counts = {s: Counter(e.label for e in source.examples(s)) for s in source.splits()}
    assert counts == {
        "train": {"positive": 3610, "negative": 3310},
        "val": {"positive": 444, "negative": 428},
        "test": {"positive": 909, "negative": 912},
    }
    assert source.labels() == ["negative", "positive"]
    first = next(source.examples("val"))
    assert first.text == "one long string of cliches ."
    assert first.label == "negative"
    assert first.where == f"{real_data}/sst2/stsa.binary.dev, line 1"


def test_sst2_needs_no_file_for_its_fingerprints() -> None:
    source = SST2()
    assert len({source.fingerprint(split) for split in source.splits()}) == 3
    assert refusal(lambda: source.examples("dev")) == (
        "SST2 has no split 'dev'; it has 'train', 'val', 'test'"
    )
    assert refusal(lambda: examples(source)).startswith("there is no sst2/stsa.binary.train here;")


def test_sst2_that_is_wrong_or_cut_is_not_kept(server: Server, tmp_path: Path) -> None:
    source = SST2(server.url)
    assert "HTTP status 404" in refusal(source.prepare)
    server.files["stsa.binary.train"] = b"1 good\n" * 6920
    message = refusal(source.prepare)
    assert message.startswith(f"{server.url}/stsa.binary.train is not the file that was published")
    server.cut.add("stsa.binary.train")
    assert "the connection was cut" in refusal(source.prepare)
    assert not list((tmp_path / "cache").rglob("stsa*"))


def test_sst2_refuses_a_line_without_its_label(tmp_path: Path) -> None:
    (tmp_path / "cache" / "sst2").mkdir(parents=True)
    file = tmp_path / "cache" / "sst2" / "stsa.binary.dev"
    file.write_text("1 good\nbad\n")
    assert refusal(lambda: examples(SST2(), "val")) == (
        f"{file}, line 2 begins with 'bad', not with '0' or '1'"
    )


# The embedded language


def test_grammar_polarity_is_that_of_the_grammar() -> None:
    english = GrammarPolarity(n_val=30, seed=2)
    german = GrammarPolarity("de", n_val=30, seed=2)
    assert english.splits() == ["train", "val", "test"]
    assert not english.pairs
    pairs = list(Grammar("de", "en", n_val=30, seed=2).pairs("val"))
    assert [e.text for e in examples(english, "val")] == [text for _, text in pairs]
    assert [e.text for e in examples(german, "val")] == [text for text, _ in pairs]
    for example in english.examples("val"):
        assert example.second is None
        assert example.label == grammar.polarity(example.text)
    assert [e.label for e in examples(german, "val")] == [e.label for e in examples(english, "val")]
    assert examples(english, "val")[1].where == "val of the embedded language, sentence 2"
    assert english.fingerprint("val") != german.fingerprint("val")
    assert english.fingerprint("val") != Grammar("en", "de", n_val=30, seed=2).fingerprint("val")


def test_labels_of_the_grammar_need_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GrammarPolarity(n_train=50)
    assert source.labels() == sorted({e.label for e in source.examples("train")})
    monkeypatch.delattr(Grammar, "examples")
    assert source.labels() == ["negative", "positive"]


def test_grammar_polarity_refuses_what_the_grammar_refuses() -> None:
    french: Any = "fr"
    assert "'fr'; there are 'de' and 'en'" in refusal(lambda: GrammarPolarity(french))
    assert "n_val is 0" in refusal(lambda: GrammarPolarity(n_val=0))
    assert "no split 'dev'" in refusal(lambda: GrammarPolarity().examples("dev"))


# Hugging Face


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = names


class Rows(list[dict[str, Any]]):
    """Stands in for a `datasets.Dataset`."""

    _fingerprint = "abc"
    features: dict[str, Any]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The rows of every dataset of a stand-in for the optional package."""
    rows = Rows([{"a": "one\ntwo", "b": "three", "y": 1}, {"a": "x", "b": "", "y": 0}])
    rows.features = {"a": "string", "b": "string", "y": ClassLabel("no", "yes")}
    module: Any = types.ModuleType("datasets")
    module.load_dataset = lambda name, config, *, revision, split: rows
    module.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    module.ClassLabel = ClassLabel
    monkeypatch.setitem(sys.modules, "datasets", module)
    return rows


def test_hugging_face_labels_have_their_names(rows: Rows) -> None:
    source = HuggingFaceLabelled("glue/x", "a", "y", "b", test=None)
    source.prepare()
    assert source.splits() == ["train", "val"]
    assert source.pairs
    assert examples(source, "val") == [
        LabelledText("one two", "three", "yes", "glue/x, validation, row 0"),
        LabelledText("x", "", "no", "glue/x, validation, row 1"),
    ]
    assert source.labels() == ["no", "yes"]
    rows.append({"a": "", "b": "", "y": -1})
    assert refusal(lambda: examples(source)) == (
        "glue/x, train, row 2: the label is -1, but the labels with a name are 0 to 1; data "
        "without labels (-1) cannot be used"
    )


def test_hugging_face_numbers_without_names_stay_numbers(rows: Rows) -> None:
    rows.features["y"] = "int64"
    source = HuggingFaceLabelled("glue/x", "a", "y")
    assert not source.pairs
    assert read(source) == [("one two", None, "1"), ("x", None, "0")]
    pairs = HuggingFaceLabelled("glue/x", "a", "y", "b")
    assert source.fingerprint("train") != pairs.fingerprint("train")
    assert refusal(lambda: examples(HuggingFaceLabelled("glue/x", "c", "y"))) == (
        "glue/x, train, row 0 has no key 'c'; it has 'a', 'b', 'y'"
    )
