"""The history of a run that was killed and resumed: no gap, no doubled step, one id."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

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


def damaged(content: bytes, place: int, by: bytes) -> bytes:
    return content[:place] + by + content[place + len(by) :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: b"", "does not begin as a"),
        (lambda content: b"another format", "does not begin as a"),
        (lambda content: damaged(content, 6, b"\x01"), "does not begin as a"),  # a later version
        (lambda content: damaged(content, 13, b"\x09"), "is damaged at byte 7"),  # a kind of piece
        (lambda content: damaged(content, 11, b"\xff\xff"), "is damaged at byte 7"),  # a length
    ],
)
def test_a_file_that_is_not_understood_is_left_alone(
    folder: Path,
    change: Callable[[bytes], bytes],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for day in (1, 2):
        made = folder / "wandb" / f"offline-run-2026010{day}_000000-abc"
        made.mkdir(parents=True)
        copy_history(made / "run-abc.wandb", range(1000))
    strange = segments(folder)[1]
    strange.write_bytes(change(strange.read_bytes()))
    before = [path.read_bytes() for path in segments(folder)]
    with pytest.raises(UnknownFormat, match=says):
        keep_history(folder, 3)
    assert [path.read_bytes() for path in segments(folder)] == before
    logger = WandB(mode="offline")
    logger.open_in(folder, "fit")
    logger.go_on(3, [])
    said = capsys.readouterr().err
    assert said.startswith("W&B: steps that are taken again are written twice: ")
    assert said.endswith("; the file is not changed\n")
    assert said.count("\n") == 1
    assert [path.read_bytes() for path in segments(folder)] == before


def test_a_tail_that_a_power_failure_left_is_no_damage(folder: Path) -> None:
    made = folder / "wandb" / "offline-run-20260101_000000-abc"
    made.mkdir(parents=True)
    copy_history(made / "run-abc.wandb", range(10))
    with (made / "run-abc.wandb").open("ab") as file:
        file.write(bytes(50_000))
    assert len(keep_history(folder, 100)) == 10


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(place=st.integers(7, 2000), by=st.binary(min_size=1, max_size=8), n_rows=st.integers(0, 60))
def test_no_damage_is_fatal(place: int, by: bytes, n_rows: int) -> None:
    """Whatever happened to a file, it is cut to rows that it has, or refused and left as it is."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "wandb" / "offline-run-20260101_000000-abc"
        made.mkdir(parents=True)
        path = made / "run-abc.wandb"
        copy_history(path, range(50))
        path.write_bytes(damaged(path.read_bytes(), place, by))
        before = path.read_bytes()
        try:
            kept = keep_history(Path(name), n_rows)
        except UnknownFormat:
            assert path.read_bytes() == before
        else:
            assert kept == history(Path(name))[:n_rows]


def test_what_online_starts_have_sent_is_not_written_again_offline(folder: Path) -> None:
    """A run that was online, was killed, and is resumed offline from an earlier checkpoint."""
    made = folder / "wandb" / "run-20260101_000000-abc"
    made.mkdir(parents=True)
    copy_history(made / "run-abc.wandb", range(5))
    before = (made / "run-abc.wandb").read_bytes()
    (folder / "wandb" / "run_id").write_text("abc\n")
    metrics = [{"step": s, "train/loss": 0.5 + s} for s in range(3)]
    logged(folder, range(3, 7), go_on=(3, metrics))
    wait_until_written(folder, 2)
    assert steps_of(folder) == [(5, 5), (6, 6)]
    assert (made / "run-abc.wandb").read_bytes() == before
