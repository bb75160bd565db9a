"""Checkpoints: written whole or not at all, read with one clear line when they are not ours.

A checkpoint is enough: besides Lightning's own entries it holds `checkpoint["tx_lightning"]`, made
by `checkpoint_record`, from which `load_task` rebuilds the task with its tokenizers. It consists of
tensors and plain containers only and loads with `weights_only=True`.
"""

import copy
import errno
import os
import platform
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from tx_lightning import __version__
from tx_lightning.configuration import ConfigurationParser, upgraded_settings

FORMAT = 2  # 1 is read as well
RECORD = "tx_lightning"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line that names the file."""


@runtime_checkable
class Rebuildable(Protocol):
    """A task that writes its settings into its checkpoints; the command line sets them."""

    settings: dict[str, Any] | None


def checkpoint_record(
    settings: dict[str, Any] | None,
    tokenizers: dict[str, str] | None,
    *,
    labels: list[str] | None = None,
    n_texts: int | None = None,
) -> dict[str, Any]:
    """Return what a task writes to `checkpoint["tx_lightning"]` so that the file is enough.

    Args:
        settings: `{"class_path": ..., "init_args": ...}` of the task as the command line resolved
            them; None for a task that was built by hand, which then has to be rebuilt by hand.
        tokenizers: `Tokenizers.to_dict()`; None for a task that has none.
        labels: Those of a classifier, class i at place i.
        n_texts: How many texts a classifier takes at once, 1 or 2.
    """
    return {
        "format": FORMAT,
        "task": settings,
        "tokenizers": tokenizers,
        "labels": labels,
        "n_texts": n_texts,
        "versions": {
            "tx_lightning": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": version("lightning"),
        },
    }


def read_checkpoint(path: str | Path, *, lazily: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this package on the CPU.

    Args:
        path: The file.
        lazily: Map the tensors from the file, so that only what is used is read.

    Raises:
        CheckpointError: When the file is missing, truncated, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise CheckpointError(f"checkpoint {path}: there is no such file{there}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_why(path)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': it is not a checkpoint")
    record = checkpoint.get(RECORD)
    if not isinstance(record, dict):
        raise CheckpointError(
            f"checkpoint {path} has no '{RECORD}' entry: it was not written by tx_lightning"
        )
    if record["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path} has format {record['format']}, this version reads formats 1 to "
            f"{FORMAT}: use tx_lightning {record['versions']['tx_lightning']}, which wrote it"
        )
    if record["format"] == 1:
        record["task"] = upgraded_settings(record["task"])
    return checkpoint


def _why(path: Path) -> str:
    """What is wrong with a file that torch could not load."""
    if zipfile.is_zipfile(path):
        return "it is damaged, or holds Python objects besides tensors and so is not ours"
    with path.open("rb") as file:
        begun = file.read(2) in (b"PK", b"")  # as the archive that a checkpoint is, or empty
    return "it is truncated" if begun else "it is not a checkpoint"


def load_task(path: str | Path) -> LightningModule:
    """Rebuild the task of a checkpoint, with weights and tokenizers, in evaluation mode.

    It imports the classes named in the checkpoint: load only files from people you trust.

    Raises:
        CheckpointError: When the file is not ours, lacks the task's settings or tokenizers, or
            when its weights do not fit the classes of this version.
    """
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD]
    if record["task"] is None:
        raise CheckpointError(
            f"checkpoint {path} has no model settings: it was not written by `tx-lightning fit`"
        )
    if not record["tokenizers"]:
        raise CheckpointError(f"checkpoint {path} has no tokenizers: it cannot read or write text")
    task = _instantiate(record["task"], path, record["versions"])
    task.on_load_checkpoint(checkpoint)
    if isinstance(task, Rebuildable):
        task.settings = record["task"]
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(
            f"checkpoint {path}: the weights do not fit {record['task']['class_path']}: {lines[0]}"
        ) from error
    return task.eval()


def _instantiate(
    settings: dict[str, Any], path: str | Path, versions: Mapping[str, str]
) -> LightningModule:
    parser = ConfigurationParser()
    parser.add_subclass_arguments(LightningModule, "task", fail_untyped=False)
    try:
        # A copy: parsing leaves objects of its own in the lists of what it is given.
        task = parser.instantiate(parser.parse_object({"task": copy.deepcopy(settings)})).task
    except ArgumentError as error:
        raise CheckpointError(
            f"checkpoint {path} was written by tx_lightning {versions['tx_lightning']}, and its "
            f"settings are not accepted by {__version__}: {' '.join(str(error).split())}"
        ) from error
    assert isinstance(task, LightningModule)
    return task


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a folder from which training can go on, None where there is none.

    The newest is the one of the highest step, and of these the file written last. Files that
    cannot be read are passed over, and said.

    Raises:
        CheckpointError: When there are checkpoints and none of them loads.
    """
    found, faults = resumable_checkpoints(folder)
    if faults and not found:
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints in {folder} can be loaded, so the run is not "
            f"started again from the beginning; the last of them: {faults[-1]}"
        )
    for fault in faults:
        print(f"passed over: {fault}", file=sys.stderr, flush=True)
    return max(found)[2] if found else None


def resumable_checkpoints(
    folder: Path,
) -> tuple[list[tuple[int, int, Path]], list[CheckpointError]]:
    """The checkpoints below a folder from which training can go on, and what those are that fail.

    Each as (step, time of writing, file).
    """
    found: list[tuple[int, int, Path]] = []
    faults: list[CheckpointError] = []
    for path in sorted(folder.rglob("*.ckpt")):
        if path.is_dir():
            faults.append(CheckpointError(f"checkpoint {path} is a folder, not one of ours"))
            continue
        try:
            checkpoint = read_checkpoint(path, lazily=True)
        except CheckpointError as error:
            faults.append(error)
            continue
        if "optimizer_states" in checkpoint:
            found.append((checkpoint["global_step"], path.stat().st_mtime_ns, path))
    return found, faults


def write_atomically(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that the name holds, at every moment, a whole file or the previous one.

    Raises:
        CheckpointError: When it cannot be written, as on a full disk.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a file would take the place of a device
        raise CheckpointError(f"checkpoint {path} could not be written: there is something else")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint {path} could not be written: {why}; earlier checkpoints are untouched"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files through `write_atomically`.

    Lightning's own writer goes through the temporary folder of the system, and from there to
    another disk it copies over the previous file: a kill meanwhile leaves neither.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are local files")
        write_atomically(checkpoint, path)
