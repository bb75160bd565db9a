"""Each verb to the module that carries it out, and what goes wrong to one line and a status."""

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tx_lightning
from tx_lightning.callbacks.graceful_stop import Interrupted
from tx_lightning.cli import CommandLine, process_restored
from tx_lightning.errors import ConfigurationError, one_line


@process_restored()
def run(words: Sequence[str]) -> int:
    """Carry out a command and return its exit status: 1 for an error, 2 for a wrong configuration.

    Args:
        words: The words of the command, the verb first.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a class of one's own in the folder where one works
    try:
        return _dispatch(words)
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        refused = isinstance(error, ConfigurationError)
        line = str(error) if refused else one_line(error)
        if line is None:
            raise
        if isinstance(error, OSError) and _is_of_print(error):
            line = f"standard output cannot be written: {error.strerror}"
        print(f"error: {line}", file=sys.stderr)
        return 2 if refused else 1


def _is_of_print(error: OSError) -> bool:
    """Whether it came up in printing a result; such an error has no name of a file."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return error.filename is None and line.startswith("print(") and "stderr" not in line


def _dispatch(words: Sequence[str]) -> int:
    if words[0] == "translate":
        from tx_lightning.translate import main

        return main(words[1:])
    if words[0] == "generate":
        from tx_lightning.generate import main

        return main(words[1:])
    if words[0] == "classify":
        from tx_lightning.classify import main

        return main(words[1:])
    if words[0] == "average":
        from tx_lightning.averaging import main

        return main(words[1:])
    if words[0] == "reproduce":
        from tx_lightning import reproduce

        import_classes()
        return reproduce.main(words[1:], CommandLine)
    if words[0] == "import":
        from tx_lightning.weights.import_verb import main

        return main(words[1:])
    if words[0] == "export":
        from tx_lightning.weights.export_verb import main

        return main(words[1:])
    import_classes()
    CommandLine(words)
    return 0


def import_classes() -> None:
    """Import every module of the package, so that its classes are known by their short names."""
    for module in pkgutil.walk_packages(tx_lightning.__path__, "tx_lightning."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
