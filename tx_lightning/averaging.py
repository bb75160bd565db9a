"""Checkpoint averaging: the mean of the last weights of a run, or the best, often beats each.

Vaswani et al. 2017, section 6.1, average the last 5 checkpoints of the base model.
"""

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import Tensor

from tx_lightning.checkpoints import (
    RECORD,
    CheckpointError,
    check_settings,
    read_checkpoint,
    require_finite,
    write_atomically,
)
from tx_lightning.diagnosis import explain
from tx_lightning.errors import ConfigurationError, did_you_mean
from tx_lightning.loggers import BEST
from tx_lightning.runs import CHECKPOINTS, shown
from tx_lightning.trust import HELP, take_trust

AVERAGED = "averaged"  # the entry that says what a checkpoint is the average of
DIGESTS = "averaged_weights"
# What training goes on from has no average.
_DROPPED = {
    "state_dict",
    "averaged_weights",
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
    step of the newest, and nothing to resume from. `checkpoint["averaged"]` lists files and steps,
    `checkpoint["averaged_weights"]` digests of their weights.

    Args:
        paths: The checkpoints, in any order.
        out: The file to write, none of them; its folder is made.

    Raises:
        CheckpointError: When there are none, one cannot be read or has diverged, or they are not of
            one model: settings, tokenizers, names, shapes and everything that is no float must
            agree.
    """
    if not paths:
        raise CheckpointError(f"{out}: there are no checkpoints to average")
    check_output(out, paths)
    first = newest = _finite(paths[0])
    sums = {name: _as_summand(value) for name, value in first["state_dict"].items()}
    steps, digests = [first["global_step"]], [digest(first["state_dict"])]
    for path in paths[1:]:
        checkpoint = _finite(path)
        _check_same_model(first, checkpoint, paths[0], path)
        digests.append(digest(checkpoint["state_dict"]))
        for name, value in checkpoint["state_dict"].items():
            if _is_averaged(value):
                sums[name] += value.detach()
        steps.append(checkpoint["global_step"])
        if checkpoint["global_step"] > newest["global_step"]:
            newest = checkpoint
    averaged = {name: value for name, value in newest.items() if name not in _DROPPED}
    averaged["state_dict"] = {
        name: (sums[name] / len(paths)).to(value.dtype) if _is_averaged(value) else value
        for name, value in first["state_dict"].items()
    }
    averaged[AVERAGED] = {"files": [Path(path).name for path in paths], "steps": steps}
    averaged[DIGESTS] = digests
    write_atomically(averaged, out)


def check_output(out: str | Path, paths: Iterable[str | Path]) -> None:
    """Refuse to write over a checkpoint that is averaged, by whatever name.

    Raises:
        CheckpointError: The output is one of them.
    """
    out = Path(out)
    for path in map(Path, paths):
        if os.path.realpath(out) == os.path.realpath(path) or (
            out.exists() and path.exists() and out.samefile(path)
        ):
            raise CheckpointError(
                f"{out} is one of the checkpoints to average and would be lost: write to another "
                "file with --output"
            )


def _finite(path: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    require_finite(checkpoint["state_dict"], f"checkpoint {path}")
    return checkpoint


def digest(weights: Mapping[str, Any]) -> str:
    """The SHA-256 of weights: equal for equal ones, whatever the file is called."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            flat = value.detach().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def distinct_checkpoints(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Leave out of some checkpoints what would count twice.

    That is a file with the weights of another one, such as last.ckpt, and an average of others
    that are given as well.

    Returns:
        Those that are left, in order, and for each of the others a line that says why.
    """
    read = [read_checkpoint(path, lazily=True) for path in paths]
    digests = [digest(checkpoint["state_dict"]) for checkpoint in read]
    kept: list[Path] = []
    left_out: list[str] = []
    for number, (path, checkpoint) in enumerate(zip(paths, read, strict=True)):
        same = digests.index(digests[number])
        if same < number:
            left_out.append(f"{path}: it has the weights of {paths[same]}")
        elif parts := _parts(number, checkpoint, paths, digests):
            left_out.append(f"{path}: it is an average of {', '.join(map(str, parts))} already")
        else:
            kept.append(path)
    return kept, left_out


def _parts(
    number: int, checkpoint: Mapping[str, Any], paths: Sequence[Path], digests: Sequence[str]
) -> list[Path]:
    """Those of some checkpoints that one of them is an average of."""
    if AVERAGED not in checkpoint:
        return []
    if DIGESTS in checkpoint:
        of = set(checkpoint[DIGESTS]) - {digests[number]}  # of one file it has the same weights
        return [other for other, weights in zip(paths, digests, strict=True) if weights in of]
    # An older average knows the names of its parts alone, which were beside it.
    path = paths[number]
    beside = {os.path.realpath(path.parent / name) for name in checkpoint[AVERAGED]["files"]}
    return [other for other in paths if other != path and os.path.realpath(other) in beside]


def last_checkpoints(folder: Path, n: int) -> list[Path]:
    """Return the n newest checkpoints in a folder, or all when there are fewer, oldest first.

    Of files of the same step only one counts; averages do not, nor does one with a score of nan.

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
        if math.isfinite(metrics.get(metric, math.nan))
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
        diverged = [name for name, value in metrics.items() if math.isnan(value)]
        if diverged:
            print(f"passed over: {shown(path)}: its {diverged[0]} is nan", file=sys.stderr)
            continue
        if step not in found or (metrics and not found[step][2]):
            found[step] = (step, path, metrics)
    return [found[step] for step in sorted(found)]


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_summand(value: Any) -> Any:
    return value.detach().to(torch.float64, copy=True) if _is_averaged(value) else value


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
    parser = _parser()
    trust, words = take_trust(words)
    if not words:
        parser.print_help()
        return 2
    try:
        options = parser.parse_args(list(words))
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), words, parser)) from error
    given = [Path(path) for path in options.paths]
    paths = _chosen(options, given) if given[0].is_dir() else _listed(options, given)
    for path in paths:
        check_settings(path, trust)
    out = Path(options.output) if options.output else paths[0].parent / f"{AVERAGED}.ckpt"
    average_checkpoints(paths, out)
    print(f"averaged {', '.join(path.name for path in paths)}")
    print(shown(out.absolute()))
    return 0


