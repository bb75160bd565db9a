"""Where data comes from: the interface of every source, and sentence pairs in files.

A source yields raw text, in file order, one pair (document, example, sentence) at a time; what it
cannot read it refuses with a `DataError` that names the file and the line. The rules for text are
in `text.py`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from tx_lightning.data.errors import DataError, listed
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.text import checked, read_aligned, read_lines

__all__ = [
    "TSV",
    "DataError",
    "FilePairs",
    "FileSource",
    "JSONLines",
    "ParallelSource",
    "Source",
    "TextPairs",
]


class Source(ABC):
    """Data in named splits; one file or many, local, downloaded or made up."""

    @abstractmethod
    def splits(self) -> list[str]:
        """The names of the splits; reads no file."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """A hexadecimal string that changes when what the split yields changes."""

    def prepare(self) -> None:  # noqa: B027 -- most sources have nothing to prepare
        """Download and verify what is needed; called once, in one process, before reading."""

    def check_split(self, split: str) -> None:
        """Refuse a split that does not exist.

        Raises:
            DataError: Lists the splits that do, the nearest name first.
        """
        if split not in self.splits():
            raise DataError(
                f"{type(self).__name__} has no split {split!r}; it has "
                f"{listed(self.splits(), split)}"
            )


class ParallelSource(Source):
    """Sentence pairs in named splits."""

    @abstractmethod
    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        """The (source, target) texts of a split in file order, streamed.

        Texts are as they stand in the file, without line ends; a side may be empty.

        Raises:
            DataError: There is no such split, or a file of it cannot be read.
        """


class FileSource(Source):
    """A source whose splits are local files; a format adds how they are read.

    Args:
        files: The files of each split; a split that is None does not exist.
        options: What else decides what is read, such as column names; goes into the fingerprint.
    """

    def __init__(self, files: dict[str, tuple[str, ...] | None], options: str = "") -> None:
        self.files = {split: names for split, names in files.items() if names is not None}
        self._options = options
        if not self.files:
            raise DataError(
                f"{type(self).__name__} has no files: give at least one of {', '.join(files)}"
            )

    def splits(self) -> list[str]:
        return list(self.files)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        parts = [type(self).__name__, self._options, *map(file_sha256, self.files[split])]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def prepare(self) -> None:
        """Refuse missing and empty files of any split now, not when the first epoch is over."""
        for names in self.files.values():
            for name in names:
                next(read_lines(name))


class FilePairs(FileSource, ParallelSource):
    """Sentence pairs in local files; a format adds `read`."""

    @abstractmethod
    def read(self, *files: str) -> Iterator[tuple[str, str]]:
        """The pairs in the files of one split."""

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        self.check_split(split)
        return self.read(*self.files[split])


class TextPairs(FilePairs):
    """Two text files for each split, plain or gzip: line n of one translates line n of the other.

    Args:
        train: The source file and the target file of the split `train`.
        val: The same for `val`.
        test: The same for `test`.
    """

    def __init__(
        self,
        train: tuple[str, str] | None = None,
        val: tuple[str, str] | None = None,
        test: tuple[str, str] | None = None,
    ) -> None:
        for split, names in (("train", train), ("val", val), ("test", test)):
            if names is not None and len(names) != 2:
                raise DataError(
                    f"TextPairs: {split} is {names!r}, but must be two files: [source, target]"
                )
        super().__init__({"train": train, "val": val, "test": test})

    def read(self, *files: str) -> Iterator[tuple[str, str]]:
        source, target = files
        return read_aligned(source, target)


class TSV(FilePairs):
    """A file with tab-separated columns for each split, plain or gzip; quotes mean nothing.

    An empty line is a pair of empty texts. All other lines have as many columns as the first one:
    a tab too many or too few would put a text into another column.

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        source_column: Column of the source text: its number, from 0, or its name. If one of the
            two columns is given by name, the first line of every file is a header and no pair.
        target_column: Column of the target text, likewise.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        source_column: int | str = 0,
        target_column: int | str = 1,
    ) -> None:
        check_column("TSV", "source_column", source_column)
        check_column("TSV", "target_column", target_column)
        self.columns = (source_column, target_column)
        files = {"train": one_file(train), "val": one_file(val), "test": one_file(test)}
        super().__init__(files, repr(self.columns))

    def read(self, *files: str) -> Iterator[tuple[str, str]]:
        (file,) = files
        lines = read_lines(file)
        header = None
        if any(isinstance(column, str) for column in self.columns):
            header = next(lines).split("\t")
        source, target = (column_number(column, header, file) for column in self.columns)
        header_only = header is not None
        width = None if header is None else len(header)
        for number, line in enumerate(lines, start=1 if header is None else 2):
            header_only = False
            fields = line.split("\t")
            if max(source, target) < len(fields):
                width = len(fields) if width is None else width
                check_width(fields, width, f"{file}, line {number}", header is not None)
                yield fields[source], fields[target]
            elif line == "":
                yield "", ""
            else:
                columns = ", ".join(map(str, range(min(len(fields), 10))))
                raise DataError(
                    f"{file}, line {number} has no column {max(source, target)}; its columns, "
                    f"between tabs, are {columns}"
                )
        if header_only:
            raise DataError(f"{file} is empty: it has only a header")


