"""`tx-lightning import FOLDER_OR_NAME --output FILE`: weights of others become a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError
from tx_lightning.runs import shown
from tx_lightning.trust import HELP, take_trust
from tx_lightning.weights.importing import import_weights

DESCRIPTION = """\
Make a checkpoint of a folder of Hugging Face, or of a model of its hub: GPT-2 becomes a language
model, BERT a masked language model, a classifier or a tagger, BART and Marian become translation.
The checkpoint has network, weights, tokenizers and labels, so that generate, classify and translate
need nothing else, and training can start from it."""


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `import`.
    """
    parser = _parser()
    trust, words = take_trust(words)
    if not words:
        parser.print_help()
        return 2
    try:
        options = parser.parse_args(list(words))
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), words, parser)) from error
    output = Path(options.output)
    imported = import_weights(
        options.source,
        output,
        task=options.task,
        n_texts=options.n_texts,
        trust=trust.packages,
    )
    print(
        f"{imported.architecture} of {imported.parameters:,} parameters, as {imported.task}",
        *imported.notes,
        shown(output.absolute()),
        sep="\n",
    )
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tx-lightning import", description=DESCRIPTION, exit_on_error=False
    )
    parser.add_argument(
        "source",
        type=str,
        help="A folder with config.json, model.safetensors or pytorch_model.bin, and tokenizer; or "
        "the name of a model of the hub, such as openai-community/gpt2.",
    )
    parser.add_argument("--output", type=str, required=True, help="The checkpoint to write.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="What to make of a BERT that is to get another head, or has none: "
        "MaskedLanguageModeling, Classification or Tagging.",
    )
    parser.add_argument(
        "--n_texts",
        type=Literal[1, 2],
        default=1,
        help="How many texts a classifier takes at once: 2 for one trained on pairs.",
    )
    return parser
