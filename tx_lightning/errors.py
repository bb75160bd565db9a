"""Which errors are the user's to mend, and the one line that says how."""

import difflib
import os
import traceback
from collections.abc import Iterable
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

PACKAGE = Path(__file__).parent
STANDARD_LIBRARY = Path(os.__file__).parent
TRACEBACK = "TX_LIGHTNING_TRACEBACK"


class ConfigurationError(ValueError):
    """A configuration that contradicts itself, a checkpoint or a run folder, in one line."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    near = difflib.get_close_matches(wrong, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def one_line(error: BaseException) -> str | None:
    """The line to print for an error that the user can mend, None for a defect of the program.

    The user's are the ValueErrors that our own code raised, the OSErrors that it met, and what
    Lightning calls a misconfiguration. With TX_LIGHTNING_TRACEBACK=1 no error is shortened.
    """
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, OSError) and _raised_by_us(error, through=STANDARD_LIBRARY):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    ours = isinstance(error, ValueError) and _raised_by_us(error, through=None)
    if ours or isinstance(error, MisconfigurationException):
        return " ".join(str(error).split()) or type(error).__name__
    # The parser wraps what a class of a configuration refuses when it is built.
    return None if error.__cause__ is None else one_line(error.__cause__)


def _raised_by_us(error: BaseException, through: Path | None) -> bool:
    """Whether our code raised an error, itself or through the files below a folder."""
    if type(error).__module__.split(".")[0] == PACKAGE.name:
        return True
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if PACKAGE in file.parents:
            return True
        library = through is not None and through in file.parents
        if not (library and "site-packages" not in file.parts) and "<frozen" not in str(file):
            return False
    return False


def is_restoring(error: BaseException) -> bool:
    """Whether an error came up while Lightning took a checkpoint apart."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "checkpoint_connector.py" for frame in frames)
