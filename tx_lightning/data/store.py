"""Tokenized sentence pairs on disk: flat memory-mapped arrays with offsets.

A corpus is tokenized once and lies under a key made of everything it depends on. Opening it reads
a few numbers; memory and start-up do not grow with the corpus, and processes share its pages.
A folder in the cache is complete or absent: it is written beside its place and then renamed.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import Tokenizers

Array = npt.NDArray[Any]
Item = TypeVar("Item")

FORMAT = 1
SIDES = ("source", "target")
CHUNK = 8192  # pairs tokenized at a time


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
class PairCounts:
    """What became of the pairs of a split.

    Args:
        kept: Pairs in the store.
        dropped: Pairs left out, by reason.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "too_long": 0, "ratio": 0})

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n)
        return f"{self.kept:,} pairs kept, {dropped:,} dropped" + (f" ({reasons})" * bool(reasons))


class PairStore:
    """The sentence pairs of one split, opened from a folder that `write_pairs` filled.

    Cheap to pickle: only the folder's name travels.

    Args:
        folder: A complete folder of the cache.

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
        except (OSError, ValueError, KeyError) as error:
            raise CacheError.damaged(folder, error) from error
        self.counts = PairCounts(kept=meta["kept"], dropped=meta["dropped"])
        self.tokens: dict[str, int] = meta["tokens"]
        self._ids = {side: _map(folder / f"{side}.ids", meta["dtype"]) for side in SIDES}
        self._starts = {side: _map(folder / f"{side}.starts", "int64") for side in SIDES}
        self._text = {side: _map(folder / f"{side}.text", "uint8") for side in SIDES}
        self._text_starts = {side: _map(folder / f"{side}.text_starts", "int64") for side in SIDES}

    def __reduce__(self) -> tuple[type["PairStore"], tuple[Path]]:
        return PairStore, (self.folder,)

    def __len__(self) -> int:
        return self.counts.kept

    def source(self, i: int) -> Array:
        """Source token ids of pair i, without EOS."""
        return self._ids["source"][slice(*self._starts["source"][i : i + 2])]

    def target(self, i: int) -> Array:
        """Target token ids of pair i, without BOS and EOS."""
        return self._ids["target"][slice(*self._starts["target"][i : i + 2])]

    def source_text(self, i: int) -> str:
        """The untouched source sentence of pair i."""
        return self._sentence("source", i)

    def target_text(self, i: int) -> str:
        """The untouched target sentence of pair i: the reference of all scores."""
        return self._sentence("target", i)

    @property
    def source_lengths(self) -> npt.NDArray[np.int32]:
        """Source tokens of each pair, without EOS."""
        return np.diff(self._starts["source"]).astype(np.int32)

    @property
    def target_lengths(self) -> npt.NDArray[np.int32]:
        """Target tokens of each pair, without BOS and EOS."""
        return np.diff(self._starts["target"]).astype(np.int32)

    def _sentence(self, side: str, i: int) -> str:
        start, end = self._text_starts[side][i : i + 2]
        return self._text[side][start:end].tobytes().decode("utf-8")


def _map(path: Path, dtype: str) -> Array:
    if path.stat().st_size == 0:  # Nothing cannot be mapped.
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def store_key(fingerprint: str, tokenizers: Tokenizers, pair_filter: PairFilter | None) -> str:
    """Name of the folder of a split: a hash of all that its content depends on."""
    return digest(
        {
            "format": FORMAT,
            "pairs": fingerprint,
            "tokenizers": [tokenizers.source.sha256, tokenizers.target.sha256],
            "filter": None if pair_filter is None else asdict(pair_filter),
        }
    )


def digest(settings: dict[str, Any]) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def write_pairs(
    folder: Path,
    pairs: Iterable[tuple[str, str]],
    tokenizers: Tokenizers,
    pair_filter: PairFilter | None,
) -> None:
    """Tokenize pairs into the files of a `PairStore`; memory stays that of one chunk.

    Args:
        folder: An existing, empty folder.
        pairs: Raw source and target sentences.
        tokenizers: Tokenizers of the two sides.
        pair_filter: Which pairs to keep; None keeps all, as validation and test must.
    """
    largest = max(tokenizers.source.vocab_size, tokenizers.target.vocab_size)
    dtype = "uint16" if largest <= 2**16 else "uint32"
    counts = PairCounts()
    with ExitStack() as stack:
        writers = {side: _SideWriter(folder, side, dtype, stack) for side in SIDES}
        for chunk in _chunks(pairs, CHUNK):
            sides = list(zip(*chunk, strict=True))
            ids = [
                tokenizers.source.encode_batch(sides[0]),
                tokenizers.target.encode_batch(sides[1]),
            ]
            kept = _keep(ids[0], ids[1], pair_filter, counts)
            for texts, rows, writer in zip(sides, ids, writers.values(), strict=True):
                writer.write([texts[i] for i in kept], [rows[i] for i in kept])
        for file in [file for writer in writers.values() for file in writer.files]:
            file.flush()
            os.fsync(file.fileno())
    meta = {
        **asdict(counts),
        "dtype": dtype,
        "tokens": {side: writer.n_tokens for side, writer in writers.items()},
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _keep(
    source: list[list[int]],
    target: list[list[int]],
    pair_filter: PairFilter | None,
    counts: PairCounts,
) -> list[int]:
    """Positions in a chunk that pass the filter; adds to `counts`."""
    kept = []
    for i, (x, y) in enumerate(zip(source, target, strict=True)):
        reason = None if pair_filter is None else pair_filter.reason(len(x), len(y))
        if reason is None:
            kept.append(i)
        else:
            counts.dropped[reason] += 1
    counts.kept += len(kept)
    return kept


class _SideWriter:
    """Appends one side of the pairs to its four files."""

    def __init__(self, folder: Path, side: str, dtype: str, stack: ExitStack) -> None:
        self.dtype = dtype
        self.n_tokens = 0
        self.n_bytes = 0

        def create(kind: str) -> BinaryIO:
            return stack.enter_context((folder / f"{side}.{kind}").open("wb"))

        self.ids, self.text = create("ids"), create("text")
        self.starts, self.text_starts = create("starts"), create("text_starts")
        self.files = [self.ids, self.starts, self.text, self.text_starts]
        for file in (self.starts, self.text_starts):
            file.write(np.zeros(1, dtype=np.int64).tobytes())

    def write(self, texts: list[str], rows: list[list[int]]) -> None:
        """Append the sentences of a chunk."""
        flat = [i for row in rows for i in row]
        self.ids.write(np.array(flat, dtype=self.dtype).tobytes())
        self.n_tokens = _write_ends(self.starts, self.n_tokens, [len(row) for row in rows])
        sentences = [text.encode() for text in texts]
        self.text.write(b"".join(sentences))
        self.n_bytes = _write_ends(self.text_starts, self.n_bytes, [len(s) for s in sentences])


def _write_ends(file: BinaryIO, start: int, lengths: list[int]) -> int:
    file.write((start + np.cumsum(lengths, dtype=np.int64)).tobytes())
    return start + sum(lengths)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
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
    """

    def __init__(self, action: str, every: float = 10.0) -> None:
        self.action = action
        self.every = every

    def __call__(self, pairs: Iterable[Item]) -> Iterator[Item]:
        """Hand the pairs through."""
        start = told = time.monotonic()
        for n, pair in enumerate(pairs, 1):
            yield pair
            if n % 1024 == 0 and (now := time.monotonic()) - told >= self.every:
                told, rate = now, n / (now - start)
                print(f"{self.action}: {n:,} pairs, {rate:,.0f} a second", file=sys.stderr)
