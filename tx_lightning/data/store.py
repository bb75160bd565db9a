"""Tokenized text on disk: flat memory-mapped arrays with offsets.

A corpus is tokenized once and lies under a key made of everything it depends on. Opening it reads
a few numbers; memory and start-up do not grow with the corpus, and processes share its pages.

A record has one row of ids for each side: source and target of a pair, a text and its label, the
words of a sentence and their tags. A stream of documents is the ids of one side, end to end.
"""

import hashlib
import json
from dataclasses import dataclass, field
from mmap import ACCESS_READ, MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tx_lightning.data.cache import CacheError
from tx_lightning.data.tokenizers import Tokenizers

Array = npt.NDArray[Any]

FORMAT = 2
SIDES = ("source", "target")
LARGE = 2**28  # bytes of a store that should not all stay in the memory of the process
_READS = 1024  # each touches some tens of KiB, since the system maps pages in groups
_PART = 2**20


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
        self._maps: list[mmap] = []
        self._reads = 0  # since pages were given back
        self._is_large = sum(meta["bytes"].values()) > LARGE
        self._ids = {side: self._map(f"{side}.ids", meta["dtype"]) for side in self.tokens}
        self._starts = {side: self._map(f"{side}.starts", "int64") for side in self.tokens}
        with_text = [side for side in self.tokens if (folder / f"{side}.text").exists()]
        self._text = {side: self._map(f"{side}.text", "uint8") for side in with_text}
        self._text_starts = {side: self._map(f"{side}.text_starts", "int64") for side in with_text}

    def _map(self, name: str, dtype: str) -> Array:
        if (self.folder / name).stat().st_size == 0:  # Nothing cannot be mapped.
            return np.empty(0, dtype=dtype)
        with (self.folder / name).open("rb") as file:
            self._maps.append(mmap(file.fileno(), 0, access=ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype=dtype)

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
        self._count(1)
        return self._ids[side][slice(*self._starts[side][i : i + 2])]

    def text(self, side: str, i: int) -> str:
        """The untouched text of record i on a side."""
        self._count(1)
        start, end = self._text_starts[side][i : i + 2]
        return self._text[side][start:end].tobytes().decode("utf-8")

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
        """The ids of all records of a side, end to end, as one array."""
        return self._ids[side]

    def slices(self, side: str) -> "Slices":
        """Parts of that array, read when they are asked for."""
        return Slices(self, side)

    def _count(self, reads: int) -> None:
        """Pages that were read stay in memory; of a large store, give them back now and then.

        They stay in the memory that the system lends to files, where they cost nobody anything.
        """
        self._reads += reads
        if self._reads >= _READS and self._is_large:
            self._reads = 0
            for mapped in self._maps:
                mapped.madvise(MADV_DONTNEED)


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
        starts = self.store._starts[self.side]
        lengths = (starts[1:][rows] - starts[:-1][rows]).astype(np.int32)
        self.store._count(len(lengths))
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
        return len(self.store._ids[self.side])

    def __getitem__(self, place: slice) -> Array:
        self.store._count(1)
        return self.store._ids[self.side][place]


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
