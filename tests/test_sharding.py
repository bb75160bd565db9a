"""Runs in shards on two processes: killed, gone on with, with shards and without; refusals.

That their gradients, parameters and scores are those of one process is in test_spread.py.
"""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_every_task import configuration
from tests.test_kills import (
    assert_same,
    assert_same_but_for_rounding,
    die,
    finish,
    launch,
    on,
    spreading,
    start,
    written,
)
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import load_task
from tx_lightning.sharding import _like, whole
from tx_lightning.tasks import Translation

OVERLAY = Path(__file__).parents[1] / "experiments" / "trainer" / "fsdp.yaml"
WORDS = ["--config", str(OVERLAY), "--trainer.devices", "2", "--trainer.accelerator", "cpu"]


def in_shards(accumulate: int = 2) -> list[str]:
    """The words that put a step of four micro-batches into shards."""
    words = ["--trainer.accumulate_grad_batches", str(accumulate)]
    return [*WORDS, *words, "--trainer.val_check_interval", str(5 * accumulate)]


def test_killed_in_shards_and_resumed_to_the_last_bit(tmp_path: Path) -> None:
    """With dropout and AdamW; then translated with, by one process."""
    (tmp_path / "whole").mkdir()
    file = written("Translation", tmp_path / "whole")
    finish(tmp_path / "whole" / "run", file, in_shards())
    there, run = tmp_path / "run.yaml", tmp_path / "run"
    there.write_text(file.read_text())
    # In the last validation before a save, so that the next start begins with a validation.
    die(start(run, there, in_shards(), kill_at="validation:20"), tmp_path)
    process = launch(run, there, [])  # its configuration says on how many processes
    assert process.wait(timeout=600) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert_same(run, tmp_path / "whole" / "run")
    task = load_task(run / "checkpoints" / "last.ckpt")
    assert isinstance(task, Translation)
    assert not any(type(p).__name__ == "DTensor" for p in task.parameters())
    (found,) = task.translate(["Das Kind tanzt."])
    assert found[0].text


@pytest.mark.slow
@pytest.mark.parametrize("task", ["LanguageModeling", "Classification"])
def test_gone_on_with_in_shards_and_without(task: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    file = spreading(task, tmp_path / "whole")
    finish(tmp_path / "whole" / "run", file, on(1, 4))
    there, run = tmp_path / "run.yaml", tmp_path / "run"
    there.write_text(file.read_text())
    die(start(run, there, in_shards(), kill_at="window:9"), tmp_path)
    die(start(run, there, on(1, 4), kill_at="validation:20"), tmp_path)
    die(start(run, there, in_shards(), kill_at="saving:30"), tmp_path)
    finish(run, there, on(2, 2))
    assert_same_but_for_rounding(run, tmp_path / "whole" / "run")


def test_a_strategy_with_checkpoints_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = configuration("Translation")
    settings["trainer"] |= {
        "devices": 1,
        "strategy": {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1},
        },
    }
    Path("task.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch sets one with the group
    assert main(["fit", "--config", "task.yaml"]) == 1
    torch.distributed.destroy_process_group()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: trainer.strategy: ModelParallelStrategy writes checkpoints")
    assert "use tx_lightning.sharding.Sharded" in line


def test_values_that_are_no_shards_stay_as_they_are() -> None:
    tree = {"a": torch.ones(3), "b": [1, "two"], "c": None}
    assert whole(tree) == tree
    assert _like({"a": torch.zeros(3)}, tree) == tree
