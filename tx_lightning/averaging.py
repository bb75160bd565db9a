"""Checkpoint averaging: the mean of the last weights of a run, or the best, often beats each.

Vaswani et al. 2017, section 6.1, average the last 5 checkpoints of the base model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from tx_lightning.checkpoints import RECORD, CheckpointError, read_checkpoint, write_atomically
from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError, did_you_mean
from tx_lightning.loggers import BEST
from tx_lightning.runs import CHECKPOINTS, shown

AVERAGED = "averaged"  # the entry that says what a checkpoint is the average of
# What training goes on from has no average.
_DROPPED = {
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "metrics",
    "metrics_size",
    "sizes",
    "wandb_rows",
    "train_sums",
    "logged",
    "current_model_state",
    "averaging_state",
}


def average_checkpoints(paths: Sequence[str | Path], out: str | Path) -> None:
    """Write the mean of the weights of some checkpoints of one model.

    Sums are float64; the result has the dtypes, settings and tokenizers of the checkpoints, the
    step of the newest, and nothing to resume from. `checkpoint["averaged"]` lists files and steps.

    Args:
        paths: The checkpoints, in any order.
        out: The file to write; its folder is made.

    Raises:
        CheckpointError: When there are none, one cannot be read, or they are not of one model:
            settings, tokenizers, names, shapes and everything that is no float must agree.
    """
    if not paths:
        raise CheckpointError(f"{out}: there are no checkpoints to average")
    first = newest = read_checkpoint(paths[0])
    sums = {name: _as_summand(value) for name, value in first["state_dict"].items()}
    steps = [first["global_step"]]
    for path in paths[1:]:
        checkpoint = read_checkpoint(path)
        _check_same_model(first, checkpoint, paths[0], path)
        for name, value in checkpoint["state_dict"].items():
            if _is_averaged(value):
                sums[name] += value
        steps.append(checkpoint["global_step"])
        if checkpoint["global_step"] > newest["global_step"]:
            newest = checkpoint
    averaged = {name: value for name, value in newest.items() if name not in _DROPPED}
    averaged["state_dict"] = {
        name: (sums[name] / len(paths)).to(value.dtype) if _is_averaged(value) else value
        for name, value in first["state_dict"].items()
    }
    averaged[AVERAGED] = {"files": [Path(path).name for path in paths], "steps": steps}
    write_atomically(averaged, out)


def last_checkpoints(folder: Path, n: int) -> list[Path]:
    """Return the n newest checkpoints in a folder, or all when there are fewer, oldest first.

    Of files of the same step only one counts, and averages do not.

    Args:
        folder: A folder of checkpoints.
        n: How many.
    """
    return [path for _, path, _ in _candidates(folder)[-n:]]


def best_checkpoints(folder: Path, n: int, metric: str = "val/bleu") -> list[Path]:
    """Return the n checkpoints in a folder that scored best, or all when there are fewer.

    Only checkpoints written right after a validation have scores.

    Args:
        folder: A folder of checkpoints.
        n: How many.
        metric: A validation metric; whether more is better follows from its name.

    Raises:
        ConfigurationError: When it is not known whether more of the metric is better.
    """
    if metric not in BEST:
        raise ConfigurationError(
            f"{metric!r} cannot rank checkpoints{did_you_mean(metric, BEST)}; {', '.join(BEST)} can"
        )
    sign = -1 if BEST[metric] == "max" else 1
    scored = [
        (sign * metrics[metric], path)
        for _, path, metrics in _candidates(folder)
        if metric in metrics
    ]
    return [path for _, path in sorted(scored)[:n]]


def _candidates(folder: Path) -> list[tuple[int, Path, dict[str, float]]]:
    """Return (step, file, scores) of the checkpoints in a folder, one for each step, in order."""
    found: dict[int, tuple[int, Path, dict[str, float]]] = {}
    for path in sorted(path for path in folder.glob("*.ckpt") if path.is_file()):
        checkpoint = read_checkpoint(path, lazily=True)
        if AVERAGED in checkpoint:
            continue
        step, metrics = checkpoint["global_step"], checkpoint.get("metrics", {})
        if step not in found or (metrics and not found[step][2]):
            found[step] = (step, path, metrics)
    return [found[step] for step in sorted(found)]


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_summand(value: Any) -> Any:
    return value.to(torch.float64, copy=True) if _is_averaged(value) else value


def _check_same_model(
    first: dict[str, Any], other: dict[str, Any], first_path: str | Path, path: str | Path
) -> None:
    """Refuse checkpoints whose average would mean nothing."""
    differs = f"checkpoints {first_path} and {path} cannot be averaged: they differ in"
    entries = {
        "task": "the settings of the model",
        "tokenizers": "the tokenizers",
        "labels": "the labels",
    }
    for entry, name in entries.items():
        if first[RECORD].get(entry) != other[RECORD].get(entry):
            raise CheckpointError(f"{differs} {name}")
    ours, theirs = first["state_dict"], other["state_dict"]
    if ours.keys() != theirs.keys():
        names = ", ".join(sorted(ours.keys() ^ theirs.keys())[:3])
        raise CheckpointError(f"{differs} the names of their weights ({names})")
    for name, value in ours.items():
        if _is_averaged(value) and _is_averaged(theirs[name]):
            if value.shape != theirs[name].shape:
                raise CheckpointError(f"{differs} the shape of {name}")
        elif not _equal(value, theirs[name]):
            raise CheckpointError(f"{differs} {name}, which is no float and has no average")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def main(words: Sequence[str]) -> int:
    """Carry out `tx-lightning average`.

    Args:
        words: What follows `average`.
    """
    parser = ArgumentParser(
        prog="tx-lightning average", description="Average checkpoints.", exit_on_error=False
    )
    parser.add_argument(
        "paths", type=str, nargs="+", help="A run folder, or the checkpoints to average."
    )
    parser.add_argument(
        "--last", type=int | None, default=None, help="In a run folder, take the last so many: 10."
    )
    parser.add_argument(
        "--best", type=int | None, default=None, help="In a run folder, take the best so many."
    )
    parser.add_argument("--metric", type=str, default="val/bleu", help="What --best goes by.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="The file to write; averaged.ckpt beside the first checkpoint by default.",
    )
    if not words:
        parser.print_help()
        return 2
    try:
        options = parser.parse_args(list(words))
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), words, parser)) from error
    paths = [Path(path) for path in options.paths]
    if options.last is not None and options.best is not None:
        raise ConfigurationError("--last and --best exclude each other: give one")
    chosen = [n for n in (options.last, options.best) if n is not None]
    if chosen and (len(paths) > 1 or not paths[0].is_dir()):
        raise ConfigurationError("--last and --best choose in a run folder: give one, and no files")
    if paths[0].is_dir():
        n = chosen[0] if chosen else 10
        if n < 1:
            raise ConfigurationError(f"{n} checkpoints cannot be averaged: give at least 1")
        below = paths[0] / CHECKPOINTS
        folder = below if below.is_dir() else paths[0]
        if options.best is not None:
            paths = best_checkpoints(folder, n, options.metric)
        else:
            paths = last_checkpoints(folder, n)
        if not paths:
            scored = f" with {options.metric}" if options.best is not None else ""
            raise CheckpointError(f"{folder} has no checkpoints{scored} to average")
    out = Path(options.output) if options.output else paths[0].parent / f"{AVERAGED}.ckpt"
    average_checkpoints(paths, out)
    print(f"averaged {', '.join(path.name for path in paths)}")
    print(shown(out.absolute()))
    return 0
