"""The entry of the command line: what needs no torch is answered here, within milliseconds."""

import difflib
import gc
import os
import sys
from collections.abc import Sequence

from tx_lightning import __version__

VERBS = {
    "fit": "train a model, validating as it goes",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "write the hypotheses of a checkpoint to the run folder, in input order",
    "translate": "translate lines from standard input with a checkpoint, and nothing else",
    "generate": "continue prompts with the checkpoint of a language model",
    "classify": "label texts from standard input, or the words in them, with a checkpoint",
    "reproduce": "run a run again and say whether the same comes out",
    "average": "average the weights of several checkpoints into one",
    "import": "make a checkpoint of GPT-2, BERT, BART or Marian weights of Hugging Face",
    "export": "write a checkpoint as a folder that transformers loads",
}

USAGE = f"""\
usage: tx-lightning VERB [options]

{chr(10).join(f"  {verb:<10} {says}" for verb, says in VERBS.items())}

  tx-lightning fit --config experiments/quickstart/translation.yaml
  tx-lightning fit --config a.yaml --config b.yaml --trainer.max_epochs 3
  tx-lightning fit --resume runs/translation/2025-01-31_14-05-09
  tx-lightning VERB --help     every option of a verb
  tx-lightning --version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        args: The words after `tx-lightning`; those of the process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        return _print(USAGE)
    if words[0] == "--version":
        return _print(f"tx-lightning {__version__}\n")
    if words[0] not in VERBS:
        near = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        print(
            f"error: '{words[0]}' is not a verb; {hint}the verbs are {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return 2
    collecting = gc.isenabled()
    gc.disable()  # importing allocates much and frees nothing; collecting meanwhile costs a second
    try:
        from tx_lightning.commands import run
    finally:
        if collecting:
            gc.enable()
    if args is None:  # another program keeps its collector as it is
        gc.freeze()
    return run(words)


def _print(text: str) -> int:
    """Print a text and return the exit status."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What is left to be flushed has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
