"""Checkpoints: written whole or not at all, read with one clear line when they are not ours.

A checkpoint is enough: besides Lightning's own entries it holds `checkpoint["tx_lightning"]`, made
by `checkpoint_record`, from which `load_task` rebuilds the task with its tokenizers. It consists of
tensors and plain containers only and loads with `weights_only=True`.
"""

import contextlib
import errno
import os
import platform
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from torch import Tensor

from tx_lightning import __version__
from tx_lightning.configuration import upgraded_settings
from tx_lightning.entries import WrongEntry, check_entries
from tx_lightning.settings import approve_task
from tx_lightning.trust import Trust
from tx_lightning.walking import Approved, SettingsError

FORMAT = 2  # 1 is read as well
RECORD = "tx_lightning"
_ARCHIVE = b"PK\x03\x04"  # how the archive begins that a checkpoint is
NOTHING: Mapping[str, Any] = MappingProxyType({})


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
    undescribed: Mapping[str, str] = NOTHING,
) -> dict[str, Any]:
    """Return what a task writes to `checkpoint["tx_lightning"]` so that the file is enough.

    Args:
        settings: `{"class_path": ..., "init_args": ...}` of the task; None for a task that cannot
            be written down, and has to be rebuilt by hand.
        tokenizers: `Tokenizers.to_dict()`; None for a task that has none.
        labels: Those of a classifier, class i at place i.
        n_texts: How many texts a classifier takes at once, 1 or 2.
        undescribed: Arguments of the task that settings cannot hold, each with the reason.
    """
    record = {
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
    return record | ({"undescribed": dict(undescribed)} if undescribed else {})


def read_checkpoint(
    path: str | Path, *, lazily: bool = False, map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a checkpoint of this package.

    Args:
        path: The file.
        lazily: Map the tensors from the file, so that only what is used is read.
        map_location: Where the tensors go, as in `torch.load`.

    Raises:
        CheckpointError: When the file is missing, damaged, or not one of ours, whatever it holds.
    """
    path = Path(path)
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about files that are not ours
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=lazily)
    except PermissionError:
        raise
    except Exception as error:  # the reader was not made for junk, and fails in many ways
        whole = "it is damaged, or holds Python objects besides tensors and so is not ours"
        why = whole if _is_whole(path) else "it is truncated"
        raise CheckpointError(f"checkpoint {path} cannot be read: {why}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': it is not a checkpoint")
    record = checkpoint.get(RECORD)
    if not isinstance(record, dict):
        raise CheckpointError(
            f"checkpoint {path} has no '{RECORD}' entry: it was not written by tx_lightning"
        )
    try:
        _check_format(record)
        check_entries(checkpoint, RECORD)
    except WrongEntry as error:
        raise CheckpointError(f"checkpoint {path} {error}") from None
    if record["format"] == 1:
        with contextlib.suppress(RecursionError):  # what is nested so deeply is refused when used
            record["task"] = upgraded_settings(record["task"])
    return checkpoint


def _check_file(path: Path) -> None:
    """Refuse what is no file, or does not begin as a checkpoint.

    Raises:
        CheckpointError: It is refused.
    """
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder, not one of ours")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise CheckpointError(f"checkpoint {path}: there is no such file{there}")
    with path.open("rb") as file:
        begun = file.read(len(_ARCHIVE))
    if not _ARCHIVE.startswith(begun):
        raise CheckpointError(f"checkpoint {path} cannot be read: it is not a checkpoint")


def _is_whole(path: Path) -> bool:
    """Whether an archive has its end."""
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # a damaged end
        return True


def _check_format(record: Mapping[str, Any]) -> None:
    """Refuse a format of another version.

    Raises:
        WrongEntry: It is one, or there is none.
    """
    found = record.get("format")
    if type(found) is not int:
        raise WrongEntry(f"is damaged: '{RECORD}.format' is not a number")
    if found not in (1, FORMAT):
        versions = record.get("versions")
        writer = versions.get("tx_lightning") if isinstance(versions, dict) else None
        raise WrongEntry(
            f"has format {found}, this version reads formats 1 to {FORMAT}: "
            f"use tx_lightning {writer}, which wrote it"
        )


def require_finite(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse weights that have diverged.

    Args:
        tensors: Weights by name.
        where: What they are of, for the error.

    Raises:
        CheckpointError: One of them has such a value.
    """
    if found := not_finite(tensors):
        raise CheckpointError(
            f"{where}: {found}, so the training had diverged; use a checkpoint from before"
        )


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """Say which of some tensors has values that are not finite, or too large for float32."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        values = value if value.is_complex() else value.float()
        if n := int((~torch.isfinite(values)).sum()):
            return f"{name} has {n:,} of {value.numel():,} values that are not finite"
    return None


def settings_of(checkpoint: Mapping[str, Any], path: str | Path, trust: Trust) -> Approved:
    """The settings of the task in a checkpoint, once they are found to be harmless.

    Args:
        checkpoint: As `read_checkpoint` gives it.
        path: Its file.
        trust: The user's consent.

    Raises:
        CheckpointError: When there are none, or they name what may not be built.
    """
    record = checkpoint[RECORD]
    if record["task"] is None:
        raise CheckpointError(f"checkpoint {path} has no model settings: {_unsettled(record)}")
    try:
        return approve_task(record["task"], trust, f"checkpoint {path}")
    except SettingsError as error:
        raise CheckpointError(str(error)) from None


def check_settings(path: str | Path, trust: Trust) -> None:
    """Refuse a checkpoint whose settings name what may not be built, if it has settings.

    Args:
        path: The file.
        trust: The user's consent.

    Raises:
        CheckpointError: It is refused, or cannot be read.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    if checkpoint[RECORD]["task"] is not None:
        settings_of(checkpoint, path, trust)


def _unsettled(record: Mapping[str, Any]) -> str:
    """Why a record has no settings, and what to do about it."""
    reasons = [
        f"{name or 'the class'} is {why}" for name, why in record.get("undescribed", {}).items()
    ]
    if not reasons:
        return "its task was built by hand, with classes that do not keep their arguments"
    return (
        f"{', '.join(reasons)}, which a file cannot hold; build the task with classes of modules "
        "and functools.partial of them, as functools.partial(EncoderDecoder, d_model=128)"
    )


def load_task(path: str | Path, *, trust: str | Iterable[str] = ()) -> LightningModule:
    """Rebuild the task of a checkpoint, with weights and tokenizers, in evaluation mode.

    Only classes of tx_lightning, torch and Lightning are built; those of other packages where
    they are trusted. When `Trainer.fit` gets the task, it trains as usual, with dropout.

    Args:
        path: The file.
        trust: Packages whose classes the file may name as well, such as "my_package".

    Raises:
        CheckpointError: When the file is not ours, lacks the task's settings or tokenizers, names
            classes that are not trusted, or when its weights do not fit the classes of this
            version.
    """
    from tx_lightning.rebuilding import rebuild  # which reads checkpoints

    return rebuild(path, LightningModule, Trust.of(trust))


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

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, which never runs code."""
        if weights_only is False:
            raise ValueError("weights_only=False: checkpoints hold nothing that would need it")
        return super().load_checkpoint(path, map_location, weights_only=True)
