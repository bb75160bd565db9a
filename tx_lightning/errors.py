"""Errors the user can fix, and the line that says how."""

import difflib
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

PACKAGE = Path(__file__).parent
STANDARD_LIBRARY = Path(os.__file__).parent
# They hand a configuration over to Lightning, and call it with nothing else.
HANDING_OVER = {PACKAGE / name for name in ("cli.py", "commands.py", "callbacks/due_validation.py")}
TRACEBACK = "TX_LIGHTNING_TRACEBACK"
_BUILDER = "default_class_instantiator"  # of jsonargparse
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|Storage size calculation overflowed")


class ConfigurationError(ValueError):
    """A configuration that contradicts itself, a checkpoint or a run folder, in one line."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    near = difflib.get_close_matches(wrong, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def one_line(error: BaseException) -> str | None:
    """The line to print for an error that the user can fix, None for a defect of the program.

    The user's are

    - the ValueErrors that our own code raised, and the OSErrors that it met;
    - what Lightning and Weights & Biases call a misuse, wherever they say it;
    - what a library's class refuses when it is built with the arguments of the configuration, as
      torch does with a negative learning rate;
    - what Lightning refuses once it has the configuration, and torch in weights that do not fit:
      no code of ours, and none of the user's, is between handing over and refusal;
    - memory that does not suffice.

    With TX_LIGHTNING_TRACEBACK=1 no error is shortened.
    """
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, OSError) and _raised_by_us(error, through=STANDARD_LIBRARY):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, ValueError) and _raised_by_us(error, through=None):
        return _joined(error)
    if isinstance(error, MisconfigurationException) or _package(type(error)) == "wandb":
        return _joined(error)
    if found := _found_by_library(error) or _out_of_memory(error):
        return found
    # The parser wraps what a class of a configuration refuses when it is built.
    return None if error.__cause__ is None else one_line(error.__cause__)


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _found_by_library(error: BaseException) -> str | None:
    """What a library found wrong in the configuration, None where it did not."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [Path(frame.f_code.co_filename) for frame in frames]
    own = [place for place, file in enumerate(files) if not _is_library(file)]
    begun = own[-1] + 1 if own else 0  # after the last line of ours, or of the user's
    for frame, file in zip(frames[begun:], files[begun:], strict=True):
        if file.parent.name == "jsonargparse" and frame.f_code.co_name == _BUILDER:
            return f"{frame.f_locals['class_type'].__name__}: {_joined(error)}"
    handed_over = begun > 0 and files[begun - 1] in HANDING_OVER
    if not handed_over or not isinstance(error, ValueError | RuntimeError | ImportError):
        return None
    kind, *faults = [line.strip() for line in str(error).splitlines()] or [""]
    if frames[-1].f_code.co_name == "load_state_dict" and faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        task = kind.rpartition(" ")[2].rstrip(":")
        return (
            f"the weights of the checkpoint do not fit {task}: {faults[0]}{more}; give the model "
            "section that it was trained with, or --pretrained to take the weights that fit"
        )
    return _joined(error) if "lightning" in files[-1].parts else None


def _is_library(file: Path) -> bool:
    if PACKAGE in file.parents:
        return False
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return bool(installed) or STANDARD_LIBRARY in file.parents or "<" in str(file)


def _out_of_memory(error: BaseException) -> str | None:
    said = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    if not (said or isinstance(error, MemoryError)):
        return None
    return (
        f"there is not enough memory: {_joined(error)}; take a smaller network or smaller batches"
    )


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
