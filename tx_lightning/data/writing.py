"""Text into the files of a `Store`: encoded by threads, and gone on with where it was stopped."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tx_lightning.data.store import SIDES, Counts
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.strict_json import to_json

Texts = Sequence[str]
Rows = list[list[int]]

CHUNK = 8192  # records tokenized at a time
NOTE_EVERY = 5.0  # seconds between two notes of how far writing came
_KINDS = (".ids", ".starts", ".text", ".text_starts")  # of files, for each side
_NOTE, _NOTE_BEGUN = "progress.json", "progress.json.tmp"
_CHUNK_CHARACTERS = 1 << 24  # or fewer, where they are long
_THREADS = 2  # one encodes, on all cores, while the other turns what the tokenizer made to lists


@dataclass(frozen=True)
class PairFilter:
    """Which training pairs are kept; each dropped pair is counted under the first rule it breaks.

    Args:
        max_length: Tokens on one side, EOS not counted; longer pairs are dropped ("too_long").
        max_length_ratio: Tokens of the longer side over tokens of the shorter; a pair with an empty
            side is always dropped ("empty"), one above the ratio as "ratio". None: no limit.
    """

    max_length: int
    max_length_ratio: float | None = None

    def reason(self, source_length: int, target_length: int) -> str | None:
        """Why a pair of these lengths is dropped, or None when it is kept."""
        shorter, longer = sorted((source_length, target_length))
        if shorter == 0:
            return "empty"
        if longer > self.max_length:
            return "too_long"
        if self.max_length_ratio is not None and longer > self.max_length_ratio * shorter:
            return "ratio"
        return None


@dataclass
class Encoded:
    """The ids of some records.

    Args:
        sides: For each side a row of ids a record.
        reasons: Why a record is dropped, None where it is kept; empty: all are kept.
        cut: Records of which the end was left out.
    """

    sides: list[Rows]
    reasons: list[str | None] = field(default_factory=list)
    cut: int = 0


def write_pairs(
    folder: Path,
    pairs: Iterable[tuple[str, str]],
    tokenizers: Tokenizers,
    pair_filter: PairFilter | None,
) -> None:
    """Tokenize pairs into the files of a `PairStore`.

    Args:
        folder: A folder that is empty, or as an interrupted call left it.
        pairs: Raw source and target sentences.
        tokenizers: Tokenizers of the two sides.
        pair_filter: Which pairs to keep; None keeps all, as validation and test must.
    """

    def encode(source: Texts, target: Texts) -> Encoded:
        sides = [tokenizers.source.encode_batch(source), tokenizers.target.encode_batch(target)]
        if pair_filter is None:
            return Encoded(sides)
        pairs = zip(*sides, strict=True)
        return Encoded(sides, [pair_filter.reason(len(x), len(y)) for x, y in pairs])

    largest = max(tokenizers.source.vocab_size, tokenizers.target.vocab_size)
    counts = Counts(dropped={"empty": 0, "too_long": 0, "ratio": 0})
    write_records(folder, pairs, SIDES, encode, counts, largest=largest)


def write_records(
    folder: Path,
    records: Iterable[tuple[str, ...]],
    sides: Sequence[str],
    encode: Callable[..., Encoded],
    counts: Counts,
    *,
    largest: int,
    with_text: bool = True,
) -> None:
    """Encode records into the files of a `Store`; memory stays that of a few chunks.

    Threads encode, since tokenizers work outside of Python's lock, while this one reads and writes.
    An interrupted call leaves a note of how far it came; called again on the same folder with the
    same records, it goes on from there.

    Args:
        folder: A folder that is empty, or as an interrupted call left it.
        records: For each record a text a side, and then what else `encode` takes.
        sides: Names of the sides.
        encode: Called with the texts of some records, column by column, in any thread; what it
            makes of a record may not depend on the others.
        counts: The unit, and the reasons with 0 each; filled here.
        largest: All ids are below it.
        with_text: Keep the texts as well.
    """
    dtype = "uint16" if largest <= 2**16 else "uint32"
    progress = _Progress.left_in(folder)
    with ExitStack() as stack:
        writers = [_SideWriter(folder, side, dtype, stack, with_text) for side in sides]
        progress.restore(counts, writers)
        for columns, encoded in _encoded(islice(records, progress.done, None), encode):
            kept = _keep(encoded.reasons, len(columns[0]), counts)
            counts.cut += encoded.cut
            for texts, rows, writer in zip(
                columns[: len(writers)], encoded.sides, writers, strict=True
            ):
                writer.write([texts[i] for i in kept], [rows[i] for i in kept])
            progress.advance(len(columns[0]), counts, writers)
        _sync(writers)
    progress.file.unlink(missing_ok=True)
    meta = {
        **asdict(counts),
        "dtype": dtype,
        "tokens": {writer.side: writer.n_tokens for writer in writers},
        "text_bytes": {writer.side: writer.n_bytes for writer in writers},
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(to_json(meta, indent=1), encoding="utf-8")


def _encoded(
    records: Iterable[tuple[str, ...]], encode: Callable[..., Encoded]
) -> Iterator[tuple[list[Texts], Encoded]]:
    """The columns of each chunk of records with what `encode` made of them, in order."""
    with ThreadPoolExecutor(_THREADS) as threads:
        ahead: deque[tuple[list[Texts], Future[Encoded]]] = deque()
        for chunk in _chunks(records, CHUNK):
            columns: list[Texts] = list(zip(*chunk, strict=True))
            ahead.append((columns, threads.submit(encode, *columns)))
            if len(ahead) > _THREADS:
                columns, encoded = ahead.popleft()
                yield columns, encoded.result()
        for columns, encoded in ahead:
            yield columns, encoded.result()


def _keep(reasons: list[str | None], n_records: int, counts: Counts) -> list[int]:
    """Positions in a chunk that are kept; adds to `counts`."""
    kept = [i for i in range(n_records) if not reasons or reasons[i] is None]
    for reason in reasons:
        if reason is not None:
            counts.dropped[reason] = counts.dropped.get(reason, 0) + 1
    counts.kept += len(kept)
    return kept


class _SideWriter:
    """Appends one side of the records to its files."""

    def __init__(
        self, folder: Path, side: str, dtype: str, stack: ExitStack, with_text: bool
    ) -> None:
        self.side = side
        self.dtype = dtype
        self.n_tokens = 0
        self.n_bytes = 0

        def opened(kind: str) -> BinaryIO:
            return stack.enter_context((folder / f"{side}.{kind}").open("ab"))

        self.ids, self.starts = opened("ids"), opened("starts")
        self.text = (opened("text"), opened("text_starts")) if with_text else None
        self.files = [self.ids, self.starts, *(self.text or ())]
        for starts in (self.starts, *(self.text or ())[1:]):
            if starts.tell() == 0:
                starts.write(np.zeros(1, dtype=np.int64).tobytes())

    def write(self, texts: Sequence[str], rows: Rows) -> None:
        """Append the rows of a chunk."""
        lengths = [len(row) for row in rows]
        flat = np.fromiter(chain.from_iterable(rows), self.dtype, count=sum(lengths))
        self.ids.write(flat.tobytes())
        self.n_tokens = _write_ends(self.starts, self.n_tokens, lengths)
        sentences = [text.encode() for text in texts]
        if self.text is None:
            self.n_bytes += sum(map(len, sentences))
            return
        self.text[0].write(b"".join(sentences))
        self.n_bytes = _write_ends(self.text[1], self.n_bytes, [len(s) for s in sentences])


def _sync(writers: Sequence[_SideWriter]) -> None:
    """Wait until all that was written is on the disk."""
    for file in [file for writer in writers for file in writer.files]:
        file.flush()
        os.fsync(file.fileno())


class _Progress:
    """A note in the folder of how far writing came, which what is written may not fall behind.

    Args:
        file: The note.
        noted: Its content, if it was left by an interrupted call.

    Attributes:
        done: Records that are dealt with.
    """

    def __init__(self, file: Path, noted: dict[str, Any] | None) -> None:
        self.file = file
        self.done: int = 0 if noted is None else noted["done"]
        self._noted = noted
        self._last = time.monotonic()

    @classmethod
    def left_in(cls, folder: Path) -> "_Progress":
        """That of an interrupted call, its files cut to what it says; else the beginning."""
        file = folder / _NOTE
        noted = None
        with suppress(OSError, ValueError):
            noted = json.loads(file.read_text(encoding="utf-8"))
        sizes = {} if noted is None else noted["bytes"]
        if not all(_has(folder / name, size) for name, size in sizes.items()):
            noted, sizes = None, {}
        for path in folder.iterdir():
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            elif path.suffix in _KINDS or path.name == _NOTE_BEGUN:
                path.unlink()
        return cls(file, noted)

    def restore(self, counts: Counts, writers: Sequence[_SideWriter]) -> None:
        """Give counts and writers what stands in the note."""
        if self._noted is None:
            return
        counts.kept, counts.cut = self._noted["kept"], self._noted["cut"]
        counts.dropped = self._noted["dropped"]
        for writer in writers:
            writer.n_tokens = self._noted["tokens"][writer.side]
            writer.n_bytes = self._noted["text_bytes"][writer.side]
        print(f"going on after {self.done:,} {counts.unit} that were done", file=sys.stderr)

    def advance(self, records: int, counts: Counts, writers: Sequence[_SideWriter]) -> None:
        """Some records are written; now and then, note it."""
        self.done += records
        if time.monotonic() - self._last < NOTE_EVERY:
            return
        _sync(writers)
        noted = {
            "done": self.done,
            **asdict(counts),
            "tokens": {writer.side: writer.n_tokens for writer in writers},
            "text_bytes": {writer.side: writer.n_bytes for writer in writers},
            "bytes": {Path(f.name).name: f.tell() for writer in writers for f in writer.files},
        }
        written = self.file.with_name(_NOTE_BEGUN)
        written.write_text(to_json(noted), encoding="utf-8")
        written.replace(self.file)
        self._last = time.monotonic()


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size >= size


def _write_ends(file: BinaryIO, start: int, lengths: list[int]) -> int:
    file.write((start + np.cumsum(lengths, dtype=np.int64)).tobytes())
    return start + sum(lengths)


def _chunks(records: Iterable[tuple[str, ...]], size: int) -> Iterator[list[tuple[str, ...]]]:
    """Up to `size` records at a time, fewer where their texts are long."""
    chunk: list[tuple[str, ...]] = []
    characters = 0
    for record in records:
        chunk.append(record)
        characters += sum(map(len, record))
        if len(chunk) == size or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
