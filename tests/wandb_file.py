"""What the `.wandb` files of an offline run say, as one."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tx_lightning.wandb_files import records, segments


@dataclass
class WandbFile:
    """What a run told W&B.

    Attributes:
        run_id: The id under which it would be uploaded.
        job_type: The verb.
        config: The configuration, nested.
        history: The rows of metrics, in order.
        summary: The summary, the last value of each key.
        metrics: Definitions of metrics, by name.
        files: Names of uploaded files, as images and tables.
    """

    run_id: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def read(run_folder: Path, *, killed: bool = False) -> WandbFile:
    """The offline runs below a run folder, as one; a resumed run has several files.

    Args:
        run_folder: The folder that holds wandb/.
        killed: Whether the process was killed; of others the end is waited for, since the service
            of wandb writes it after `finish` has returned.
    """
    paths = segments(run_folder)
    assert paths, f"no .wandb file in {run_folder}"
    deadline = time.monotonic() + 30
    while not killed and not all(is_complete(path) for path in paths):
        assert time.monotonic() < deadline, f"a run in {run_folder} has not ended"
        time.sleep(0.05)
    run = WandbFile()
    for path in paths:
        for _, record in records(path):
            _add(run, record)
    return run


def is_complete(path: Path) -> bool:
    """Whether the service of wandb has written the end of a run."""
    return any(record.WhichOneof("record_type") == "exit" for _, record in records(path))


def _add(run: WandbFile, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.run_id, run.job_type = record.run.run_id, record.run.job_type
        _update(run.config, record.run.config.update)
    elif kind == "config":
        _update(run.config, record.config.update)
    elif kind == "history":
        row: dict[str, Any] = {}
        _update(row, record.history.item)
        run.history.append(row)
    elif kind == "summary":
        _update(run.summary, record.summary.update)
    elif kind == "metric":
        run.metrics[record.metric.name] = record.metric
    elif kind == "files":
        run.files += [file.path for file in record.files.files]


def _update(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = into
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
