"""Where the texts of a language model come from: documents, one string each.

A document is as it stands in its file, with its line feeds; a carriage return, or one before a line
feed, is a line feed as well. Otherwise the rules of `text.py` hold. A document without a character
is left out.
"""

import codecs
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from fractions import Fraction
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tx_lightning.data.download import RemoteFiles
from tx_lightning.data.errors import DataError, listed
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.grammar import Grammar, Language
from tx_lightning.data.huggingface import HubRows
from tx_lightning.data.sources import FileSource, ParallelSource, Source, string_at
from tx_lightning.data.synchronous_grammar import Tree
from tx_lightning.data.text import checked_document, nul_byte, open_binary, read_lines

Document = Literal["file", "line", "paragraph"]
Side = Literal["source", "target", "both"]

_CHUNK = 2**20  # bytes of a file decoded at a time
_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Piece(NamedTuple):
    """A part of a document.

    Args:
        text: Its text; the pieces of a document, joined, are the document.
        last: Whether the document ends with it.
    """

    text: str
    last: bool


class TextSource(Source):
    """Documents in named splits."""

    @abstractmethod
    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split in order, each whole; they may contain line feeds.

        Raises:
            DataError: There is no such split, or a file of it cannot be read.
        """

    def pieces(self, split: str) -> Iterator[Piece]:
        """The same documents in parts that fit into memory, for documents that may not.

        A source of short documents yields each as one piece.

        Raises:
            DataError: As `texts`.
        """
        return (Piece(text, last=True) for text in self.texts(split))

    def optimum_log_loss(self, split: str) -> float | None:
        """The sum of -ln P(document) over a split, in nats, under the distribution it comes from.

        None where nobody knows that distribution. Checks the split, and may read it.
        """
        self.check_split(split)
        return None


class TextFiles(FileSource, TextSource):
    """Text files, plain or gzip, or folders of them.

    A file that is a document is read in pieces of about a million characters, so that `pieces`
    needs little memory whatever its size; `texts` needs that of two copies of the document.

    Args:
        train: A file or a folder, or a list of them, for the split `train`. Of a folder, all files
            below it are read, in the order of their paths; empty ones are left out.
        val: The same for `val`.
        test: The same for `test`.
        document: What is one document: a `file`, a `line`, or a `paragraph` (lines up to a blank
            one). Blank lines are no documents.
        pattern: Which files of a folder are read, by name.
        val_share: Without `val`: the share of the characters of `train`, at its end, that is the
            split `val` and no longer in `train`. The cut is made at a character when a document is
            a file, and otherwise before a document.
        test_share: Without `test`: the same for `test`, which comes after `val`.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        *,
        document: Document = "file",
        pattern: str = "*.txt",
        val_share: float | None = None,
        test_share: float | None = None,
    ) -> None:
        if document not in get_args(Document):
            raise DataError(
                f"TextFiles: document is {document!r}; there are "
                f"{listed(get_args(Document), document)}"
            )
        if not pattern:
            raise DataError("TextFiles: pattern is empty; give one such as '*.txt'")
        self.document = document
        self.pattern = pattern
        given = {"train": train, "val": val, "test": test}
        super().__init__(
            {split: _entries(split, names) for split, names in given.items()}, document
        )
        shares = {"val": val_share, "test": test_share}
        self.shares = {split: share for split, share in shares.items() if share is not None}
        self._check_shares()

    def splits(self) -> list[str]:
        return [s for s in ("train", "val", "test") if s in self.files or s in self.shares]

    def prepare(self) -> None:
        """Refuse missing and empty files of any split now, not when the first epoch is over."""
        for split in self.files:
            for path in self._paths(split):
                next(read_text(path))

    def texts(self, split: str) -> Iterator[str]:
        return _joined(self.pieces(split))

    def pieces(self, split: str) -> Iterator[Piece]:
        self.check_split(split)
        return self._section(split) if self._is_section(split) else self._documents(split)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        section = f"{split} of {self.shares}" if self._is_section(split) else ""
        files = "train" if section else split
        parts = [type(self).__name__, self._options, section, *map(file_sha256, self._paths(files))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _check_shares(self) -> None:
        for split, share in self.shares.items():
            if not 0 < share < 1:
                raise DataError(f"TextFiles: {split}_share is {share}; it must be between 0 and 1")
            if split in self.files:
                raise DataError(f"TextFiles: give {split} or {split}_share, not both")
            if "train" not in self.files:
                raise DataError(f"TextFiles: {split}_share is a share of train, which is not given")
        if sum(self.shares.values()) >= 1:
            raise DataError(
                f"TextFiles: val_share and test_share are {self.shares['val']} and "
                f"{self.shares['test']}; together they must leave something to train on"
            )

    def _is_section(self, split: str) -> bool:
        """Whether a split is a part of the files of `train`."""
        return split in self.shares or (split == "train" and bool(self.shares))

    def _section(self, split: str) -> Iterator[Piece]:
        """The documents of a split that is a part of the files of `train`."""
        total = sum(len(text) for text, _ in self._documents("train"))
        begin, end = self._bounds(split, total)
        start, nothing = 0, True
        for text, last in self._documents("train"):
            if start >= end:
                break
            stop = start + len(text)
            if self.document == "file":
                text = text[max(begin - start, 0) : end - start]
                last = last or stop >= end
            elif start < begin:
                text = ""
            if text:
                nothing = False
                yield Piece(text, last)
            start = stop
        if nothing:
            shares = " and ".join(f"{name}_share {share}" for name, share in self.shares.items())
            raise DataError(
                f"TextFiles: nothing is left for {split!r}: the {total:,} characters of train are "
                f"too few documents to be cut by {shares}; take other shares, or document: file"
            )

    def _bounds(self, split: str, total: int) -> tuple[int, int]:
        """The first character of a split, and the first after it, of all those of `train`."""
        # Exact: in floating point 1 - 0.8 is less than 0.2.
        share = {name: Fraction(str(value)) for name, value in self.shares.items()}
        val = int(total * (1 - sum(share.values())))
        test = int(total * (1 - share.get("test", 0)))
        return {"train": (0, val), "val": (val, test), "test": (test, total)}[split]

    def _documents(self, split: str) -> Iterator[Piece]:
        """The documents in the files of a split."""
        if self.document == "file":
            for path in self._paths(split):
                yield from _marked(read_text(path))
            return
        read = read_lines if self.document == "line" else _paragraphs
        blank = True
        for path in self._paths(split):
            for text in read(path):
                if text and not text.isspace():
                    blank = False
                    yield Piece(text, last=True)
        if blank:
            raise DataError(f"TextFiles: the files of {split!r} have only blank lines")

    def _paths(self, split: str) -> list[Path]:
        """The files of a split, those of its folders included."""
        paths: list[Path] = []
        for name in self.files[split]:
            path = Path(name).expanduser()
            paths += self._below(path) if path.is_dir() else [path]
        return paths

    def _below(self, folder: Path) -> list[Path]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        matching = [path for path in files if path.match(self.pattern)]
        if not matching:
            names = [path.relative_to(folder).as_posix() for path in files]
            there = f"there are {listed(names, self.pattern)}" if names else "there is no file"
            raise DataError(f"no file below {folder} matches the pattern {self.pattern!r}; {there}")
        filled = [path for path in matching if path.stat().st_size > 0]
        if not filled:
            raise DataError(f"all files below {folder} that match {self.pattern!r} are empty")
        return filled


class TinyShakespeare(TextSource):
    """Scenes from Shakespeare: 1,003,854 characters in `train`, the next 111,540 in `val`.

    Each split is one document; the cut is the one of nanoGPT. The file is looked for in
    `$TX_LIGHTNING_DATA/tinyshakespeare/`, in the cache folder, on the network.

    Args:
        url: Where the folder data/tinyshakespeare of github.com/karpathy/char-rnn is served; name a
            mirror if the original cannot be reached.
    """

    def __init__(
        self,
        url: str = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
    ) -> None:
        self._files = RemoteFiles("tinyshakespeare", url, {"input.txt": _SHAKESPEARE})

    def splits(self) -> list[str]:
        return ["train", "val"]

    def prepare(self) -> None:
        self._files.fetch(["input.txt"])

    def texts(self, split: str) -> Iterator[str]:
        self.check_split(split)
        text = "".join(read_text(self._files.local("input.txt")))
        cut = int(len(text) * 0.9)
        return iter([text[:cut] if split == "train" else text[cut:]])

    def fingerprint(self, split: str) -> str:
        """Made of the published checksum: reads nothing, as `prepare` has verified the file."""
        self.check_split(split)
        return hashlib.sha256(f"{_SHAKESPEARE} {split}".encode()).hexdigest()


class GrammarText(TextSource):
    """Sentences of the embedded language, one a document: those of `Grammar` with this seed.

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

    def splits(self) -> list[str]:
        return self.grammar.splits()

    def texts(self, split: str) -> Iterator[str]:
        return (sentence for sentence, _ in self.grammar.pairs(split))

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"texts {self.grammar.fingerprint(split)}".encode()).hexdigest()

    def optimum_log_loss(self, split: str) -> float:
        """The sum of -ln P(sentence) over a split, in nats; see `Grammar.optimum_log_loss`."""
        if self.language == "en":
            return self.grammar.optimum_log_loss(split)
        return -sum(_german_log_prob(example.tree) for example in self.grammar.examples(split))


class SideOf(TextSource):
    """The sentences of a source of pairs, one a document; empty ones are left out.

    Args:
        source: Where the pairs come from.
        side: Which sentences: those of the `source` side, those of the `target` side, or `both`:
            each source sentence and then its translation.
    """

    def __init__(self, source: ParallelSource, side: Side = "source") -> None:
        if side not in get_args(Side):
            raise DataError(f"SideOf: side is {side!r}; there are {listed(get_args(Side), side)}")
        self.source = source
        self.side = side

    def splits(self) -> list[str]:
        return self.source.splits()

    def prepare(self) -> None:
        self.source.prepare()

    def texts(self, split: str) -> Iterator[str]:
        sides = {"source": slice(0, 1), "target": slice(1, 2), "both": slice(0, 2)}[self.side]
        pairs = self.source.pairs(split)
        return (text for pair in pairs for text in pair[sides] if text)

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"{self.side} {self.source.fingerprint(split)}".encode()).hexdigest()


class HuggingFaceTexts(TextSource):
    """A dataset of the Hugging Face hub, or a local folder that `datasets` can load.

    Needs the optional package `datasets`. A row is a document; empty ones are left out.

    Args:
        name: Name of the dataset, such as `roneneldan/TinyStories`, or a folder.
        key: Column of the text. Dots reach into nested columns: `translation.en`.
        config: Configuration of the dataset, such as `wikitext-103-raw-v1`.
        revision: Commit or tag of the dataset's repository; without it the newest is taken.
        train: What the dataset calls its training split; null if it has none.
        val: What it calls its validation split.
        test: What it calls its test split.
    """

    def __init__(
        self,
        name: str,
        key: str = "text",
        *,
        config: str | None = None,
        revision: str | None = None,
        train: str | None = "train",
        val: str | None = "validation",
        test: str | None = "test",
    ) -> None:
        self.key = key
        self._rows = HubRows(
            "HuggingFaceTexts",
            name,
            config=config,
            revision=revision,
            train=train,
            val=val,
            test=test,
        )

    def splits(self) -> list[str]:
        return self._rows.splits()

    def prepare(self) -> None:
        self._rows.prepare()

    def texts(self, split: str) -> Iterator[str]:
        self.check_split(split)
        return self._read(split)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return self._rows.fingerprint(split, "texts", self.key)

    def _read(self, split: str) -> Iterator[str]:
        for where, row in self._rows.rows(split):
            text = string_at(row, self.key, where)
            if text := checked_document(text, where):
                yield text


def read_text(path: str | Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about a million characters; joined, they are the text.

    A new piece begins before a blank or a line feed where the text has any.

    Raises:
        DataError: The file is missing, empty, cut, or not text; says the line.
    """
    decoder = IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    with open_binary(path) as file:
        chunk = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
        if not chunk:
            raise DataError(f"{path} is empty: it has no text")
        rest, line = "", 1
        while chunk:
            following = file.read(_CHUNK)
            try:
                text = rest + decoder.decode(chunk, final=not following)
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(error, path, line)) from None
            if (place := chunk.find(b"\0")) >= 0:
                line += chunk.count(b"\n", 0, place)
                raise DataError(nul_byte(f"{path}, line {line}"))
            cut = _place_to_cut(text) if following else len(text)
            if cut > 0:
                yield text[:cut]
            rest, line, chunk = text[cut:], line + chunk.count(b"\n"), following