def _chosen(options: Namespace, given: Sequence[Path]) -> list[Path]:
    """The checkpoints of a run folder that --last or --best choose."""
    if len(given) > 1:
        raise ConfigurationError(
            f"{given[0]} is a folder, so it has to be alone: give one run folder, or files"
        )
    if options.last is not None and options.best is not None:
        raise ConfigurationError("--last and --best exclude each other: give one")
    if options.metric is not None and options.best is None:
        raise ConfigurationError(f"--metric {options.metric} says what --best goes by: give --best")
    n = next((n for n in (options.last, options.best) if n is not None), 10)
    if n < 1:
        raise ConfigurationError(f"{n} checkpoints cannot be averaged: give at least 1")
    below = given[0] / CHECKPOINTS
    folder = below if below.is_dir() else given[0]
    if options.best is None:
        paths, scored = last_checkpoints(folder, n), ""
    else:
        metric = options.metric or "val/bleu"
        paths, scored = best_checkpoints(folder, n, metric), f" with {metric}"
    if not paths:
        raise CheckpointError(f"{folder} has no checkpoints{scored} to average")
    if options.output:
        check_output(options.output, paths)
    return paths


def _listed(options: Namespace, given: Sequence[Path]) -> list[Path]:
    """The given files, but for those that would count twice."""
    if any(value is not None for value in (options.last, options.best, options.metric)):
        raise ConfigurationError("--last and --best choose in a run folder: give one, and no files")
    if options.output:
        check_output(options.output, given)
    paths, left_out = distinct_checkpoints(given)
    for line in left_out:
        print(f"left out {line}", file=sys.stderr)
    return paths


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tx-lightning average", description="Average checkpoints.", exit_on_error=False
    )
    parser.add_argument(
        "paths",
        type=str,
        nargs="+",
        help="A run folder, or the checkpoints to average, of which none counts twice.",
    )
    parser.add_argument(
        "--last",
        type=int | None,
        default=None,
        help="In a run folder, average the last N (default 10).",
    )
    parser.add_argument(
        "--best", type=int | None, default=None, help="In a run folder, average the best N."
    )
    parser.add_argument(
        "--metric",
        type=str | None,
        default=None,
        help="The metric that --best goes by (default val/bleu).",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="The file to write; averaged.ckpt beside the first checkpoint by default.",
    )
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    return parser
