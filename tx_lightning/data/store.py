"""Tokenized text on disk: flat memory-mapped arrays with offsets.

A corpus is tokenized once and lies under a key made of everything it depends on. Opening it reads
a few numbers; memory and start-up do not grow with the corpus, and processes share its pages.
A folder in the cache is complete or absent: it is written beside its place and then renamed.

A record has one row of ids for each side: source and target of a pair, a text and its label, the
words of a sentence and their tags. A stream of documents is the ids of one side, end to end.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import Tokenizers

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Texts = Sequence[str]
Rows = list[list[int]]

FORMAT = 2
SIDES = ("source", "target")
CHUNK = 8192  # records tokenized at a time
_CHUNK_CHARACTERS = 1 << 24  # or fewer, where they are long


class CacheError(DataError):
    """The cache folder cannot be used: no space left, not writable, or damaged."""

    @classmethod
    def damaged(cls, folder: Path, error: Exception) -> "CacheError":
        """The error of a folder whose files are not what was written."""
        return cls(f"cache_dir: {folder} is damaged ({error}); delete that folder and start again")


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
class Counts:
    """What became of the records of a split.

    Args:
        kept: Records in the store.
        dropped: Records left out, by reason.
        cut: Records of which the end was left out.
        unit: What a record is called.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    unit: str = "pairs"

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n)
        told = f"{self.kept:,} {self.unit} kept, {dropped:,} dropped"
        told += f" ({reasons})" * bool(reasons)
        return told + f", {self.cut:,} cut" * bool(self.cut)


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


