"""Sources of local files: the same interface over pairs of text files, TSV and JSON lines."""

import gzip
import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tx_lightning.data import fingerprints
from tx_lightning.data.errors import listed
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.huggingface import HuggingFacePairs
from tx_lightning.data.labelled_sources import HuggingFaceLabelled
from tx_lightning.data.sources import TSV, DataError, JSONLines, ParallelSource, TextPairs
from tx_lightning.data.store import PairStore
from tx_lightning.data.text_sources import HuggingFaceTexts
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizers
from tx_lightning.data.writing import PairFilter, write_pairs

PAIRS = [("one", "eins"), ("", "zwei"), ("three  four", "")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TX_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names keep the expected messages short."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    content = text.encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def text_pairs(name: str = "train") -> TextPairs:
    source = write(f"{name}.en", "".join(f"{source}\n" for source, _ in PAIRS))
    target = write(f"{name}.de.gz", "".join(f"{target}\n" for _, target in PAIRS))
    return TextPairs(train=(source, target))


def tsv(name: str = "train.tsv") -> TSV:
    return TSV(train=write(name, "".join(f"{source}\t{target}\n" for source, target in PAIRS)))


def json_lines(name: str = "train.jsonl") -> JSONLines:
    records = [{"source": source, "target": target} for source, target in PAIRS]
    return JSONLines(train=write(name, "".join(json.dumps(record) + "\n" for record in records)))


Make = Callable[[], ParallelSource]
formats = pytest.mark.parametrize("make", [text_pairs, tsv, json_lines])


@formats
def test_every_format_yields_the_same_pairs(make: Make) -> None:
    source = make()
    source.prepare()
    assert source.splits() == ["train"]
    assert list(source.pairs("train")) == PAIRS
    assert list(source.pairs("train")) == PAIRS  # again, from the start
    assert list(pickle.loads(pickle.dumps(source)).pairs("train")) == PAIRS


@formats
def test_a_missing_split_lists_those_there_are(make: Make) -> None:
    source = make()
    expected = f"{type(source).__name__} has no split 'val'; it has 'train'"
    assert refusal(lambda: source.pairs("val")) == expected
    assert refusal(lambda: source.fingerprint("val")) == expected


def test_the_nearest_split_is_named_first() -> None:
    names = ("a", "b")
    source = TextPairs(train=names, val=names, test=names)
    assert refusal(lambda: source.pairs("tets")).endswith("it has 'test', 'train', 'val'")


@pytest.mark.parametrize("kind", [TextPairs, TSV, JSONLines])
def test_a_source_without_files_is_refused(kind: type[ParallelSource]) -> None:
    assert refusal(kind) == f"{kind.__name__} has no files: give at least one of train, val, test"


def test_text_pairs_take_two_files() -> None:
    three: Any = ["a", "b", "c"]
    message = refusal(lambda: TextPairs(train=("a", "b"), val=three))
    assert message == ("TextPairs: val is ['a', 'b', 'c'], but must be two files: [source, target]")


def test_prepare_refuses_missing_and_empty_files_of_every_split() -> None:
    good = text_pairs().files["train"]
    assert len(good) == 2
    missing = TextPairs(train=good, test=("train.en", "trian.de.gz"))
    assert refusal(missing.prepare).startswith(
        "there is no file trian.de.gz; the folder has 'train.de.gz'"
    )
    empty = TextPairs(train=good, val=("train.en", write("val.de", "")))
    assert refusal(empty.prepare) == "val.de is empty: it has no lines"


def test_different_line_counts_are_both_said() -> None:
    source = TextPairs(train=(write("a.en", "1\n2\n3\n"), write("a.de", "1\n2\n3\n4\n5\n")))
    assert refusal(lambda: list(source.pairs("train"))).startswith(
        "a.en has 3 lines but a.de has 5:"
    )


def test_the_training_filter_drops_a_line_of_a_million_characters(tmp_path: Path) -> None:
    short = "".join(f"sentence {n}\n" for n in range(9))
    source = TextPairs(
        train=(write("a.en", f"{short}{'x' * 1_000_000}\n"), write("a.de", f"{short}ten\n"))
    )
    tokenizer = ByteLevelBPE().train([short], 300)
    folder = tmp_path / "store"
    folder.mkdir()
    write_pairs(
        folder, source.pairs("train"), Tokenizers(tokenizer, tokenizer), PairFilter(max_length=50)
    )
    store = PairStore(folder)
    assert len(store) == 9
    assert store.counts.dropped == {"empty": 0, "too_long": 1, "ratio": 0}


# TSV


def test_tsv_columns_by_number() -> None:
    file = write("a.tsv", "1\teins\tone\n2\tzwei\ttwo\n")
    source = TSV(train=file, source_column=2, target_column=1)
    assert list(source.pairs("train")) == [("one", "eins"), ("two", "zwei")]


def test_tsv_columns_by_name_take_the_header() -> None:
    file = write("a.tsv.gz", "\ufeffde\ten\tid\r\neins\tone\t1\r\n")
    by_name = TSV(train=file, source_column="en", target_column="de")
    assert list(by_name.pairs("train")) == [("one", "eins")]
    mixed = TSV(train=file, source_column="en", target_column=2)
    assert list(mixed.pairs("train")) == [("one", "1")]


def test_tsv_quotes_and_spaces_are_text() -> None:
    file = write("a.tsv", '"one\t two "\n')
    assert list(TSV(train=file).pairs("train")) == [('"one', ' two "')]


def test_tsv_empty_line_is_a_pair_of_empty_texts() -> None:
    file = write("a.tsv", "a\tb\n\nc\td\n")
    assert list(TSV(train=file).pairs("train")) == [("a", "b"), ("", ""), ("c", "d")]


def test_tsv_unknown_column_lists_the_columns() -> None:
    file = write("a.tsv", "id\tenglish\tgerman\n1\tone\teins\n")
    source = TSV(train=file, source_column="englisch", target_column="german")
    assert refusal(lambda: list(source.pairs("train"))) == (
        "a.tsv has no column 'englisch'; it has 'english', 'id', 'german'"
    )


def test_tsv_missing_column_says_the_line_and_its_columns() -> None:
    by_number = TSV(train=write("a.tsv", "a\tb\nc d\n"))
    assert refusal(lambda: list(by_number.pairs("train"))) == (
        "a.tsv, line 2 has no column 1; its columns, between tabs, are 0"
    )
    by_name = TSV(train=write("b.tsv", "en\tde\na\tb\nc\n"), source_column="en", target_column="de")
    assert "b.tsv, line 3 has no column 1" in refusal(lambda: list(by_name.pairs("train")))


def test_tsv_a_header_alone_is_an_empty_file() -> None:
    source = TSV(train=write("a.tsv", "en\tde\n"), source_column="en", target_column="de")
    assert refusal(lambda: list(source.pairs("train"))) == "a.tsv is empty: it has only a header"


def test_tsv_negative_column_is_refused() -> None:
    assert refusal(lambda: TSV(train="a.tsv", target_column=-1)) == (
        "TSV: target_column is -1, but columns are numbered from 0"
    )


# JSON lines


def test_json_keys_and_nested_keys() -> None:
    file = write(
        "a.jsonl",
        '{"id": 1, "translation": {"en": "one", "de": "eins"}, "x.y": "dot"}\n \n'
        '{"id": 2, "translation": {"en": "t\\u00fc", "de": ""}, "x.y": "dot"}\n',
    )
    nested = JSONLines(train=file, source_key="translation.en", target_key="translation.de")
    assert list(nested.pairs("train")) == [("one", "eins"), ("tü", "")]
    dotted = JSONLines(train=file, source_key="x.y", target_key="translation.de")
    assert list(dotted.pairs("train")) == [("dot", "eins"), ("dot", "")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"source": "a", "target"', "a.jsonl, line 2 is not JSON: "),
        ("[" * 100_000, "a.jsonl, line 2 is not JSON: "),
        ('["a", "b"]', "a.jsonl, line 2 is a list, not an object with the key 'source'"),
        (
            '{"source": "a", "tgt": "b"}',
            "a.jsonl, line 2 has no key 'target'; it has 'tgt', 'source'",
        ),
        ("{}", "a.jsonl, line 2 has no key 'source'; it has none"),
        ('{"source": null, "target": ""}', "a.jsonl, line 2: 'source' is null, not a text"),
        ('{"source": "", "target": 1.5}', "a.jsonl, line 2: 'target' is a number, not a text"),
        ('{"source": "\\u0000", "target": ""}', "a.jsonl, line 2 holds a NUL byte"),
        ('{"source": "\\ud83d", "target": ""}', "a.jsonl, line 2: character 1 is U+D83D"),
    ],
)
def test_json_mistakes_are_said_by_file_and_line(line: str, expected: str) -> None:
    source = JSONLines(train=write("a.jsonl", f'{{"source": "a", "target": "b"}}\n{line}\n'))
    assert refusal(lambda: list(source.pairs("train"))).startswith(expected)


