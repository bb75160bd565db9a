"""A goal fails a run that falls short, and names the number."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tx_lightning.callbacks import Goal
from tx_lightning.callbacks.goal import GoalMissed


def ended_with(**metrics: float) -> Trainer:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer._logger_connector._callback_metrics = {
        name.replace("_", "/"): torch.tensor(value) for name, value in metrics.items()
    }
    return trainer


def test_a_reached_goal_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Goal("test/bleu", 99.0).on_test_end(ended_with(test_bleu=99.0), LightningModule())
    assert "test/bleu is 99, the goal was at least 99" in capsys.readouterr().out


@pytest.mark.parametrize("value", [98.99, float("nan")])
def test_a_missed_goal_is_an_error(value: float) -> None:
    with pytest.raises(GoalMissed, match="below the goal of 99"):
        Goal("test/bleu", 99).on_test_end(ended_with(test_bleu=value), LightningModule())


def test_an_unknown_metric_lists_the_known() -> None:
    with pytest.raises(ValueError, match="there are test/chrf"):
        Goal("test/bleu", 99).on_test_end(ended_with(test_chrf=1.0), LightningModule())


@pytest.mark.parametrize("value", [0.011, float("nan")])
def test_a_goal_may_be_an_upper_bound(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    goal = Goal("test/loss", at_most=0.01)
    goal.on_test_end(ended_with(test_loss=0.0099), LightningModule())
    assert "test/loss is 0.0099, the goal was at most 0.01" in capsys.readouterr().out
    with pytest.raises(GoalMissed, match="above the goal of 0.01"):
        goal.on_test_end(ended_with(test_loss=value), LightningModule())


def test_a_goal_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="Goal for test/bleu has no bound"):
        Goal("test/bleu")
