"""The history of a run that was killed and resumed: no gap, no doubled step, one id."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import wandb_file
from tests.test_kills import MOMENTS, assert_same, die, finish, finish_here, start, written
from tx_lightning.loggers import MetricsFile, WandB, read_metrics
from tx_lightning.wandb_files import (
    UnknownFormat,
    has_numbers,
    history_row,
    keep_history,
    records,
    segments,
)

OFFLINE = {"class_path": "tx_lightning.loggers.WandB", "init_args": {"mode": "offline"}}
SAMPLES = {
    "class_path": "tx_lightning.callbacks.SampleLogger",
    "init_args": {"n": 1, "console": False},
}


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of all starts of a run."""
    return [
        history_row(record)
        for path in segments(folder)
        for _, record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def numbers(row: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Step and metrics of a row, of W&B or of metrics.jsonl."""
    step = row["trainer/global_step"] if "trainer/global_step" in row else row["step"]
    own = ("step", "time", "trainer/global_step")
    return step, {
        name: value for name, value in row.items() if name not in own and not name.startswith("_")
    }


def test_killed_and_resumed_the_history_is_that_of_an_untouched_run(tmp_path: Path) -> None:
    """Killed at the hardest moments. All else is that of the untouched run to the last bit."""
    (tmp_path / "whole").mkdir()
    file = written("LanguageModeling", tmp_path / "whole", logger=[OFFLINE], log_every_n_steps=2)
    settings = yaml.safe_load(file.read_text())
    settings["trainer"]["callbacks"].append(SAMPLES)
    file.write_text(yaml.safe_dump(settings))
    whole = tmp_path / "whole" / "run"
    finish_here(whole, file, [])
    there, run = tmp_path / "run.yaml", tmp_path / "run"
    there.write_text(file.read_text())
    for moment in MOMENTS:
        die(start(run, there, [], kill_at=moment), tmp_path)
    finish(run, there, [])
    assert_same(run, whole)

    rows = history(run)
    metrics = [numbers(row) for row in read_metrics(run / "metrics.jsonl")]
    assert [numbers(row) for row in rows if has_numbers(row)] == metrics
    assert metrics == [numbers(row) for row in read_metrics(whole / "metrics.jsonl")]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    tables = [row["trainer/global_step"] for row in rows if "val/samples" in row]
    assert tables == [r["trainer/global_step"] for r in history(whole) if "val/samples" in r]
    assert len(tables) == len(set(tables)) > 2
    assert len({path.name for path in segments(run)}) == 1
    assert len(segments(run)) == len(MOMENTS) + 1
    samples = [(r / "samples" / "val.jsonl").read_text() for r in (run, whole)]
    assert samples[0] == samples[1]

    # As the program of wandb reads them.
    seen = [step for path in segments(run) for step in inspected(path)]
    assert seen == [row["trainer/global_step"] for row in rows]


def inspected(path: Path) -> list[int]:
    """The steps of the rows of history, read by `wandb leet`."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(path.parent)},  # where it writes a log
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line["history"]["item"]["trainer/global_step"] for line in lines if "history" in line]


def logged(folder: Path, steps: range, *, go_on: tuple[int, list[dict[str, Any]]] | None) -> None:
    """A start of a run that logs these steps, each with a metric."""
    logger, metrics = WandB(mode="offline"), MetricsFile(folder)
    logger.open_in(folder, "fit")
    if go_on is not None:
        logger.go_on(*go_on)
    for step in steps:
        for each in (logger, metrics):
            each.log_metrics({"val/bleu": 50.0 - step}, step=step)
    logger.finish(failed=False)


def steps_of(folder: Path) -> list[tuple[int, int]]:
    return [(row["_step"], row["trainer/global_step"]) for row in history(folder)]


def wait_until_written(folder: Path, n: int) -> None:
    """The service of wandb writes the end of a run after `finish` has returned."""
    deadline = time.monotonic() + 30
    while not wandb_file.is_complete(segments(folder)[-1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(history(folder)) == n


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "experiment" / "run"
    made.mkdir(parents=True)
    return made


def test_rows_that_are_made_again_are_cut(folder: Path) -> None:
    logged(folder, range(10), go_on=None)
    wait_until_written(folder, 10)
    logged(folder, range(6, 9), go_on=(6, [{"step": s, "val/bleu": 50.0 - s} for s in range(6)]))
    wait_until_written(folder, 9)
    assert steps_of(folder) == [(s, s) for s in range(9)]
    summary = [
        json.loads(item.value_json)
        for _, record in records(segments(folder)[-1])
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
        if (item.key or item.nested_key[0]) == "val/bleu"
    ]
    assert summary[-1] == {"max": 50.0}, "that of the first start is the best"


def test_rows_that_were_lost_are_taken_from_the_metrics(folder: Path) -> None:
    logged(folder, range(4), go_on=None)
    wait_until_written(folder, 4)
    metrics = [{"step": s, "time": 1.0, "val/bleu": 50.0 - s} for s in range(7)]
    logged(folder, range(7, 9), go_on=(7, metrics))
    wait_until_written(folder, 9)
    assert steps_of(folder) == [(s, s) for s in range(9)]


@pytest.mark.parametrize("n_rows", [0, 1, 700, 1500, 4000])
def test_a_cut_leaves_the_first_rows_of_several_files(folder: Path, n_rows: int) -> None:
    """Of files with more than a block, and of a torn one."""
    for first in (0, 1000):
        made = folder / "wandb" / f"offline-run-2026010{first // 1000 + 1}_000000-abc"
        made.mkdir(parents=True)
        copy_history(made / "run-abc.wandb", range(first, first + 1000))
    torn = segments(folder)[1]
    os.truncate(torn, torn.stat().st_size - 20)
    there = history(folder)
    assert len(there) == 1999
    assert min(path.stat().st_size for path in segments(folder)) > 40_000
    assert keep_history(folder, n_rows) == there[:n_rows]
    assert history(folder) == there[:n_rows]
    assert keep_history(folder, n_rows) == there[:n_rows]


def copy_history(path: Path, steps: range) -> None:
    """Write a file as wandb does: in blocks of 32 KiB, records in pieces."""
    import struct

    from wandb.proto import wandb_internal_pb2

    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for step in steps:
        record = wandb_internal_pb2.Record()
        for name, value in (("trainer/global_step", step), ("train/loss", 0.5 + step)):
            item = record.history.item.add()
            item.key, item.value_json = name, json.dumps(value)
        body, first = record.SerializeToString(), True
        while body or first:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                continue
            piece, body = body[: left - 7], body[left - 7 :]
            kind = (1 if first else 4) if not body else (2 if first else 3)
            data += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
    path.write_bytes(data)


@pytest.mark.parametrize("content", [b"", b"another format"])
def test_a_file_that_is_not_understood_is_left_alone(
    folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in (1, 2):
        made = folder / "wandb" / f"offline-run-2026010{day}_000000-abc"
        made.mkdir(parents=True)
        copy_history(made / "run-abc.wandb", range(10))
    strange = segments(folder)[1]
    strange.write_bytes(content)
    before = segments(folder)[0].read_bytes()
    with pytest.raises(UnknownFormat, match="does not begin as a"):
        keep_history(folder, 3)
    assert segments(folder)[0].read_bytes() == before
    logger = WandB(mode="offline")
    logger.open_in(folder, "fit")
    logger.go_on(3, [])
    said = capsys.readouterr().err
    assert said.startswith("W&B: steps that are taken again are written twice: ")
    assert said.count("\n") == 1
