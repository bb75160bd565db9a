"""What the verbs share that make text of text with a checkpoint: lines in, a search, lines out."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from queue import Queue
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from tx_lightning.configuration import DuplicateKey, options, without_option
from tx_lightning.data.errors import listed
from tx_lightning.data.text import LONGEST_LINE, NotUTF8, decode_line
from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError, did_you_mean


def parse_words(
    parser: ArgumentParser,
    words: Sequence[str],
    *,
    own: Mapping[str, Any] | None = None,
    short: Mapping[str, str] = MappingProxyType({}),
    texts: str | None = None,
) -> Namespace:
    """Parse the words of a verb, one with an option `--decoding` or one that does not search.

    Args:
        parser: The parser of the verb.
        words: What follows the verb.
        own: The search of the checkpoint, which the words change; None: there is no `--decoding`.
        short: Options that are short for those of a search: `{"beam_size": "Beam"}` makes
            `--beam_size 5` mean `--decoding.beam_size 5`, of a `Beam` with its defaults where the
            checkpoint's search is another.
        texts: The option whose values are text.

    Raises:
        ConfigurationError: The words are not accepted.
    """

    def without_texts(words: Sequence[str]) -> Sequence[str]:
        return words if texts is None else without_option(words, texts)

    names = [name for name, _ in options(without_texts(words))]
    known = [*short, *(action.dest for action in parser._actions)]
    for name in names:
        if "." not in name and name not in known and (near := did_you_mean(name, known)):
            raise ConfigurationError(f"--{name}: there is no '{name}'{near}")
    used = {short[name]: name for name in names if name in short}
    if len(used) > 1:
        both = " and ".join(f"--{name} ({search})" for search, name in sorted(used.items()))
        raise ConfigurationError(f"{both} belong to different searches: give options of one")
    for search in used:
        if own is None or own["class_path"].rpartition(".")[2] != search:
            own = {"class_path": f"tx_lightning.decoding.{search}"}
    if own is not None:
        parser.set_defaults({"decoding": own})
    shorts = tuple(f"--{name}" for name in short)
    words = [
        word.replace("--", "--decoding.", 1) if word.partition("=")[0] in shorts else word
        for word in words
    ]
    try:
        parsed = parser.parse_args(words)
    except (ArgumentError, DuplicateKey) as error:
        raise ConfigurationError(explain(str(error), without_texts(words), parser)) from error
    for name in ("batch_size", "batch_tokens"):
        if name in parsed and parsed[name] < 1:
            raise ConfigurationError(f"--{name} must be at least 1; it is {parsed[name]}")
    return parsed


def device_named(name: str) -> torch.device:
    """The device of `--device`: as torch names it, or a GPU if any for `auto`.

    Raises:
        ConfigurationError: This machine does not have it; lists those it has.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        there += [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
    known = {*there, *(known.partition(":")[0] for known in there)}
    if name not in known:
        raise ConfigurationError(
            f"--device {name}: there is no such device here; there are {listed(there, name)}"
        )
    return torch.device(name)


@contextlib.contextmanager
def quiet_when_closed() -> Iterator[None]:
    """End quietly when the reader of standard output, as `head`, has had enough.

    Raises:
        ValueError: Standard output cannot be written to for another reason.
    """
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write to")
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        # What is left to be flushed has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise ValueError(f"standard output cannot be written: {error.strerror}") from error


def standard_input() -> BinaryIO:
    """The bytes of standard input.

    Raises:
        ValueError: It is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed: give texts with a pipe, or from a file with <")
    return sys.stdin.buffer


def read_lines(stream: BinaryIO, most: int) -> Iterator[list[str]]:
    """Lines of a stream as they come: all that wait to be read, but not more than `most` at once.

    Raises:
        ValueError: The stream cannot be read, or a line is not text; the lines before it are
            returned first.
    """
    waiting: Queue[bytes | Exception | None] = Queue(maxsize=4 * most)

    def fill() -> None:
        end: Exception | None = None
        try:
            while line := stream.readline(LONGEST_LINE + 1):
                waiting.put(line)
        except Exception as error:  # whatever it is: the reader must not wait for ever
            end = error
        waiting.put(end)

    threading.Thread(target=fill, daemon=True).start()
    number = 0
    while lines := _take(waiting, most):
        texts: list[str] = []
        for line in lines:
            number += 1
            try:
                texts.append(_text(line, number))
            except ValueError:
                yield texts
                raise
        yield texts


def _take(waiting: "Queue[bytes | Exception | None]", most: int) -> list[bytes]:
    """Wait for a line, and take with it those that wait already; none at the end."""
    lines: list[bytes] = []
    item = waiting.get()
    while isinstance(item, bytes):
        lines.append(item)
        if len(lines) == most or waiting.empty():
            return lines
        item = waiting.get()
    if item is not None and not lines:
        why = item.strerror if isinstance(item, OSError) else item
        raise ValueError(f"standard input cannot be read: {why}") from item
    waiting.put(item)  # for the next call
    return lines


def _text(line: bytes, number: int) -> str:
    try:
        return decode_line(line, "standard input", number)
    except NotUTF8 as error:
        raise ValueError(
            f"standard input, line {number}: not UTF-8: {error.byte}; {error.remedy}"
        ) from error