def _german_log_prob(tree: Tree) -> float:
    """ln P(german): the probability of its only tree, shared among the German word orders of it."""
    return math.log(tree.probability()) - math.log(_spellings(tree, {"german"}))


def _spellings(tree: Tree, fields: set[str]) -> int:
    """In how many ways the free variants of a tree let it be spelled in these fields."""
    used: dict[int, set[str]] = {}
    for field in fields:
        templates = tree.production.fields[field]
        for child, name in templates[tree.variant if len(templates) > 1 else 0].slots:
            used.setdefault(child, set()).add(name)
    own = max(len(tree.production.fields[field]) for field in fields)
    return own * math.prod(_spellings(tree.children[child], names) for child, names in used.items())


def _entries(split: str, names: str | list[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not names:
        raise DataError(f"TextFiles: {split} is empty; name a file or a folder")
    return (names,) if isinstance(names, str) else tuple(names)


def _marked(texts: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document, the last one marked."""
    previous: str | None = None
    for text in texts:
        if previous is not None:
            yield Piece(previous, last=False)
        previous = text
    if previous is not None:
        yield Piece(previous, last=True)


def _joined(pieces: Iterable[Piece]) -> Iterator[str]:
    """The documents that the pieces are of."""
    parts: list[str] = []
    for text, last in pieces:
        parts.append(text)
        if last:
            document = "".join(parts)
            parts.clear()
            yield document


def _paragraphs(path: str | Path) -> Iterator[str]:
    """The lines up to each blank one, put together again."""
    lines: list[str] = []
    for line in read_lines(path):
        if line and not line.isspace():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _place_to_cut(text: str) -> int:
    """Where the last run of blanks begins; the end of a text that has none."""
    last = max(text.rfind(" "), text.rfind("\n"))
    return len(text[: last + 1].rstrip()) or len(text)


def _not_utf8(error: UnicodeDecodeError, path: str | Path, line: int) -> str:
    """What is wrong with a file whose bytes after `line` are not UTF-8."""
    line += error.object.count(b"\n", 0, error.start)
    utf16 = line == 1 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    guess = "UTF-16" if utf16 else "LATIN1"
    return (
        f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8; if the "
        f"file is {guess}, convert it with: iconv -f {guess} -t UTF-8"
    )
