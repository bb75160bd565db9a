"""`tx-lightning reproduce`: run a run again, and say whether the same came out of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from tx_lightning.callbacks.throughput import TIMINGS
from tx_lightning.checkpoints import read_checkpoint, resumable_checkpoints
from tx_lightning.errors import ConfigurationError
from tx_lightning.loggers import read_metrics
from tx_lightning.provenance import FILE, differing, read_starts
from tx_lightning.runs import CHECKPOINTS, CONFIG, METRICS, is_first_process, run_folder, shown
from tx_lightning.settings import check_run
from tx_lightning.strict_json import to_json
from tx_lightning.text_verbs import parse_words
from tx_lightning.trust import HELP, take_trust, trust_words

_SHOWN = 10  # differences of the inputs that are listed
_LONGEST = 60  # characters of a value in that list

History = dict[tuple[int, str], Any]


def main(words: Sequence[str], command: Callable[..., Any]) -> int:
    """Carry out `tx-lightning reproduce`; 0 where all came out the same, 1 where anything differs.

    Args:
        words: What follows `reproduce`.
        command: Carries out the words of another command, in which `foreign` is a configuration
            that may be of others.
    """
    parser = ArgumentParser(
        prog="tx-lightning reproduce",
        description="Run a run again and compare metrics and weights, bit by bit.",
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="The folder of a run of fit.")
    parser.add_argument("--trust", type=str, action="append", help=HELP)
    trust, words = take_trust(words)
    if not words:
        parser.print_help()
        return 2
    run = Path(parse_words(parser, words).run)
    if not (run / CONFIG).is_file():
        raise ConfigurationError(f"{run} has no {CONFIG}, so it is no run folder")
    check_run(run / CONFIG, trust)
    if not checkpoints(run):
        raise ConfigurationError(
            f"{run} has no checkpoint of a training run: there is nothing to compare with"
        )
    again = run_folder(run.absolute().parent)
    config = ["--config", str(run / CONFIG), "--trainer.default_root_dir", str(again)]
    command(["fit", *config, *trust_words(trust.packages).split()], foreign=run / CONFIG)
    if not is_first_process():
        return 0
    report = compare(run, again)
    for line in report:
        print(line, flush=True)
    return 0 if report.same else 1


class Report(list[str]):
    """Lines for the user.

    Attributes:
        same: Whether the two runs have the same metrics and weights.
    """

    same: bool = True


def compare(run: Path, again: Path) -> Report:
    """Compare two run folders: metrics, weights and, where these differ, the inputs.

    Metrics of time are left out. Where one run went on longer, the steps that both have count.

    Args:
        run: The folder of the first run.
        again: That of the second.
    """
    report = Report()
    _compare_metrics(history(run), history(again), report)
    _compare_weights(run, again, report)
    if report.same:
        report.append(f"reproduced: {shown(run.absolute())} and {shown(again)} are the same")
        return report
    report.append(f"not reproduced: {shown(run.absolute())} and {shown(again)} differ")
    _compare_inputs(run, again, report)
    return report


def history(run: Path) -> History:
    """The metrics of a run by step and name, but those of time."""
    return {
        (row["step"] or 0, name): value
        for row in read_metrics(run / METRICS)
        for name, value in row.items()
        if name not in ("step", "time", *TIMINGS)
    }


def _compare_metrics(ours: History, theirs: History, report: Report) -> None:
    last = min(max((step for step, _ in found), default=0) for found in (ours, theirs))
    keys = sorted(key for key in ours.keys() | theirs.keys() if key[0] <= last)
    unequal = [key for key in keys if not _equal(ours.get(key), theirs.get(key))]
    if not unequal:
        report.append(f"metrics: {len(keys)} values up to step {last}, all the same")
        return
    report.same = False
    step, name = unequal[0]
    before, after = (found.get((step, name), "nothing") for found in (ours, theirs))
    report.append(
        f"metrics: {len(unequal)} of {len(keys)} values up to step {last} differ, the first at "
        f"step {step}: {name} was {before}, is now {after}"
    )


def _equal(a: Any, b: Any) -> bool:
    return a == b or (_is_nan(a) and _is_nan(b))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run from which training can go on, by step; of a step the newest."""
    found, _ = resumable_checkpoints(run / CHECKPOINTS)
    return {step: path for step, _, path in sorted(found)}


def _compare_weights(run: Path, again: Path, report: Report) -> None:
    ours, theirs = checkpoints(run), checkpoints(again)
    common = ours.keys() & theirs.keys()
    if not common:
        report.same = False
        report.append(
            f"weights: no step has a checkpoint in both runs (steps {sorted(ours)} before, "
            f"{sorted(theirs)} now)"
        )
        return
    step = max(common)
    pairs = list(_tensors(ours[step], theirs[step]))
    unequal = [(name, a, b) for name, a, b in pairs if a is None or b is None or not _same(a, b)]
    if not unequal:
        report.append(f"weights: {len(pairs)} tensors at step {step}, all the same")
        return
    report.same = False
    name, a, b = unequal[0]
    how = ""
    if a is not None and b is not None and a.shape == b.shape:
        how = f" by up to {(a.double() - b.double()).abs().max().item():.3g}"
    report.append(
        f"weights: {len(unequal)} of {len(pairs)} tensors at step {step} differ, {name}{how}"
    )


def _tensors(one: Path, other: Path) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Weights and optimizer states of two checkpoints, by name."""
    found = [dict(_flat(read_checkpoint(path, lazily=True))) for path in (one, other)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        yield name, found[0].get(name), found[1].get(name)


def _flat(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield from checkpoint["state_dict"].items()
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for index, state in optimizer["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer {number}, parameter {index}, {key}", value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _compare_inputs(run: Path, again: Path, report: Report) -> None:
    before, after = read_starts(run), read_starts(again)
    if not before or not after:
        report.append(f"inputs: {shown(run.absolute())} has no {FILE}: they cannot be compared")
        return
    found = list(differing(before[0], after[0]))
    if not found:
        report.append("inputs: configuration, versions, hardware, code and data are the same")
    for name, a, b in found[:_SHOWN]:
        report.append(f"inputs: {name} was {_short(a)}, is now {_short(b)}")
    if len(found) > _SHOWN:
        report.append(f"inputs: {len(found) - _SHOWN} more differ")
    if len(before) > 1:
        names = ", ".join(name for name, _, _ in differing(before[0], before[-1]))
        report.append(f"inputs: the first run was resumed with others ({names})")


def _short(value: Any) -> str:
    text = to_json(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
