"""The metrics of a run as lines of JSON in its folder, and the best value of each metric."""

import contextlib
import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tx_lightning.runs import METRICS, shown
from tx_lightning.strict_json import to_json

# Whether more or less of a metric is better.
BEST = {
    "val/bleu": "max",
    "val/chrf": "max",
    "val/accuracy": "max",
    "val/macro_f1": "max",
    "val/loss": "min",
    "val/nll": "min",
    "val/perplexity": "min",
    "val/bits_per_byte": "min",
    "val/excess_nats": "min",
}
_NOT_METRICS = ("step", "time")


class MetricsError(ValueError):
    """Metrics cannot be written, as on a full disk."""


class MetricsFile(Logger):
    """Appends each row of metrics to `metrics.jsonl` in the run folder, at once.

    A row is `{"step": ..., "time": seconds since 1970, name: value, ...}`, and always valid JSON: a
    number that is not finite is null, which `read_metrics` returns as NaN. Tensors become numbers
    or lists, mappings become objects, and what JSON cannot hold becomes a string. The file is what
    a run can be judged by when everything else failed: a killed process loses no row, and a run
    that cannot write a row stops.

    Args:
        folder: The run folder.

    Raises:
        MetricsError: When a row cannot be written. The file keeps the rows before it, so that the
            run can be resumed once there is space.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / METRICS

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {str(name): plain(value) for name, value in metrics.items()}
        try:
            _append(self.path, f"{to_json(row)}\n".encode())
        except OSError as error:
            raise MetricsError(
                f"metrics cannot be written to {shown(self.path)}: {error.strerror}; solve this, "
                "then resume the run or start it again"
            ) from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """The configuration is in config.yaml beside the file."""


def _append(path: Path, line: bytes) -> None:
    """Append a whole line or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    size = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """Return a logged value as numbers, strings, lists and dictionaries."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.item() if math.prod(value.shape) == 1 else value.tolist())
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a kill tore; null is read as NaN."""
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [
        {name: value if name in _NOT_METRICS else _with_nan(value) for name, value in row.items()}
        for row in rows
    ]


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    return math.nan if value is None else value


def best_values(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best value of each metric of `BEST` in rows of metrics; what is not finite never is."""
    found: dict[str, float] = {}
    for row in metrics:
        for name in BEST.keys() & row.keys():
            value = plain(row[name])
            if isinstance(value, float) and math.isfinite(value):
                better = max if BEST[name] == "max" else min
                found[name] = better(found.get(name, value), value)
    return found
