"""A run that is killed, wherever, and resumed ends as the run that nobody touched: bit by bit.

The fast tests kill one run at each kind of moment that is hard to come by. The campaign (`make
test-slow`) kills runs of three tasks at random, with and without worker processes, on one process
and on two. Where a run goes on on another number of processes, it ends the same but for rounding.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from tests.processes import Forked
from tests.stand_ins import steps
from tests.test_every_task import configuration
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import read_checkpoint
from tx_lightning.loggers import read_metrics
from tx_lightning.reproduce import history

ROOT = Path(__file__).resolve().parents[1]
CAMPAIGN_STEPS = 200


def written(task: str, folder: Path, **trainer: Any) -> Path:
    """Write the configuration of a run with dropout, accumulation and validation into a file."""
    settings = configuration(task)
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "every_n_train_steps": 2,
            "monitor": "step",
            "mode": "max",
            "save_top_k": 2,
            "save_last": True,
        },
    }
    settings["trainer"] |= {
        "callbacks": [
            {"class_path": "tx_lightning.callbacks.LRWarmup", "init_args": {"warmup_steps": 20}},
            saving,
            {"class_path": "tests.stand_ins.KillAt"},
        ],
        "max_steps": 40,
        "val_check_interval": 10,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": True,  # a callback that must not see a hook before its time
        "logger": [{"class_path": "tx_lightning.loggers.WandB", "init_args": {"mode": "disabled"}}],
        **trainer,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(
    run: Path, file: Path, words: list[str], *, kill_at: str = "", pause: float = 0.0
) -> Forked:
    """Start the run in its folder, or go on with it where it has begun."""
    command, environment = command_of(run, file, words)
    return Forked(
        main,
        command,
        environment={**environment, "KILL_AT": kill_at, "PAUSE": str(pause)},
        folder=file.parent,
        output=file.parent / "output.txt",
        ranks=processes_of(run, words),
    )


def launch(run: Path, file: Path, words: list[str], *, kill_at: str = "") -> subprocess.Popen[str]:
    """The same as a user does it: a new process, from which Lightning starts the others."""
    command, environment = command_of(run, file, words)
    with (file.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tx_lightning", *command],
            cwd=file.parent,
            env={**environment, "KILL_AT": kill_at},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def clear_away(process: subprocess.Popen[str]) -> None:
    """Kill a run with all its processes, as a machine that goes down does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def processes_of(run: Path, words: list[str]) -> int:
    if "--trainer.devices" in words:
        return int(words[words.index("--trainer.devices") + 1])
    config = run / "config.yaml"
    devices = yaml.safe_load(config.read_text())["trainer"]["devices"] if config.is_file() else 1
    return devices if isinstance(devices, int) else 1


