"""`tx-lightning translate CHECKPOINT`: lines on standard input become lines on standard output."""

import sys
from collections.abc import Sequence

from tx_lightning.callbacks.predictions import one_line_of
from tx_lightning.checkpoints import load_task
from tx_lightning.configuration import ConfigurationParser
from tx_lightning.decoding import Decoding
from tx_lightning.errors import ConfigurationError
from tx_lightning.tasks import Translation
from tx_lightning.tasks.translation import TextTooLong
from tx_lightning.text_verbs import (
    device_named,
    parse_words,
    quiet_when_closed,
    read_lines,
    standard_input,
)
from tx_lightning.trust import HELP, take_trust

DESCRIPTION = """\
Translate lines from standard input with a checkpoint alone. Line i of the output belongs to line i
of the input, an empty one to an empty one; what has been read is translated at once, so it can be
used in a pipe or by hand. Several hypotheses of a line (n_best, n_samples) are written one per
line, as number of the input line, score and text, separated by tabs."""

SHORT = dict.fromkeys(("beam_size", "n_best", "length_penalty"), "Beam")
BEAM = {"class_path": "tx_lightning.decoding.Beam"}


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `translate`.
    """
    parser = _parser()
    trust, words = take_trust(words)
    if not words or words[0].startswith("-"):
        parser.print_help()
        return 0 if {"-h", "--help"} & set(words) else 2
    task = load_task(words[0], trust=trust.packages)
    if not isinstance(task, Translation):
        raise ConfigurationError(f"{words[0]} holds a {type(task).__name__}, not a Translation")
    arguments = task.settings["init_args"] if task.settings else {}
    own = arguments.get("test_decoding") or arguments.get("decoding") or BEAM
    options = parse_words(parser, words, own=own, short=SHORT)
    decoding = parser.instantiate(options).decoding
    task.to(device_named(options.device))
    arguments = options.decoding.init_args
    several = max(arguments.get("n_best", 1), arguments.get("n_samples", 1)) > 1
    number = 0
    with quiet_when_closed():
        for texts in read_lines(standard_input(), options.batch_size):
            try:
                found = task.translate(texts, decoding, options.batch_tokens, first_index=number)
            except TextTooLong as error:
                line = number + error.index + 1
                raise ValueError(
                    f"standard input, line {line}: {error.tokens:,} tokens are too many for a "
                    f"sentence, at most {error.most:,} fit; the lines before this batch are "
                    "translated"
                ) from error
            for hypotheses in found:
                number += 1
                for hypothesis in hypotheses if several else hypotheses[:1]:
                    rank = f"{number}\t{hypothesis.score:.4f}\t" if several else ""
                    sys.stdout.write(rank + one_line_of(hypothesis.text) + "\n")
            sys.stdout.flush()
    return 0


def _parser() -> ConfigurationParser:
    parser = ConfigurationParser(prog="tx-lightning translate", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=str, help="A checkpoint of `tx-lightning fit`.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
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
