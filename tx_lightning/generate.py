"""`tx-lightning generate CHECKPOINT`: prompts go on as a language model would have them."""

import sys
from collections.abc import Iterator, Sequence

from jsonargparse import Namespace

from tx_lightning.checkpoints import load_task
from tx_lightning.configuration import ConfigurationParser
from tx_lightning.data.text import checked_document
from tx_lightning.decoding import Decoding
from tx_lightning.errors import ConfigurationError
from tx_lightning.strict_json import to_json
from tx_lightning.tasks.continuation import (
    Continuation,
    PastContext,
    PromptError,
    continue_texts,
    is_one_row,
)
from tx_lightning.tasks.language_modeling import LanguageModeling
from tx_lightning.text_verbs import (
    device_named,
    parse_words,
    quiet_when_closed,
    read_lines,
    standard_input,
)
from tx_lightning.trust import HELP, take_trust

DESCRIPTION = """\
Continue prompts with the checkpoint of a language model alone. A prompt is given with --prompt,
which may be repeated, or is a line of standard input. Prompt and continuation are written as one
text, a single one while it comes; where there may be several, a line `--- prompt 2, sample 1 ---`
stands before each. For programs, --json true writes one object a line instead: prompt, sample,
text (the continuation alone), log_prob (of the continuation, in nats) and finished (whether it has
come to an end by itself)."""

SHORT = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "n_samples", "seed"), "Sampling"),
    **dict.fromkeys(("beam_size", "n_best"), "Beam"),
}
# What LanguageModeling does where its settings name no search.
SAMPLING = {
    "class_path": "tx_lightning.decoding.Sampling",
    "init_args": {"temperature": 0.8, "top_k": 200},
}


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `generate`.
    """
    parser = _parser()
    trust, words = take_trust(words)
    if not words or words[0].startswith("-"):
        parser.print_help()
        return 0 if {"-h", "--help"} & set(words) else 2
    task = load_task(words[0], trust=trust.packages)
    if not isinstance(task, LanguageModeling):
        raise ConfigurationError(
            f"{words[0]} holds a {type(task).__name__}, not a LanguageModeling"
        )
    own = (task.settings["init_args"] if task.settings else {}).get("decoding") or SAMPLING
    options = parse_words(parser, words, own=own, short=SHORT, texts="prompt")
    decoding = parser.instantiate(options).decoding
    task.to(device_named(options.device))
    with quiet_when_closed():
        number = 0
        for prompts in _prompts(options):
            _write(task, prompts, number, decoding, options)
            number += len(prompts)
    return 0


def _write(
    task: LanguageModeling,
    prompts: list[str],
    first_index: int,
    decoding: Decoding,
    options: Namespace,
) -> None:
    """Continue prompts, the first of which is number first_index + 1 of all, and write them."""
    arguments = options.decoding.init_args
    several = max(arguments.get("n_best", 1), arguments.get("n_samples", 1)) > 1
    headed = several or options.prompt is None or len(options.prompt) > 1
    streamed = len(prompts) == 1 and is_one_row(decoding) and not options.json

    def opening(index: int, sample: int) -> str:
        head = f"--- prompt {first_index + index + 1}, sample {sample} ---\n" if headed else ""
        return head + prompts[index]

    def observe(piece: str) -> None:
        sys.stdout.write(piece or opening(0, 1))  # at first there is no piece
        sys.stdout.flush()

    try:
        found = continue_texts(
            task.network,
            task.tokenizer,
            prompts,
            decoding,
            max_new_tokens=options.max_new_tokens,
            past_context=options.past_context,
            stride=options.stride,
            new_document=options.new_document,
            stop_at_end=options.stop_at_end,
            first_index=first_index,
            batch_tokens=options.batch_tokens,
            observe=observe if streamed else None,
        )
    except PromptError as error:
        place = "standard input, line" if options.prompt is None else "prompt"
        number = first_index + error.index + 1
        raise ValueError(f"{place} {number}: {error.reason}") from error
    for i, continuations in enumerate(found):
        for sample, continuation in enumerate(continuations if several else continuations[:1], 1):
            if options.json:
                line = _object(prompts[i], sample, continuation)
            else:
                line = "" if streamed else opening(i, sample) + continuation.text
            sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _object(prompt: str, sample: int, continuation: Continuation) -> str:
    values = {
        "prompt": prompt,
        "sample": sample,
        "text": continuation.text,
        "log_prob": continuation.log_prob,
        "finished": continuation.finished,
    }
    return to_json(values, ensure_ascii=False)


def _prompts(options: Namespace) -> Iterator[list[str]]:
    """The prompts of the words, or else of standard input as they come."""
    if options.prompt is None:
        yield from read_lines(standard_input(), options.batch_size)
        return
    yield [_prompt(text, f"prompt {number}") for number, text in enumerate(options.prompt, 1)]


def _prompt(text: str, where: str) -> str:
    """A prompt under the rules for text; it may have several lines."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # how words hold bytes
        raise ValueError(f"{where}: not UTF-8")
    return checked_document(text.removeprefix("\ufeff"), where)


def _parser() -> ConfigurationParser:
    parser = ConfigurationParser(prog="tx-lightning generate", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=str, help="A checkpoint of `tx-lightning fit`.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    parser.add_argument(
        "--prompt",
        type=str,
        action="append",
        help="A text to go on from, may be repeated; else each line of standard input is one. One "
        "that begins with a dash is written --prompt=-text.",
    )
    parser.add_argument(
        "--decoding",
        type=Decoding,
        help="How to search, as `--decoding Greedy`; what is not given is as in the checkpoint's "
        "decoding, or Sampling at a temperature of 0.8 from the top_k of 200. "
        + "; ".join(
            f"{', '.join(f'--{name}' for name in SHORT if SHORT[name] == search)} are short for "
            f"those of {search}"
            for search in dict.fromkeys(SHORT.values())
        )
        + ": --decoding.top_k and so on.",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=200,
        help="Most tokens of a continuation, the end of the text included.",
    )
    parser.add_argument(
        "--past_context",
        type=PastContext,
        default="slide",
        help="What to do with a text longer than the context of the network: slide forgets the "
        "oldest tokens, refuse is an error before anything is generated.",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        help="How many of the oldest tokens slide forgets at once. 1 remembers the most, half of "
        "the context is much faster.",
    )
    parser.add_argument(
        "--new_document",
        type=bool,
        default=False,
        help="Whether a new text begins with the prompt, which may then be empty, rather than a "
        "prompt standing anywhere in a text.",
    )
    parser.add_argument(
        "--stop_at_end",
        type=bool,
        default=True,
        help="Whether to stop where the network ends the text; else it is kept from ending it.",
    )
    parser.add_argument(
        "--json", type=bool, default=False, help="Whether to write one JSON object a line."
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="Most lines that are read before going on."
    )
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=16384,
        help="Tokens, of prompts and continuations, that are held at once for one sample of each.",
    )
    parser.add_argument(
        "--device",
        type=str,
        default="auto",
        help="cpu, cuda, cuda:1; auto: a GPU if any.",
    )
    return parser
