"""Folders of the cache: complete or absent, made once, by one process of a machine.

A folder is written beside its place and then renamed. What takes long is kept when it is
interrupted, and goes on from there.
"""

import errno
import fcntl
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tx_lightning.data.errors import DataError

Item = TypeVar("Item")

BEGUN = ".begun"  # ends the name of a folder that is not complete, but will be gone on with


class CacheError(DataError):
    """The cache folder cannot be used: no space left, not writable, or damaged."""

    @classmethod
    def damaged(cls, folder: Path, error: Exception) -> "CacheError":
        """The error of a folder whose files are not what was written."""
        return cls(f"cache_dir: {folder} is damaged ({error}); delete that folder and start again")


def build_once(folder: Path, build: Callable[[Path], None], *, resumable: bool = False) -> None:
    """Make sure that a folder of the cache exists, complete; build it when it does not.

    `build` fills a temporary folder beside it, which is then renamed. Of several processes on one
    machine one builds and the others wait; where files cannot be locked all of them build and the
    first to finish wins. What a killed process left behind is removed by the next one, or handed to
    `build` again.

    Args:
        folder: The folder to have.
        build: Fills the folder it is given, which is empty, or as an interrupted call left it.
        resumable: Whether `build` goes on where it was interrupted.

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
            if alone and resumable:
                begun = folder.with_name(f"{folder.name}{BEGUN}")
                begun.mkdir(exist_ok=True)
                _build(begun, folder, build, keep=True)
            else:
                made = tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent)
                _build(Path(made), folder, build, keep=False)
    except OSError as error:
        raise _explained(error, folder.parent) from error


def _build(temporary: Path, folder: Path, build: Callable[[Path], None], *, keep: bool) -> None:
    """Fill the temporary folder and give it its name; keep it where that is only interrupted."""
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # Otherwise another process was first, with the same content.
                raise
    except BaseException as error:
        if not keep or isinstance(error, Exception):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary.exists():
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
        told, before = time.monotonic(), 0
        for n, record in enumerate(records, 1):
            yield record
            if n % 1024 == 0 and (now := time.monotonic()) - told >= self.every:
                rate = (n - before) / (now - told)
                told, before = now, n
                print(f"{self.action}: {n:,} {self.unit}, {rate:,.0f} a second", file=sys.stderr)