class JSONLines(FilePairs):
    """A file with one JSON object a line for each split, plain or gzip; blank lines are skipped.

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        source_key: Key of the source text. Dots reach into nested objects: `translation.en`.
        target_key: Key of the target text, likewise.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        source_key: str = "source",
        target_key: str = "target",
    ) -> None:
        self.keys = (source_key, target_key)
        files = {"train": one_file(train), "val": one_file(val), "test": one_file(test)}
        super().__init__(files, repr(self.keys))

    def read(self, *files: str) -> Iterator[tuple[str, str]]:
        (file,) = files
        source_key, target_key = self.keys
        for record, where in json_objects(file):
            yield text_at(record, source_key, where), text_at(record, target_key, where)


def json_objects(file: str) -> Iterator[tuple[Any, str]]:
    """(what stands in a line of a JSON-lines file, "<file>, line <n>"); skips blank lines.

    Raises:
        DataError: A line is not JSON, or no line holds anything.
    """
    blank = True
    for number, line in enumerate(read_lines(file), start=1):
        if not line or line.isspace():
            continue
        blank = False
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        yield record, where
    if blank:
        raise DataError(f"{file} is empty: it has no objects")


def value_at(record: Any, key: str, where: str) -> Any:
    """The value under a key of a decoded JSON object, or under a path of keys with dots.

    Args:
        record: The object.
        key: A key of it, or keys joined by dots.
        where: File and line, or the like, to open an error message with.

    Raises:
        DataError: It is no object, or has no such key; lists those it has.
    """
    if isinstance(record, dict) and key not in record and "." in key:
        outer, inner = key.split(".", 1)
        if isinstance(record.get(outer), dict):
            return value_at(record[outer], inner, f"{where}, {outer}")
    if not isinstance(record, dict):
        raise DataError(f"{where} is {kind_of(record)}, not an object with the key {key!r}")
    if key not in record:
        raise DataError(f"{where} has no key {key!r}; it has {listed(list(record), key) or 'none'}")
    return record[key]


def string_at(record: Any, key: str, where: str) -> str:
    """As `value_at`, but refuses what is no string."""
    value = value_at(record, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {kind_of(value)}, not a text")
    return value


def text_at(record: Any, key: str, where: str) -> str:
    """As `string_at`, under the rules for text of one line."""
    return checked(string_at(record, key, where), where)


def one_file(file: str | None) -> tuple[str, ...] | None:
    """The files of a split that is one file, or is not there."""
    return None if file is None else (file,)


def check_column(kind: str, option: str, column: int | str | None) -> None:
    """Refuse the number of a column that no file can have."""
    if isinstance(column, str | None):
        return
    if isinstance(column, bool) or not isinstance(column, int):
        raise DataError(f"{kind}: {option} is {column!r}; it must be a number or a name")
    if column < 0:
        raise DataError(f"{kind}: {option} is {column}, but columns are numbered from 0")


def check_width(fields: list[str], width: int, where: str, has_header: bool) -> None:
    """Refuse a row of another number of columns than the first row of its file.

    Args:
        fields: The row.
        width: Columns of the first row.
        where: File and line, to open the message with.
        has_header: Whether the first row is a header.

    Raises:
        DataError: They differ.
    """
    if len(fields) != width:
        first = "the header" if has_header else "the first row"
        raise DataError(f"{where} has {len(fields)} fields, but {first} has {width}")


def column_number(column: int | str, header: list[str] | None, file: str) -> int:
    """The number of a column that is given by number, or by its name in the header."""
    if isinstance(column, int):
        return column
    assert header is not None
    if column not in header:
        raise DataError(f"{file} has no column {column!r}; it has {listed(header, column)}")
    return header.index(column)


def kind_of(value: Any) -> str:
    """What a decoded JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")
