"""The files that offline runs of Weights & Biases write, one for each start of a run.

A `.wandb` file is a log of records in blocks of 32 KiB, as LevelDB's: a record lies in one piece or
in several, none of which crosses the end of a block.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAGIC = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 32768
_PIECE = struct.Struct("<IHB")  # checksum, length, kind: whole, first, middle or last piece
_WHOLE, _FIRST, _LAST = 1, 2, 4
_OWN = ("_step", "_runtime", "_timestamp", "trainer/global_step")


class UnknownFormat(ValueError):
    """A file is not a log of records as wandb has written them so far."""


def segments(folder: Path) -> list[Path]:
    """The files of the offline starts of a run, the oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file with the place at which each begins, up to where a kill tore it.

    Raises:
        UnknownFormat: The file is none of wandb's, or of a version with another format.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise UnknownFormat(f"{path} does not begin as a .wandb file")
    place, start, body = len(_MAGIC), len(_MAGIC), b""
    while place + _PIECE.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _PIECE.size:  # padding
            place += left
            continue
        _, length, kind = _PIECE.unpack_from(data, place)
        piece = data[place + _PIECE.size : place + _PIECE.size + length]
        if kind == 0 or len(piece) < length:
            return
        if kind in (_WHOLE, _FIRST):
            start, body = place, b""
        body += piece
        place += _PIECE.size + length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(body)
            except Exception as error:  # of a library that comes with wandb
                raise UnknownFormat(f"{path} holds what is no record at byte {start}") from error
            yield start, record


def history_row(record: Any) -> dict[str, Any]:
    """What a record of the history says; tables and pictures are dictionaries."""
    row: dict[str, Any] = {}
    for item in record.history.item:
        *outer, last = item.nested_key or [item.key]
        place = row
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return row


def keep_history(folder: Path, n_rows: int) -> list[dict[str, Any]]:
    """Cut the files of a run to its first rows of history, and return those that are there.

    A cut file is one of a run that was killed there. Less than `n_rows` come back where a kill was
    faster than the writing.

    Raises:
        UnknownFormat: A file is not understood; then none is changed.
    """
    kept: list[dict[str, Any]] = []
    cuts: list[tuple[Path, int]] = []
    for path in segments(folder):
        for start, record in records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            if len(kept) == n_rows:
                cuts.append((path, start))
                break
            kept.append(history_row(record))
    for path, size in reversed(cuts):  # if it is killed here, the next time cuts the rest
        os.truncate(path, size)
    return kept


def has_numbers(row: dict[str, Any]) -> bool:
    """Whether a row of history holds metrics, and not only tables and pictures."""
    return any(name not in _OWN and not isinstance(value, dict) for name, value in row.items())