def command_of(run: Path, file: Path, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words that start a run or go on with it, and the environment variables for it."""
    if (run / "config.yaml").is_file():
        command = ["fit", "--resume", str(run), "--trust", "tests", *words]
    else:
        place = ["--trainer.default_root_dir", str(run)]
        command = ["fit", "--config", str(file), *place, *words]
    return command, {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}


def finish(run: Path, file: Path, words: list[str]) -> None:
    process = start(run, file, words)
    try:
        status = process.wait(timeout=600)
    finally:
        process.kill()
    assert status == 0, (file.parent / "output.txt").read_text()[-3000:]


def finish_here(run: Path, file: Path, words: list[str]) -> None:
    """In the process of the tests, whose hash seed is another."""
    command, environment = command_of(run, file, words)
    before = Path.cwd()
    os.chdir(file.parent)
    try:
        with patch.dict(os.environ, environment):
            assert main(command) == 0
    finally:
        os.chdir(before)


def die(process: Forked, folder: Path) -> None:
    """Wait until the run has killed itself; its other processes go down with it."""
    try:
        status = process.wait(timeout=600)
    finally:
        process.kill()
    assert status == -signal.SIGKILL, (folder / "output.txt").read_text()[-3000:]


def wait_for_step(run: Path, step: int, process: Forked) -> None:
    """Until this start of the run, which drops the rows that it makes again, has come that far."""
    output = run.parent / "output.txt"
    for _ in range(6000):
        if process.poll() is not None:
            break
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(output.read_text()[-3000:])


def assert_same(run: Path, whole: Path, n_steps: int = 40) -> None:
    """Weights, optimizer, rates, callbacks and metrics are the same to the last bit."""
    one, other = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (whole, run))
    assert one["global_step"] == other["global_step"] >= n_steps
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch"):
        assert_equal(one[part], other[part], part)
    for name, state in one["callbacks"].items():
        if "ModelCheckpoint" not in name:  # it holds the paths of the folder
            assert_equal(state, other["callbacks"][name], name)
    assert history(run) == history(whole)
    assert_no_row_twice(run)


def assert_no_row_twice(run: Path) -> None:
    rows = [
        (row["step"], tuple(sorted(row.keys() - {"time"})))
        for row in read_metrics(run / "metrics.jsonl")
    ]
    assert len(rows) == len(set(rows)), "a step was logged twice"


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_equal(value, b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


# Inside an accumulation window, at an epoch's end, in validation, in the middle of a save. That a
# run survives all of them is in test_history.py, with its files of W&B.
MOMENTS = ("window:6", "epoch_end:9", "validation:20", "saving:26", "validation:40")


@pytest.mark.parametrize("moment", ["crash:4", "first_crashes:4"])
def test_a_crash_on_one_process_ends_all(moment: str, tmp_path: Path) -> None:
    """With the traceback of that process, and not after the half hour that gloo waits."""
    file = written("LanguageModeling", tmp_path)
    words = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = launch(tmp_path / "run", file, words, kill_at=moment)
    try:
        status = process.wait(timeout=300)
    finally:
        clear_away(process)
    said = (tmp_path / "output.txt").read_text()
    assert status != 0, said[-3000:]
    assert "in on_train_batch_start" in said
    assert "RuntimeError: crashed on purpose" in said


def on(processes: int, accumulate: int) -> list[str]:
    """The words that spread a step of four micro-batches."""
    strategy = "ddp" if processes > 1 else "auto"
    words = ["--trainer.devices", str(processes), "--trainer.strategy", strategy]
    words += ["--trainer.accumulate_grad_batches", str(accumulate)]
    return [*words, "--trainer.val_check_interval", str(5 * accumulate)]  # counts micro-batches


def spreading(task: str, folder: Path, **trainer: Any) -> Path:
    """A run that may go on elsewhere: not with Adam, which makes steps of the last digits."""
    file = written(task, folder, **trainer)
    settings = yaml.safe_load(file.read_text())
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    settings["model"]["init_args"]["optimizer"] = sgd
    settings["trainer"]["callbacks"].append({"class_path": "tests.stand_ins.Recorder"})
    file.write_text(yaml.safe_dump(settings))
    return file


def assert_same_but_for_rounding(run: Path, whole: Path) -> None:
    """The same examples in the same steps, the same rows, and numbers that agree to 1e-5."""
    assert {step: set(examples) for step, examples in steps(run).items()} == {
        step: set(examples) for step, examples in steps(whole).items()
    }
    one, other = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (whole, run))
    assert one["global_step"] == other["global_step"] >= 40
    assert_equal(one["lr_schedulers"], other["lr_schedulers"], "lr_schedulers")
    for name, value in one["state_dict"].items():
        if value.is_floating_point():
            torch.testing.assert_close(
                other["state_dict"][name], value, rtol=1e-5, atol=1e-5, msg=name
            )
    ours, theirs = history(whole), history(run)
    assert ours.keys() == theirs.keys()
    for key, score in ours.items():
        assert theirs[key] == pytest.approx(score, rel=1e-4, abs=1e-5), key
    assert_no_row_twice(run)


def test_resumed_on_other_numbers_of_processes(tmp_path: Path) -> None:
    """With dropout, killed on 2 processes x 2 parts, then 1 x 4, then to the end on 2 x 2."""
    (tmp_path / "whole").mkdir()
    file = spreading("Translation", tmp_path / "whole")
    finish_here(tmp_path / "whole" / "run", file, on(1, 4))
    there, run = tmp_path / "run.yaml", tmp_path / "run"
    there.write_text(file.read_text())
    die(start(run, there, on(2, 2), kill_at="window:13"), tmp_path)
    die(start(run, there, on(1, 4), kill_at="saving:26"), tmp_path)
    finish(run, there, on(2, 2))
    assert_same_but_for_rounding(run, tmp_path / "whole" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["LanguageModeling", "Classification"])
def test_campaign_on_other_numbers_of_processes(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at random moments, and each time resumed on other numbers of processes."""
    (tmp_path / "whole").mkdir()
    file = spreading(task, tmp_path / "whole", max_steps=CAMPAIGN_STEPS)
    finish(tmp_path / "whole" / "run", file, on(1, 4))
    there, run = tmp_path / "run.yaml", tmp_path / "run"
    there.write_text(file.read_text())
    moments = drawn(
        random.Random(f"spread {task}"), ["epoch_end", "window", "validation", "saving"]
    )
    spreads = [(2, 2), (1, 4)]  # not (4, 1), whose window is one micro-batch
    for number, moment in enumerate(moments):
        die(start(run, there, on(*spreads[number % 2]), kill_at=moment), tmp_path)
    finish(run, there, on(4, 1))
    assert_same_but_for_rounding(run, tmp_path / "whole" / "run")
    tell(capsys, f"{task} on 1, 2 and 4 processes", moments)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["Translation", "LanguageModeling", "Classification"])
def test_campaign(
    task: str, workers: int, processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at moments drawn at random, one of each kind, 20 for each task."""
    words = ["--data.num_workers", str(workers)]
    if processes > 1:
        words += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    file = written(task, tmp_path / "whole", max_steps=CAMPAIGN_STEPS)
    finish(tmp_path / "whole" / "run", file, words)
    there, run = tmp_path / "killed" / "run.yaml", tmp_path / "killed" / "run"
    there.write_text(file.read_text())
    chance = random.Random(f"{task} {workers} {processes}")
    moments = drawn(chance, ["any", "window", "epoch_end", "validation", "saving"])
    for moment in moments:
        kind, step = moment.split(":")
        if kind != "any":
            die(start(run, there, words, kill_at=moment), there.parent)
            continue
        process = start(run, there, words, pause=0.02)  # or it would be over before the kill
        wait_for_step(run, int(step), process)
        time.sleep(chance.uniform(0, 0.5))  # some steps, saves and a validation later
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
    finish(run, there, words)
    assert_same(run, tmp_path / "whole" / "run")
    tell(capsys, f"{task}, {workers} workers, {processes} processes", moments)


def drawn(chance: random.Random, kinds: list[str]) -> list[str]:
    """A moment of each kind, in the order of time."""
    chance.shuffle(kinds)
    at = sorted(chance.sample(range(1, CAMPAIGN_STEPS - 30), len(kinds)))
    return [f"{kind}:{step}" for kind, step in zip(kinds, at, strict=True)]


def tell(capsys: pytest.CaptureFixture[str], what: str, moments: list[str]) -> None:
    """Say how many kills the run survived: all, or this is not reached."""
    with capsys.disabled():
        print(f"\n{what}: killed at {', '.join(moments)}: {len(moments)} tried, all survived")
