"""Tasks from checkpoints, and the settings of tasks for checkpoints."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tx_lightning import __version__
from tx_lightning.building import build, completed
from tx_lightning.checkpoints import (
    NOTHING,
    RECORD,
    CheckpointError,
    Rebuildable,
    read_checkpoint,
    settings_of,
)
from tx_lightning.described import description_of
from tx_lightning.errors import did_you_mean
from tx_lightning.places import names_of, parameters_of
from tx_lightning.trust import Trust
from tx_lightning.walking import Approved

M = TypeVar("M", bound=LightningModule)


def described_settings(
    task: LightningModule, *, without: Iterable[str]
) -> tuple[dict[str, Any] | None, Mapping[str, str]]:
    """The settings of a task that was built in Python, from what it was built with.

    Args:
        task: Of a class that keeps its arguments.
        without: Arguments that matter in training only: where one of these cannot be written down,
            it is left at its default.

    Returns:
        The settings, None where they cannot be written down; and what cannot, with the reasons.
    """
    description = description_of(task)
    if description is None:
        return None, NOTHING
    missing = description.missing
    needed = {name: why for name, why in missing.items() if name.partition(".")[0] not in without}
    if needed:
        return None, needed
    arguments = {
        name: value
        for name, value in description.settings["init_args"].items()
        if name not in {place.partition(".")[0] for place in missing}
    }
    try:
        return completed(description.settings | {"init_args": arguments}), missing
    except (ArgumentError, ValueError, TypeError) as error:
        return None, {"": " ".join(str(error).split())}


def saved_location(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Where a tensor goes by default: where it was saved, or to the CPU for want of the device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return None if there.get(location.partition(":")[0], True) else storage.cpu()


def rebuild(
    path: str | Path,
    kind: type[M],
    trust: Trust,
    *,
    map_location: Any = "cpu",
    strict: bool | None = None,
    changed: Mapping[str, Any] = NOTHING,
) -> M:
    """Rebuild the task of a checkpoint, in evaluation mode.

    Args:
        path: The file.
        kind: The class of which the task must be.
        trust: The user's consent.
        map_location: Where the tensors go, as in `torch.load`.
        strict: Whether all weights of task and file must have a partner; None: as
            `LightningModule.strict_loading` says.
        changed: Arguments of the task that replace those in the file.

    Raises:
        CheckpointError: As `load_task` does; or the task is of another class.
    """
    checkpoint = read_checkpoint(path, map_location=map_location)
    record = checkpoint[RECORD]
    if record["task"] is not None and not record["tokenizers"]:
        raise CheckpointError(f"checkpoint {path} has no tokenizers: it cannot read or write text")
    approved = settings_of(checkpoint, path, trust.naming(*names_of(kind)))
    name = approved.settings["class_path"]
    found = approved.trust.find(name)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise CheckpointError(f"checkpoint {path} holds a {name}, not a {kind.__name__}")
    _check_arguments(found, changed)
    with _no_larger_than(checkpoint["state_dict"]):
        task = _build(approved, path, record["versions"], changed)
    meta = [name for name, p in task.named_parameters() if p.is_meta]
    if meta:
        raise CheckpointError(f"checkpoint {path}: its settings build {meta[0]} without values")
    _restore(task, checkpoint, path, strict, name)
    if isinstance(task, Rebuildable):
        task.settings = _settings_with(approved, task, changed)
    assert isinstance(task, kind)
    tensors = (t for t in checkpoint["state_dict"].values() if isinstance(t, Tensor))
    return task.to(next(tensors, torch.empty(0)).device).eval()


def _settings_with(
    approved: Approved, task: LightningModule, changed: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The settings of a task of which some arguments were replaced; None where they have none."""
    settings: dict[str, Any] = copy.deepcopy(approved.settings)
    if not changed:
        return settings
    description = description_of(task)
    described = {} if description is None else description.settings["init_args"]
    if not changed.keys() <= described.keys():
        return None
    settings["init_args"] |= {name: described[name] for name in changed}
    return completed(settings)


def _check_arguments(kind: type, changed: Mapping[str, Any]) -> None:
    known = [parameter.name for parameter in parameters_of(kind)]
    for name in changed:
        if name not in known:
            raise CheckpointError(
                f"{kind.__name__} has no parameter '{name}'{did_you_mean(name, known)}"
            )


@contextlib.contextmanager
def _no_larger_than(weights: Mapping[str, Any]) -> Iterator[None]:
    """Stop building a network that is far larger than the weights for it.

    Damaged settings may ask for more layers than there is time or memory for.
    """
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    left = [1_000 + 4 * len(tensors), 1_000_000 + 4 * sum(value.numel() for value in tensors)]

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        left[0] -= 1
        left[1] -= parameter.numel()
        if min(left) < 0:
            raise ValueError("its settings ask for a network far larger than its weights")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _build(
    approved: Approved, path: str | Path, versions: Mapping[str, str], changed: Mapping[str, Any]
) -> LightningModule:
    where = f"checkpoint {path}"
    try:
        return build(approved, where, changed)
    except ArgumentError as error:
        raise CheckpointError(
            f"{where} was written by tx_lightning {versions.get('tx_lightning')}, and its "
            f"settings are not accepted by {__version__}: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:  # of any class that is built
        raise CheckpointError(f"{where}: its task cannot be built: {_reason(error)}") from error


def _restore(
    task: LightningModule,
    checkpoint: dict[str, Any],
    path: str | Path,
    strict: bool | None,
    name: str,
) -> None:
    """Put tokenizers and weights into a task, the class path of which is `name`."""
    try:
        task.on_load_checkpoint(checkpoint)
    except Exception as error:  # of whatever the entries lead to
        raise CheckpointError(f"checkpoint {path}: {_reason(error)}") from error
    strict = task.strict_loading if strict is None else strict
    try:
        left = task.load_state_dict(checkpoint["state_dict"], strict=strict)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        raise CheckpointError(f"checkpoint {path}: the weights do not fit {name}: {why}") from error
    for names, lack in ((left.missing_keys, "the file"), (left.unexpected_keys, "the task")):
        if names:
            rank_zero_warn(f"checkpoint {path}: {lack} has no {', '.join(names)}")


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"
