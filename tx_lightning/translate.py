"""`tx-lightning translate CHECKPOINT`: lines on standard input become lines on standard output."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from queue import Queue
from typing import BinaryIO

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from tx_lightning.callbacks.predictions import one_line_of
from tx_lightning.checkpoints import load_task
from tx_lightning.decoding import Decoding
from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError
from tx_lightning.tasks import Translation
from tx_lightning.tasks.translation import TextTooLong

DESCRIPTION = """\
Translate lines from standard input with a checkpoint alone. Line i of the output belongs to line i
of the input, an empty one to an empty one; what has been read is translated at once, so it can be
used in a pipe or by hand. Several hypotheses of a line (n_best, n_samples) are written one per
line, as number of the input line, score and text, separated by tabs."""

SHORT = ("beam_size", "n_best", "length_penalty")  # --beam_size 5 is --decoding.beam_size 5
BEAM = {"class_path": "tx_lightning.decoding.Beam"}


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `translate`.
    """
    parser = _parser()
    if not words or words[0].startswith("-"):
        parser.print_help()
        return 0 if {"-h", "--help"} & set(words) else 2
    task = load_task(words[0])
    if not isinstance(task, Translation):
        raise ConfigurationError(f"{words[0]} holds a {type(task).__name__}, not a Translation")
    options = _parse(parser, words, task)
    decoding = parser.instantiate(options).decoding
    task.to(_device(options.device))
    arguments = options.decoding.init_args
    several = max(arguments.get("n_best", 1), arguments.get("n_samples", 1)) > 1
    number = 0
    try:
        for texts in read_lines(sys.stdin.buffer, options.batch_size):
            try:
                found = task.translate(texts, decoding, options.batch_tokens, first_index=number)
            except TextTooLong as error:
                line = number + error.index + 1
                raise ValueError(
                    f"standard input, line {line}: {error.tokens:,} tokens are too many for a "
                    "sentence; the lines before this batch are translated"
                ) from error
            for hypotheses in found:
                number += 1
                for hypothesis in hypotheses if several else hypotheses[:1]:
                    rank = f"{number}\t{hypothesis.score:.4f}\t" if several else ""
                    sys.stdout.write(rank + one_line_of(hypothesis.text) + "\n")
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, as `head`, has had enough; nor is there more to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tx-lightning translate", description=DESCRIPTION, exit_on_error=False
    )
    parser.add_argument("checkpoint", type=str, help="A checkpoint of `tx-lightning fit`.")
    parser.add_argument(
        "--decoding",
        type=Decoding,
        help="How to search, as `--decoding Sampling --decoding.top_k 10`; what is not given is as "
        f"in the checkpoint's test_decoding. {', '.join(f'--{name}' for name in SHORT)} are short "
        "for those of a beam search, --decoding.beam_size and so on.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="Most lines that are read before translating."
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=4096, help="Source tokens that are decoded at once."
    )
    parser.add_argument(
        "--device",
        type=str,
        default="auto",
        help="cpu, cuda, cuda:1; auto: a GPU if any.",
    )
    return parser


def _parse(parser: ArgumentParser, words: Sequence[str], task: Translation) -> Namespace:
    """Parse the words on top of the checkpoint's own way of decoding."""
    arguments = task.settings["init_args"] if task.settings else {}
    own = arguments.get("test_decoding") or arguments.get("decoding") or BEAM
    short = [word for word in words if word.lstrip("-").split("=")[0] in SHORT]
    if short and own["class_path"].rpartition(".")[2] != "Beam":
        own = BEAM
    parser.set_defaults({"decoding": own})
    words = [word.replace("--", "--decoding.", 1) if word in short else word for word in words]
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), words, parser)) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device {name}: there is no such device") from error


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
