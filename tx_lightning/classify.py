"""`tx-lightning classify CHECKPOINT`: lines on standard input become labels on standard output."""

import sys
from collections.abc import Sequence

from jsonargparse import Namespace

from tx_lightning.checkpoints import load_task
from tx_lightning.configuration import ConfigurationParser
from tx_lightning.data.classification import split_line
from tx_lightning.errors import ConfigurationError
from tx_lightning.strict_json import to_json
from tx_lightning.tasks.classification import Classification
from tx_lightning.tasks.tagging import Tagging
from tx_lightning.text_verbs import (
    device_named,
    parse_words,
    quiet_when_closed,
    read_lines,
    standard_input,
)
from tx_lightning.trust import HELP, take_trust

DESCRIPTION = """\
Label lines from standard input with the checkpoint of a classifier alone: label and probability,
with a tab between them, for each line in its place, and an empty line for an empty one. Of a
classifier of pairs a line has both texts, with a tab between them. With the checkpoint of a tagger
a line has words with blanks between them and becomes their tags with tabs between them. For
programs, --json true writes one object a line instead: text (and second), label, probability; of a
tagger words and tags. What has been read is labelled at once, so it can be used in a pipe or by
hand. Texts that are too long for the network are cut, and said on standard error."""


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `classify`.
    """
    parser = _parser()
    trust, words = take_trust(words)
    if not words or words[0].startswith("-"):
        parser.print_help()
        return 0 if {"-h", "--help"} & set(words) else 2
    task = load_task(words[0], trust=trust.packages)
    if not isinstance(task, Classification | Tagging):
        raise ConfigurationError(
            f"{words[0]} holds a {type(task).__name__}, not a Classification or a Tagging"
        )
    options = parse_words(parser, words)
    if options.all and isinstance(task, Tagging):
        raise ConfigurationError("--all true: a tagger gives each word one tag; leave it out")
    task.to(device_named(options.device))
    number, long = 0, _LongLines()
    try:
        with quiet_when_closed():
            for lines in read_lines(standard_input(), options.batch_size):
                long.before = number
                if isinstance(task, Tagging):
                    found = _tagged(task, lines, long, options)
                else:
                    found = _classified(task, lines, long, options)
                sys.stdout.write("".join(f"{line}\n" for line in found))
                sys.stdout.flush()
                number += len(lines)
    finally:
        long.tell("tagged in parts" if isinstance(task, Tagging) else "cut")
    return 0


class _LongLines:
    """Counts the lines that are longer than the network can hold, and remembers the first.

    Attributes:
        before: Lines before those being labelled.
        places: Of those, the lines that have text.
    """

    def __init__(self) -> None:
        self.before = 0
        self.places: list[int] = []
        self.count = 0
        self.first = (0, 0)

    def add(self, index: int, tokens: int) -> None:
        """Count the text of that place among those being labelled."""
        line = self.before + self.places[index] + 1
        self.first = self.first if self.count else (line, tokens)
        self.count += 1

    def tell(self, done: str) -> None:
        """Say on standard error what was done to them."""
        if self.count:
            line, tokens = self.first
            print(
                f"too long for the network, and {done}: {self.count:,} lines, the first of them "
                f"line {line} with {tokens:,} tokens",
                file=sys.stderr,
            )


def _classified(
    task: Classification, lines: list[str], long: _LongLines, options: Namespace
) -> list[str]:
    """What is written for lines of texts."""
    long.places = [i for i, line in enumerate(lines) if line.strip()]
    pairs = task.n_texts == 2
    texts = [
        split_line(lines[i], pairs, f"standard input, line {long.before + i + 1}")
        for i in long.places
    ]
    found = task.classify(
        [text[0] for text in texts],
        [text[1] for text in texts] if pairs else None,
        batch_tokens=options.batch_tokens,
        on_cut=long.add,
    )
    names = ("text", "second") if pairs else ("text",)
    empty = _object(dict.fromkeys(names, ""), [], options) if options.json else ""
    written = [empty] * len(lines)
    for i, text, labels in zip(long.places, texts, found, strict=True):
        if options.json:
            written[i] = _object(dict(zip(names, text, strict=True)), labels, options)
        else:
            shown = labels if options.all else labels[:1]
            written[i] = "\t".join(f"{label}\t{probability:.4f}" for label, probability in shown)
    return written


def _object(texts: dict[str, str], labels: list[tuple[str, float]], options: Namespace) -> str:
    label, probability = labels[0] if labels else (None, None)
    values: dict[str, object] = {**texts, "label": label, "probability": probability}
    if options.all:
        values["probabilities"] = dict(labels)
    return to_json(values, ensure_ascii=False)


def _tagged(task: Tagging, lines: list[str], long: _LongLines, options: Namespace) -> list[str]:
    """What is written for lines of words."""
    long.places = list(range(len(lines)))
    sentences = [line.split() for line in lines]
    found = task.tag(sentences, batch_tokens=options.batch_tokens, on_long=long.add)
    if not options.json:
        return ["\t".join(tags) for tags in found]
    return [
        to_json({"words": words, "tags": tags}, ensure_ascii=False)
        for words, tags in zip(sentences, found, strict=True)
    ]


def _parser() -> ConfigurationParser:
    parser = ConfigurationParser(prog="tx-lightning classify", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=str, help="A checkpoint of `tx-lightning fit`.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    parser.add_argument(
        "--all",
        type=bool,
        default=False,
        help="Whether to write all labels with their probabilities, the most probable first, "
        "instead of the best; with --json as the object probabilities.",
    )
    parser.add_argument(
        "--json", type=bool, default=False, help="Whether to write one JSON object a line."
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="Most lines that are read before going on."
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=16384, help="Tokens that are labelled at once."
    )
    parser.add_argument(
        "--device",
        type=str,
        default="auto",
        help="cpu, cuda, cuda:1; auto: a GPU if any.",
    )
    return parser
