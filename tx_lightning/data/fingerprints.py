"""SHA-256 of files, computed once for a file that does not change.

Start-up must not grow with the corpus, so the hash of a file is kept in the cache folder under the
file's path, size, inode and times, as `make` and `git` know that a file is the same.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from tx_lightning.data.errors import DataError
from tx_lightning.data.folders import cache_folder
from tx_lightning.data.text import check_regular

_SETTLED = 2_000_000_000  # ns; a file changed again within the clock's tick keeps its times


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(path).expanduser()
    try:
        check_regular(path)
        identity, changed = _identity(path)
        note = cache_folder() / "sha256" / identity
        if (known := _read(note)) is not None:
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        unchanged = _identity(path)[0] == identity
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if unchanged and time.time_ns() - changed > _SETTLED:
        _write(note, digest.hexdigest())
    return digest.hexdigest()


def _identity(path: Path) -> tuple[str, int]:
    """(name of the note, time of the last change in ns)."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr(key).encode()).hexdigest(), max(stat.st_mtime_ns, stat.st_ctime_ns)


def _read(note: Path) -> str | None:
    try:
        text = note.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) == 64 else None


def _write(note: Path, digest: str) -> None:
    """Keep the hash; where the cache cannot be written it is computed again next time."""
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as file:
            file.write(digest)
        Path(temporary).replace(note)
