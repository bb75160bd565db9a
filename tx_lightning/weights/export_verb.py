"""`tx-lightning export CHECKPOINT FOLDER`: a checkpoint becomes a folder for transformers."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError
from tx_lightning.runs import shown
from tx_lightning.trust import HELP, take_trust
from tx_lightning.weights.exporting import export_checkpoint

DESCRIPTION = """\
Write a checkpoint as a folder that transformers loads: config.json, generation_config.json,
model.safetensors and the files of the tokenizer. What was imported becomes what it was. What was
trained here becomes GPT-2, BERT, BART or Marian where the network is one of these, and is refused
otherwise. ct2-transformers-converter makes a CTranslate2 model of it. What the folder cannot say is
printed."""


def main(words: Sequence[str]) -> int:
    """Carry out the verb.

    Args:
        words: What follows `export`.
    """
    parser = ArgumentParser(
        prog="tx-lightning export", description=DESCRIPTION, exit_on_error=False
    )
    parser.add_argument("checkpoint", type=str, help="A checkpoint of fit, average or import.")
    parser.add_argument("folder", type=str, help="The folder to write; a new one.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    trust, words = take_trust(words)
    if not words:
        parser.print_help()
        return 2
    try:
        options = parser.parse_args(list(words))
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), words, parser)) from error
    folder = Path(options.folder)
    exported = export_checkpoint(options.checkpoint, folder, trust=trust.packages)
    print(exported.architecture, *exported.notes, shown(folder.absolute()), sep="\n")
    return 0
