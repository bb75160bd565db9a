"""Lines of text files, plain or gzip, as a stream; what is not text is refused by file and line.

The rules, the same for every source, for files to predict and for standard input:

- A line ends at a line feed. A carriage return before it, and a UTF-8 byte-order mark at the start
  of the file, are not part of the text. U+2028, U+0085, form feed and the like end no line.
- A text is one line: a line feed or carriage return inside it (JSON can hold one) becomes a space.
- An empty line is an empty text; a last line need not end; a file without lines is refused.
- Bytes that are not UTF-8 are refused, not replaced. So are NUL bytes: no text holds them, but
  UTF-16, binary files and the tails of files cut by a crash do.
- A line may be as long as `LONGEST_LINE`. A million characters pass, and the filter of the training
  data drops the pair as too long; a binary file or a gzip bomb does not fill the memory.
- Whether a file is gzip is seen from its first two bytes, which begin no UTF-8 text, not its name.
- Data files are read more than once, so pipes, sockets and devices are refused. A file to predict
  is read once and may be one of them.
"""

import codecs
import gzip
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase
from itertools import zip_longest
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, cast

from tx_lightning.data.errors import DataError, listed

LONGEST_LINE = 16 * 2**20  # bytes
_CHUNK = 2**16
_GZIP = b"\x1f\x8b"
_READ_ONCE = {
    stat.S_ISFIFO: "pipe",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends.

    Raises:
        DataError: The file is missing, empty, cut, or not text; says the line.
    """
    with open_binary(path) as file:
        yield from decoded_lines(file, str(path))


def decoded_lines(stream: BufferedIOBase, name: str) -> Iterator[str]:
    """The lines of a stream of bytes, without their ends.

    Args:
        stream: Where they come from.
        name: What it is called in errors.

    Raises:
        DataError: There is no line, or one is not text.
    """
    line = stream.readline(LONGEST_LINE + 1).removeprefix(codecs.BOM_UTF8)
    if not line:
        raise DataError(f"{name} is empty: it has no lines")
    number = 1
    while line:
        yield _decoded(line, name, number)
        line = stream.readline(LONGEST_LINE + 1)
        number += 1


def read_aligned(source: str | Path, target: str | Path) -> Iterator[tuple[str, str]]:
    """The lines of two files that translate each other line by line.

    Raises:
        DataError: As `read_lines`; or one file ends before the other, after the pairs before that.
    """
    for left, right in zip_longest(read_lines(source), read_lines(target)):
        if left is None or right is None:
            raise DataError(
                f"{source} has {count_lines(source):,} lines but {target} has "
                f"{count_lines(target):,}: line n of one must translate line n of the other"
            )
        yield left, right


def count_lines(path: str | Path) -> int:
    """The number of lines that `read_lines` would yield, without looking at what they hold."""
    lines, last = 0, b""
    with open_binary(path) as file:
        while chunk := file.read(_CHUNK):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last not in (b"", b"\n"))


def checked(text: str, where: str) -> str:
    """A text from a format of its own (JSON, Arrow) under the rules of this page.

    Args:
        text: Any string.
        where: File and line, or the like, to open the message with.
    """
    return _one_line(_checked(text, where))


def checked_document(text: str, where: str) -> str:
    """The same for a text of several lines: each carriage return is, or is part of, a line end."""
    return _checked(text, where).replace("\r\n", "\n").replace("\r", "\n")


def _checked(text: str, where: str) -> str:
    if "\0" in text:
        raise DataError(nul_byte(where))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise DataError(
                f"{where}: character {error.start + 1} is U+{code:04X}, half of a surrogate pair, "
                "which is not text; repair or remove it"
            ) from None
    return text


def decode_line(line: bytes, name: str, number: int) -> str:
    """The text of a line under the rules of this page.

    Args:
        line: It ends with its line feed, unless it is the last or longer than `LONGEST_LINE`.
        name: What the file or stream is called in errors.
        number: Its number, from 1.

    Raises:
        NotUTF8: It is not UTF-8.
        DataError: It is too long, or holds a NUL byte.
    """
    return _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, name, number)


def _decoded(line: bytes, name: str, number: int) -> str:
    if len(line) > LONGEST_LINE:
        raise DataError(
            f"{name}, line {number} is longer than {LONGEST_LINE // 2**20} MiB, but a line should "
            "be a sentence; is this a text file?"
        )
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise NotUTF8(line, error.start, number, name) from None
    if "\0" in text:
        raise DataError(nul_byte(f"{name}, line {number}"))
    return _one_line(text.rstrip("\r\n"))


class NotUTF8(DataError):
    """A line is not UTF-8.

    Attributes:
        byte: The byte that is not, as text.
        remedy: What to do.
    """

    def __init__(self, line: bytes, start: int, number: int, name: str) -> None:
        utf16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        guess = "UTF-16" if utf16 else "LATIN1"
        self.byte = f"byte {start + 1} (0x{line[start]:02x})"
        self.remedy = f"if the file is {guess}, convert it with: iconv -f {guess} -t UTF-8"
        super().__init__(f"{name}, line {number}: {self.byte} is not UTF-8; {self.remedy}")


def nul_byte(where: str) -> str:
    """What is said of a NUL byte in a text."""
    return (
        f"{where} holds a NUL byte, which no text does (UTF-16, a binary file, or the end of a "
        "file cut by a crash?); convert the file, or remove them with: tr -d '\\000'"
    )


def _one_line(text: str) -> str:
    if "\r" not in text and "\n" not in text:
        return text
    return text.replace("\r\n", " ").replace("\r", " ").replace("\n", " ")


@contextmanager
def open_binary(path: str | Path) -> Iterator[BufferedIOBase]:
    """The decompressed bytes of a file; whatever goes wrong while it is read is a DataError."""
    path = Path(path).expanduser()
    try:
        check_regular(path)
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            if file.peek(2)[:2] == _GZIP:
                yield stack.enter_context(gzip.GzipFile(fileobj=cast(BinaryIO, file)))
            else:
                yield file
    except FileNotFoundError:
        raise DataError(missing(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file, perhaps cut in half ({error}); get it again"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def check_regular(path: Path) -> None:
    """Refuse what can be read only once, before waiting for it.

    Raises:
        OSError: There is no such file.
        DataError: It is a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    for is_kind, kind in _READ_ONCE.items():
        if is_kind(mode):
            raise DataError(
                f"{path} is a {kind}, but data files are read more than once; write its content "
                "to a file and name that"
            )


def spooled(path: Path, folder: Path) -> Path:
    """A copy, below a folder, of what can be read only once.

    Raises:
        DataError: It cannot be read or copied.
    """
    copy = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file, NamedTemporaryFile(dir=folder, delete=False) as copy:
            shutil.copyfileobj(file, copy)
        return Path(copy.name)
    except OSError as error:
        if copy is not None:
            Path(copy.name).unlink(missing_ok=True)
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def missing(path: Path) -> str:
    """What is said of a file that does not exist, with those that do."""
    if not path.parent.is_dir():
        return f"there is no file {path}: the folder {path.parent} does not exist"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    there = f"the folder has {listed(names, path.name)}" if names else "the folder has no files"
    return f"there is no file {path}; {there}"