def test_json_line_break_in_a_text_is_a_space() -> None:
    source = JSONLines(train=write("a.jsonl", '{"source": "a\\nb", "target": "c\\r\\nd"}\n'))
    assert list(source.pairs("train")) == [("a b", "c d")]


def test_json_file_of_blank_lines_is_an_empty_file() -> None:
    source = JSONLines(train=write("a.jsonl", "\n \n"))
    assert refusal(lambda: list(source.pairs("train"))) == "a.jsonl is empty: it has no objects"


# Fingerprints


@formats
def test_fingerprint_follows_the_content(make: Make) -> None:
    source = make()
    before = source.fingerprint("train")
    assert set(before) <= set("0123456789abcdef")
    assert make().fingerprint("train") == before
    file = (
        next(Path().glob("train.en"))
        if isinstance(source, TextPairs)
        else next(Path().glob("train*"))
    )
    file.write_bytes(file.read_bytes().replace(b"one", b"One"))  # the same size, at once
    assert source.fingerprint("train") != before


def test_fingerprint_follows_what_is_read_from_the_file() -> None:
    file = write("a", '{"source": "x", "target": "y"}\t\n')
    prints = [
        TSV(train=file).fingerprint("train"),
        TSV(train=file, source_column=1, target_column=0).fingerprint("train"),
        TSV(train=file, source_column="0", target_column="1").fingerprint("train"),
        TSV(train=file, source_column="source", target_column="target").fingerprint("train"),
        JSONLines(train=file).fingerprint("train"),
        JSONLines(train=file, source_key="target", target_key="source").fingerprint("train"),
        TextPairs(train=(file, file)).fingerprint("train"),
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_of_swapped_sides_differs() -> None:
    a, b = write("a", "1\n"), write("b", "2\n")
    forward, backward = TextPairs(train=(a, b)), TextPairs(train=(b, a))
    assert forward.fingerprint("train") != backward.fingerprint("train")


def test_hash_of_an_unchanged_file_is_kept(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED", 0)
    file = write("a", "text\n")
    computed = file_sha256(file)
    (note,) = (own_cache / "sha256").iterdir()
    note.write_text("0" * 64)
    assert file_sha256(file) == "0" * 64  # not read again
    note.write_text("")  # as a power cut may leave it
    assert file_sha256(file) == computed


def test_hash_of_a_file_still_being_written_is_not_kept(own_cache: Path) -> None:
    file_sha256(write("a", "text\n"))
    assert not own_cache.exists()


def test_hash_of_a_file_changed_in_place_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED", 0)
    before = file_sha256(write("a", "text\n"))
    write("a", "Text\n")
    os.utime("a", ns=(0, 0))
    assert file_sha256("a") != before


def test_hash_of_a_replaced_file_with_an_old_date_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED", 0)
    write("a", "text\n")
    write("b", "Text\n")
    os.utime("a", ns=(0, 0))
    os.utime("b", ns=(0, 0))
    before = file_sha256("a")
    Path("b").replace("a")
    assert file_sha256("a") != before


def test_hash_needs_no_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TX_LIGHTNING_CACHE", write("a", "in the way\n"))
    monkeypatch.setattr(fingerprints, "_SETTLED", 0)
    file = write("b", "")
    assert file_sha256(file).startswith("e3b0c44298fc1c14")  # of no bytes, by the standard


def test_hash_of_a_missing_file_is_refused() -> None:
    assert refusal(lambda: file_sha256("nothing")) == (
        "cannot read nothing: No such file or directory"
    )


# Lists in messages


def test_long_lists_and_names_are_cut_short() -> None:
    message = listed([f"column {n}" for n in range(5000)] + ["x" * 10**6], "column 77")
    assert message.startswith("'column 77', ")
    assert message.endswith(" and 4991 more")
    assert len(message) < 300
    assert len(listed(["x" * 10**6], "y")) < 80


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
        if split == "validation":
            raise ValueError("Unknown split \"validation\".\n Should be one of ['train'].")
        return Rows(
            [{"translation": {"en": "one", "de": "eins\n"}}, {"translation": {"en": "two"}}]
        )

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hugging_face_pairs(hub: list[tuple[Any, ...]]) -> None:
    source = HuggingFacePairs(
        "wmt/x", "translation.en", "translation.de", config="de-en", revision="v1", val=None
    )
    assert source.splits() == ["train", "test"]
    source.prepare()
    assert hub == [("wmt/x", "de-en", "v1", "train"), ("wmt/x", "de-en", "v1", "test")]
    pairs = source.pairs("train")
    assert next(pairs) == ("one", "eins ")
    assert (
        refusal(lambda: next(pairs))
        == "wmt/x, train, row 1, translation has no key 'de'; it has 'en'"
    )
    swapped = HuggingFacePairs("wmt/x", "translation.de", "translation.en")
    assert source.fingerprint("train") != swapped.fingerprint("train")


def test_hugging_face_refusals_are_one_line(hub: list[tuple[Any, ...]]) -> None:
    source = HuggingFacePairs("wmt/x", "en", "de")
    assert refusal(source.prepare) == (
        "cannot load split 'validation' of the dataset 'wmt/x': "
        "Unknown split \"validation\". Should be one of ['train']."
    )
    assert refusal(lambda: source.pairs("dev")).startswith(
        "HuggingFacePairs has no split 'dev'; it has "
    )


@pytest.mark.parametrize("reader", [HuggingFacePairs, HuggingFaceTexts, HuggingFaceLabelled])
def test_hugging_face_without_the_package(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    columns = ("en",) if reader is HuggingFaceTexts else ("en", "de")
    message = refusal(reader("wmt/x", *columns).prepare)
    assert message == (
        f"{reader.__name__} needs the package datasets: pip install 'tx-lightning[datasets]'"
    )


def test_hugging_face_folder_with_the_real_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    Path("corpus").mkdir()
    write("corpus/train.jsonl", '{"en": "one", "de": "eins"}\n{"en": "", "de": "zwei"}\n')
    source = HuggingFacePairs("corpus", "en", "de", val=None, test=None)
    source.prepare()
    assert list(source.pairs("train")) == [("one", "eins"), ("", "zwei")]
    assert source.fingerprint("train") == source.fingerprint("train")
