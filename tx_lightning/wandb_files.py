"""The files that offline runs of Weights & Biases write, one for each start of a run.

A `.wandb` file is a log of records in blocks of 32 KiB, as LevelDB's: a record lies in one piece or
in several, none of which crosses the end of a block.
"""

import contextlib
import glob
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAGIC = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 32768
_PIECE = struct.Struct("<IHB")  # checksum, length, kind: whole, first, middle or last piece
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_STEP = "trainer/global_step"
_OWN = ("_step", "_runtime", "_timestamp", _STEP)


class UnknownFormat(ValueError):
    """A file is not a log of records as wandb has written them so far."""


def segments(folder: Path, run_id: str | None = None, *, online: bool = False) -> list[Path]:
    """The files of the offline starts of a run, the oldest first.

    Args:
        folder: The folder that contains wandb/.
        run_id: The id of the run; None: of any run.
        online: Whether to include the files that online starts keep.
    """
    kind = "*run-*" if online else "offline-run-*"
    name = "run-*.wandb" if run_id is None else f"run-{glob.escape(run_id)}.wandb"
    found = folder.glob(f"wandb/{kind}/{name}")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file with the place at which each begins, up to where a kill tore it.

    Raises:
        UnknownFormat: The file is none of wandb's, or of a version with another format.
    """
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise UnknownFormat(f"{path} does not begin as a .wandb file")
    for start, body in _bodies(path, data, len(_MAGIC)):
        yield start, _record(path, start, body)


def _bodies(path: Path, data: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """The encoded records in data that begin with a block, with the place of each."""
    start, body, begun = place, b"", False
    while place + _PIECE.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _PIECE.size:  # padding
            place += left
            continue
        _, length, kind = _PIECE.unpack_from(data, place)
        piece = data[place + _PIECE.size : place + _PIECE.size + length]
        if kind == 0 and not any(data[place:]):  # as a power failure leaves it
            return
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or length > left - _PIECE.size:
            raise UnknownFormat(f"{path} is damaged at byte {place}")
        if len(piece) < length:
            return
        if kind in (_WHOLE, _FIRST):
            start, body, begun = place, b"", True
        body += piece
        place += _PIECE.size + length
        if begun and kind in (_WHOLE, _LAST):
            yield start, body
            begun = False


def _record(path: Path, start: int, body: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    try:
        record.ParseFromString(body)
    except Exception as error:  # of a library that comes with wandb
        raise UnknownFormat(f"{path} is damaged at byte {start}") from error
    return record


def is_complete(path: Path) -> bool:
    """Whether the end of the run is in a file; only the last two blocks are read."""
    with path.open("rb") as file:
        first = max(0, path.stat().st_size // _BLOCK - 1) * _BLOCK
        file.seek(first)
        data = file.read()
    bodies = _bodies(path, data, 0 if first else len(_MAGIC))
    kinds = [_record(path, start, body).WhichOneof("record_type") for start, body in bodies]
    return "exit" in kinds


def run_of(folder: Path, run_id: str) -> Any:
    """What the first start of a run says of it: project, entity, display_name; None: no file."""
    for path in segments(folder, run_id, online=True):
        for _, record in records(path):
            if record.WhichOneof("record_type") == "run":
                return record.run
    return None


def logged_files(folder: Path, run_id: str | None = None) -> set[tuple[str, str]]:
    """Name and digest of each checkpoint that a run has logged as an artifact.

    Raises:
        UnknownFormat: A file is not understood.
    """
    found = set()
    for path in segments(folder, run_id, online=True):
        for start, record in records(path):
            if record.WhichOneof("record_type") == "artifact":
                with _damage(path, start):
                    metadata = json.loads(record.artifact.metadata or "{}")
                    name = metadata.get("original_filename", "")
                found |= {(name, entry.digest) for entry in record.artifact.manifest.contents}
    return found


@contextlib.contextmanager
def _damage(path: Path, start: int) -> Iterator[None]:
    """Name the file in which JSON is not as wandb writes it."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise UnknownFormat(f"{path} is damaged at byte {start}") from error


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


class Kept(list[dict[str, Any]]):
    """Rows of history.

    Attributes:
        sent: Rows after these that were sent to the server, and cannot be cut.
    """

    sent: int = 0


def keep_history(folder: Path, n_rows: int, run_id: str | None = None) -> Kept:
    """Cut the files of a run to its first rows of history, and return those that are there.

    A cut file is one of a run that was killed there. Less than `n_rows` come back where a kill was
    faster than the writing. Files of online starts are read and left as they are.

    Args:
        folder: The folder that contains wandb/.
        n_rows: How many rows to keep.
        run_id: The id of the run; None: of any run.

    Raises:
        UnknownFormat: A file is not understood; then none is changed.
    """
    kept = Kept()
    cuts: list[tuple[Path, int]] = []
    for path in segments(folder, run_id, online=True):
        offline = path.parent.name.startswith("offline-")
        for start, record in records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            if len(kept) < n_rows:
                with _damage(path, start):
                    kept.append(history_row(record))
            elif offline:
                cuts.append((path, start))
                break
            else:
                kept.sent += 1
    for path, size in reversed(cuts):  # if it is killed here, the next time cuts the rest
        os.truncate(path, size)
    return kept


def has_numbers(row: dict[str, Any]) -> bool:
    """Whether a row of history holds metrics of a logger, and not only tables and pictures.

    Rows of the user's own `wandb.log` have no step of the trainer.
    """
    metrics = [value for name, value in row.items() if name not in _OWN]
    return _STEP in row and any(not _is_media(value) for value in metrics)


def _is_media(value: Any) -> bool:
    return isinstance(value, dict) and "_type" in value
