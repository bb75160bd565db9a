"""Tokenized text on disk: flat arrays with offsets, read where they are needed.

A corpus is tokenized once and lies under a key made of everything it depends on. Opening it reads
a few numbers; memory and start-up do not grow with the corpus, and processes share its pages.

A record has one row of ids for each side: source and target of a pair, a text and its label, the
words of a sentence and their tags. A stream of documents is the ids of one side, end to end.
"""

import hashlib
import json
import os
import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tx_lightning.data.cache import CacheError
from tx_lightning.data.tokenizers import Tokenizers

Array = npt.NDArray[Any]

FORMAT = 2
SIDES = ("source", "target")
_PART = 2**20  # rows whose lengths are read at a time
_BOUNDS = struct.Struct("=qq")


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
        self._dtype = np.dtype(meta["dtype"])
        self._ids = {side: _File(folder / f"{side}.ids") for side in self.tokens}
        self._starts = {side: _File(folder / f"{side}.starts") for side in self.tokens}
        with_text = [side for side in self.tokens if (folder / f"{side}.text").exists()]
        self._text = {side: _File(folder / f"{side}.text") for side in with_text}
        self._text_starts = {side: _File(folder / f"{side}.text_starts") for side in with_text}

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
        return self._slice(side, *self._starts[side].bounds(i))

    def _slice(self, side: str, start: int, end: int) -> Array:
        width = self._dtype.itemsize
        found = self._ids[side].read(start * width, (end - start) * width)
        return np.frombuffer(found, dtype=self._dtype)

    def text(self, side: str, i: int) -> str:
        """The untouched text of record i on a side."""
        start, end = self._text_starts[side].bounds(i)
        return self._text[side].read(start, end - start).decode("utf-8")

    def lengths(self, side: str) -> npt.NDArray[np.int32]:
        """The number of ids of each record on a side."""
        return self.row_lengths(side)[:]

    def row_lengths(self, side: str, extra: int = 0) -> "StoredLengths":
        """The same, read when it is asked for.

        Args:
            side: The side.
            extra: Is added to each.
        """
        return StoredLengths(self, side, extra)

    def stream(self, side: str) -> Array:
        """The ids of all records of a side, end to end, in memory."""
        return self._slice(side, 0, self.tokens[side])

    def slices(self, side: str) -> "Slices":
        """Parts of that array, read when they are asked for."""
        return Slices(self, side)


class _File:
    """A file that is read in parts, which leave nothing in the memory of the process.

    The system keeps the parts in the memory that it lends to files, for all processes. A mapped
    file would be simpler, but all of it that was ever read counts as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, start)

    def bounds(self, i: int) -> tuple[int, int]:
        """Where row i starts and ends, in a file of starts."""
        start, end = _BOUNDS.unpack(self.read(8 * i, 16))
        return start, end

    def lengths(self, rows: slice | Array) -> npt.NDArray[np.int32]:
        """The lengths of many rows, in a file of starts."""
        starts = np.memmap(self.path, dtype="int64", mode="r")
        return np.asarray(starts[1:][rows] - starts[:-1][rows], dtype=np.int32)


class StoredLengths:
    """The number of ids of each record on a side, read from the files when it is asked for.

    Args:
        store: The records.
        side: The side.
        extra: Is added to each.
    """

    def __init__(self, store: Store, side: str, extra: int) -> None:
        self.store = store
        self.side = side
        self.extra = extra

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: slice | Array) -> npt.NDArray[np.int32]:
        lengths = self.store._starts[self.side].lengths(rows)
        lengths += self.extra
        return lengths

    def max(self) -> int:
        """The largest; 0 where there are none."""
        parts = range(0, len(self), _PART)
        return max((int(self[start : start + _PART].max()) for start in parts), default=0)


class Slices:
    """Parts of the ids of all records of a side, end to end, read when they are asked for.

    Args:
        store: The records.
        side: The side.
    """

    def __init__(self, store: Store, side: str) -> None:
        self.store = store
        self.side = side

    def __len__(self) -> int:
        return self.store.tokens[self.side]

    def __getitem__(self, place: slice) -> Array:
        start, end, _ = place.indices(len(self))
        return self.store._slice(self.side, start, end)


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
