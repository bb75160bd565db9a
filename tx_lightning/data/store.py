"""Tokenized text on disk: flat memory-mapped arrays with offsets.

A corpus is tokenized once and lies under a key made of everything it depends on. Opening it reads
a few numbers; memory and start-up do not grow with the corpus, and processes share its pages.

A record has one row of ids for each side: source and target of a pair, a text and its label, the
words of a sentence and their tags. A stream of documents is the ids of one side, end to end.
"""

import hashlib
import json
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
