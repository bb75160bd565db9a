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

from tx_lightning.configuration import options, without_option
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
        return parser.parse_args(words)
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), without_texts(words), parser)) from error


def device_named(name: str) -> torch.device:
    """The device of `--device`: as torch names it, or a GPU if any for `auto`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device {name}: there is no such device") from error


@contextlib.contextmanager
def quiet_when_closed() -> Iterator[None]:
    """End quietly when the reader of standard output, as `head`, has had enough."""
    try:
        yield
    except BrokenPipeError:  # nor is there more to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_lines(stream: BinaryIO, most: int) -> Iterator[list[str]]:
    """Lines of a stream as they come: all that wait to be read, but not more than `most` at once.

    Raises:
        ValueError: When a line is not UTF-8; the lines before it are returned first.
    """
    waiting: Queue[bytes | None] = Queue(maxsize=4 * most)

    def fill() -> None:
        for line in stream:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=fill, daemon=True).start()
    number = 0
    while lines := _take(waiting, most):
        texts: list[str] = []
        for line in lines:
            number += 1
            try:
                texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                yield texts
                raise ValueError(f"standard input, line {number}: not UTF-8 ({error})") from error
        yield texts


def _take(waiting: "Queue[bytes | None]", most: int) -> list[bytes]:
    """Wait for a line, and take with it those that wait already; none at the end."""
    lines: list[bytes] = []
    line = waiting.get()
    while line is not None:
        lines.append(line)
        if len(lines) == most or waiting.empty():
            return lines
        line = waiting.get()
    waiting.put(None)  # the end is there again for the next call
    return lines