class Store:
    """The records of one split, opened from a folder that `write_records` filled.

    Cheap to pickle: only the folder's name travels.

    Args:
        folder: A complete folder of the cache.

    Attributes:
        counts: What became of the records of the split.
        tokens: Ids of each side.
        bytes: Bytes of the text of each side, in UTF-8.

    Raises:
        CacheError: The folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for name, size in meta["bytes"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} does not have {size} bytes")
            self.counts = Counts(meta["kept"], meta["dropped"], meta["cut"], meta["unit"])
            self.tokens: dict[str, int] = meta["tokens"]
            self.bytes: dict[str, int] = meta["text_bytes"]
        except (OSError, ValueError, KeyError) as error:
            raise CacheError.damaged(folder, error) from error
        self._ids = {side: _map(folder / f"{side}.ids", meta["dtype"]) for side in self.tokens}
        self._starts = {side: _map(folder / f"{side}.starts", "int64") for side in self.tokens}
        with_text = [side for side in self.tokens if (folder / f"{side}.text").exists()]
        self._text = {side: _map(folder / f"{side}.text", "uint8") for side in with_text}
        self._text_starts = {
            side: _map(folder / f"{side}.text_starts", "int64") for side in with_text
        }

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return self.counts.kept

    @property
    def sides(self) -> list[str]:
        """The names of the sides."""
        return list(self.tokens)

    def ids(self, side: str, i: int) -> Array:
        """The ids of record i on a side."""
        return self._ids[side][slice(*self._starts[side][i : i + 2])]

    def text(self, side: str, i: int) -> str:
        """The untouched text of record i on a side."""
        start, end = self._text_starts[side][i : i + 2]
        return self._text[side][start:end].tobytes().decode("utf-8")

    def lengths(self, side: str) -> npt.NDArray[np.int32]:
        """The number of ids of each record on a side."""
        return np.diff(self._starts[side]).astype(np.int32)

    def stream(self, side: str) -> Array:
        """The ids of all records of a side, end to end."""
        return self._ids[side]


class PairStore(Store):
    """The sentence pairs of one split."""

    def source(self, i: int) -> Array:
        """Source token ids of pair i, without EOS."""
        return self.ids("source", i)

    def target(self, i: int) -> Array:
        """Target token ids of pair i, without BOS and EOS."""
        return self.ids("target", i)

    def source_text(self, i: int) -> str:
        """The untouched source sentence of pair i."""
        return self.text("source", i)

    def target_text(self, i: int) -> str:
        """The untouched target sentence of pair i: the reference of all scores."""
        return self.text("target", i)

    @property
    def source_lengths(self) -> npt.NDArray[np.int32]:
        """Source tokens of each pair, without EOS."""
        return self.lengths("source")

    @property
    def target_lengths(self) -> npt.NDArray[np.int32]:
        """Target tokens of each pair, without BOS and EOS."""
        return self.lengths("target")


def _map(path: Path, dtype: str) -> Array:
    if path.stat().st_size == 0:  # Nothing cannot be mapped.
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def digest(settings: dict[str, Any]) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def store_key(fingerprint: str, tokenizers: Tokenizers, settings: dict[str, Any] | None) -> str:
    """Name of the folder of a split: a hash of all that its content depends on.

    Args:
        fingerprint: Of the split.
        tokenizers: What its text is encoded with.
        settings: Plain values: what is dropped or cut, and whatever else decides the ids.
    """
    return digest(
        {
            "format": FORMAT,
            "pairs": fingerprint,
            "tokenizers": [tokenizers.source.sha256, tokenizers.target.sha256],
            "filter": settings,
        }
    )


def write_pairs(
    folder: Path,
    pairs: Iterable[tuple[str, str]],
    tokenizers: Tokenizers,
    pair_filter: PairFilter | None,
) -> None:
    """Tokenize pairs into the files of a `PairStore`.

    Args:
        folder: An existing, empty folder.
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
    """Encode records into the files of a `Store`; memory stays that of one chunk.

    Args:
        folder: An existing, empty folder.
        records: For each record a text a side.
        sides: Names of the sides.
        encode: Called with the texts of some records, side by side.
        counts: The unit, and the reasons with 0 each; filled here.
        largest: All ids are below it.
        with_text: Keep the texts as well.
    """
    dtype = "uint16" if largest <= 2**16 else "uint32"
    with ExitStack() as stack:
        writers = [_SideWriter(folder, side, dtype, stack, with_text) for side in sides]
        for chunk in _chunks(records, CHUNK):
            columns = list(zip(*chunk, strict=True))
            encoded = encode(*columns)
            kept = _keep(encoded.reasons, len(chunk), counts)
            counts.cut += encoded.cut
            for texts, rows, writer in zip(columns, encoded.sides, writers, strict=True):
                writer.write([texts[i] for i in kept], [rows[i] for i in kept])
        for file in [file for writer in writers for file in writer.files]:
            file.flush()
            os.fsync(file.fileno())
    meta = {
        **asdict(counts),
        "dtype": dtype,
        "tokens": {side: writer.n_tokens for side, writer in zip(sides, writers, strict=True)},
        "text_bytes": {side: writer.n_bytes for side, writer in zip(sides, writers, strict=True)},
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


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
        self.dtype = dtype
        self.n_tokens = 0
        self.n_bytes = 0

        def create(kind: str) -> BinaryIO:
            return stack.enter_context((folder / f"{side}.{kind}").open("wb"))

        self.ids, self.starts = create("ids"), create("starts")
        self.files = [self.ids, self.starts]
        self.starts.write(np.zeros(1, dtype=np.int64).tobytes())
        self.text: tuple[BinaryIO, BinaryIO] | None = None
        if with_text:
            self.text = create("text"), create("text_starts")
            self.files += self.text
            self.text[1].write(np.zeros(1, dtype=np.int64).tobytes())

    def write(self, texts: Sequence[str], rows: Rows) -> None:
        """Append the rows of a chunk."""
        flat = [i for row in rows for i in row]
        self.ids.write(np.array(flat, dtype=self.dtype).tobytes())
        self.n_tokens = _write_ends(self.starts, self.n_tokens, [len(row) for row in rows])
        sentences = [text.encode() for text in texts]
        if self.text is None:
            self.n_bytes += sum(map(len, sentences))
            return
        self.text[0].write(b"".join(sentences))
        self.n_bytes = _write_ends(self.text[1], self.n_bytes, [len(s) for s in sentences])


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


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make sure that a folder of the cache exists, complete; build it when it does not.

    `build` fills a temporary folder beside it, which is then renamed. Of several processes on one
    machine one builds and the others wait; where files cannot be locked all of them build and the
    first to finish wins. What a killed process left behind is removed by the next one.

    Args:
        folder: The folder to have.
        build: Fills the (empty) folder it is given.

    Raises:
        CacheError: No space is left, or the cache cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as alone:
            if folder.exists():
                return
            if alone:
                for left_over in folder.parent.glob(f"{folder.name}.tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            _build(folder, build)
    except OSError as error:
        raise _explained(error, folder.parent) from error


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # Otherwise another process was first, with the same content.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; False where the file system has no locks."""
    with folder.with_name(f"{folder.name}.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that is writing {folder} ...", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _explained(error: OSError, cache: Path) -> Exception:
    """An error of the cache folder, told in one line; any other error unchanged."""
    advice = "free some space or set cache_dir (or $TX_LIGHTNING_CACHE) to a folder elsewhere"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"cache_dir: no space left while writing to {cache}; nothing half-written was kept: "
            f"{advice}"
        )
    where = Path(str(error.filename))
    if where.is_relative_to(cache) or cache.is_relative_to(where):
        return CacheError(f"cache_dir: {cache} cannot be written ({error.strerror}); {advice}")
    return error


class Progress:
    """Tells now and then how far a long pass over a corpus has come; silent when it is short.

    Args:
        action: What is being done, e.g. "tokenizing train".
        every: Seconds between two lines, and before the first.
        unit: What is counted.
    """

    def __init__(self, action: str, every: float = 10.0, unit: str = "pairs") -> None:
        self.action = action
        self.every = every
        self.unit = unit

    def __call__(self, records: Iterable[Item]) -> Iterator[Item]:
        """Hand the records through."""
        start = told = time.monotonic()
        for n, record in enumerate(records, 1):
            yield record
            if n % 1024 == 0 and (now := time.monotonic()) - told >= self.every:
                told, rate = now, n / (now - start)
                print(f"{self.action}: {n:,} {self.unit}, {rate:,.0f} a second", file=sys.stderr)
