"""Callbacks that come with every task: step numbers, rates after validations, divergence."""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD, lr_scheduler

from tests import wandb_file
from tests.small import MAKERS, Rows, make, make_trainer, sgd
from tests.test_every_task import configuration
from tx_lightning.__main__ import main
from tx_lightning.callbacks import LRWarmup, SampleLogger
from tx_lightning.checkpoints import load_task
from tx_lightning.errors import ConfigurationError
from tx_lightning.loggers import read_metrics
from tx_lightning.tasks.companions import Diverged

EVERY_STEP: dict[str, Any] = {
    "limit_val_batches": 1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,
}


class Own(Callback):
    """Logs a metric of its own in training and in validation."""

    def __init__(self, name: str, *values: float) -> None:
        self.name = name
        self.values = list(values)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("own/train", 1.0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log(self.name, self.values.pop(0) if len(self.values) > 1 else self.values[0])


# Step numbers


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_that_is_logged_says_the_same_step(accumulate: int, tmp_path: Path) -> None:
    task, data = make("Classification")
    rows = Rows()
    trainer = make_trainer(
        tmp_path,
        max_steps=10,
        logger=rows,
        log_every_n_steps=5,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        val_check_interval=5 * accumulate,
        check_val_every_n_epoch=None,
        callbacks=[LearningRateMonitor("step"), Own("own/val", 1.0)],
    )
    trainer.fit(task, datamodule=data)
    for name in ("train/loss", "lr-", "val/loss", "own/val", "own/train"):
        assert set(rows.steps(name)) == {5, 10}, name
    rows.rows.clear()
    trainer.test(task, datamodule=data, verbose=False)
    assert rows.steps("test/loss") == [10]


def test_the_numbers_go_on_in_a_resumed_run_and_over_epochs(tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None) -> Rows:
        task, data = make("Classification")
        rows = Rows()
        trainer = make_trainer(
            tmp_path,
            max_steps=steps,
            logger=rows,
            callbacks=[LearningRateMonitor("step")],
            limit_val_batches=1,  # at the end of each epoch of 8 steps
        )
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return rows

    whole = fit(20, None)
    assert whole.steps("train/loss") == whole.steps("lr-") == list(range(1, 21))
    assert whole.steps("val/loss") == [8, 16]
    fit(11, None)
    rest = fit(20, tmp_path / "saved.ckpt")
    assert rest.steps("train/loss") == rest.steps("lr-") == list(range(12, 21))
    assert rest.steps("val/loss") == [16]


def test_files_pictures_and_wandb_have_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = configuration("Classification")
    tree["trainer"] |= {"max_steps": 10, "val_check_interval": 10, "log_every_n_steps": 10}
    tree["trainer"]["logger"] = [
        {"class_path": "tx_lightning.loggers.WandB", "init_args": {"mode": "offline"}}
    ]
    tree["trainer"]["callbacks"] = [
        *(
            callback
            for callback in tree["trainer"]["callbacks"]
            if "Checkpoint" not in str(callback)
        ),
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    ]
    Path("ten.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "--config", "ten.yaml"]) == 0
    (run,) = Path("runs/ten").iterdir()
    assert {row["step"] for row in read_metrics(run / "metrics.jsonl")} == {10}
    names = set().union(*read_metrics(run / "metrics.jsonl"))
    assert {"train/loss", "val/loss", "lr-AdamW/pg1", "train/step_time"} <= names
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    assert "step=10" in checkpoint.name
    assert all("step10" in path.name for path in (run / "attention").iterdir())
    samples = (run / "samples/val.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in samples} == {10}
    history = wandb_file.read(run).history
    assert {row["trainer/global_step"] for row in history} == {10}
    # An evaluation of the checkpoint says the step that it is of.
    words = ["--config", "ten.yaml", "--ckpt_path", str(checkpoint), "--name", "tested"]
    assert main(["test", *words]) == 0
    (tested,) = Path("runs/tested").iterdir()
    assert {row["step"] for row in read_metrics(tested / "metrics.jsonl")} == {10}


# Rates that follow a score


def plateau(monitor: str, mode: str = "min") -> Any:
    return lambda optimizer: ReduceLROnPlateau(
        optimizer, monitor, mode=mode, patience=0, factor=0.5
    )


def rates_of(tmp_path: Path, scheduler: Any, values: list[float], *more: Callback) -> list[float]:
    task, data = make("Classification", optimizer=sgd, scheduler=scheduler)
    rows = Rows()
    trainer = make_trainer(
        tmp_path,
        max_steps=5,
        logger=rows,
        callbacks=[LearningRateMonitor("step"), Own("own/score", *values), *more],
        num_sanity_val_steps=1,
        **EVERY_STEP,
    )
    trainer.fit(task, datamodule=data)
    return [metrics["lr-SGD/pg1"] for _, metrics in rows.rows if "lr-SGD/pg1" in metrics]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("min", [0.1, 0.1, 0.05, 0.025, 0.025]), ("max", [0.1, 0.1, 0.1, 0.1, 0.05])],
)
def test_the_rate_follows_the_monitor_after_each_validation(
    mode: str, expected: list[float], tmp_path: Path
) -> None:
    scores = [9.0, 1.0, 2.0, 3.0, 0.5, 0.4]  # the first is that of the sanity check, unseen
    found = rates_of(tmp_path, plateau("own/score", mode), scores)
    assert found == pytest.approx(expected)


def test_torch_s_own_plateau_follows_the_validation_loss(tmp_path: Path) -> None:
    def never_better(optimizer: SGD) -> Any:
        return lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5, threshold=100.0, threshold_mode="abs"
        )

    found = rates_of(tmp_path, never_better, [1.0])
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.0125])


def test_a_plateau_is_scheduled_below_the_warmup(tmp_path: Path) -> None:
    found = rates_of(tmp_path, plateau("own/score"), [9, 1, 2, 3, 4, 5], LRWarmup(4))
    assert found == pytest.approx([0.025, 0.05, 0.05 * 0.75, 0.025, 0.0125])


def test_the_state_of_a_plateau_is_in_the_checkpoint_of_its_validation(tmp_path: Path) -> None:
    task, data = make("Classification", optimizer=sgd, scheduler=plateau("val/loss", "max"))
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer = make_trainer(
        tmp_path, max_steps=3, callbacks=[keeper], enable_checkpointing=True, **EVERY_STEP
    )
    trainer.fit(task, datamodule=data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = checkpoint["lr_schedulers"]
    assert state["last_epoch"] == 3
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == state["_last_lr"][0]


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_metric_that_nobody_logs_is_refused(sanity: int, tmp_path: Path) -> None:
    task, data = make("Classification", optimizer=sgd, scheduler=plateau("val/nonsense", "max"))
    trainer = make_trainer(tmp_path, num_sanity_val_steps=sanity, **EVERY_STEP)
    with pytest.raises(ConfigurationError, match=r"'val/nonsense', which is not logged.*val/loss"):
        trainer.fit(task, datamodule=data)
    assert trainer.global_step == 1 - sanity


def test_a_plateau_without_validations_is_refused(tmp_path: Path) -> None:
    task, data = make("Classification", optimizer=sgd, scheduler=plateau("val/loss"))
    with pytest.raises(ConfigurationError, match=r"there is none: raise trainer.limit_val_batches"):
        make_trainer(tmp_path).fit(task, datamodule=data)


def test_torch_s_plateau_for_scores_that_rise_is_refused() -> None:
    task, _ = make(
        "Classification",
        optimizer=sgd,
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, "max"),
    )
    with pytest.raises(
        ValueError, match="mode is max: use lightning.pytorch.cli.ReduceLROnPlateau"
    ):
        task.configure_optimizers()


# Divergence


def diverging(parameters: Any) -> SGD:
    return SGD(parameters, lr=1e12)


def diverge(tmp_path: Path, **options: Any) -> Trainer:
    task, data = make("Translation", optimizer=diverging)
    keeper = ModelCheckpoint(
        tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    quiet = {"max_steps": 6, "callbacks": [keeper], "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, **(quiet | options))
    task.stop_when_diverged = options.pop("stops", True)
    trainer.fit(task, datamodule=data)
    return trainer


def test_a_run_that_diverged_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged) as caught:
        diverge(tmp_path)
    message = str(caught.value)
    assert "at step 2 train/loss is " in message
    assert f"the last good checkpoint is {tmp_path / 'kept' / 'step=1.ckpt'}" in message
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step=1.ckpt"]


def test_what_was_saved_between_two_logging_steps_is_no_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="at step 4 .* is nan.*step=1.ckpt"):
        diverge(tmp_path, log_every_n_steps=4)
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_without_logging_steps_a_validation_notices(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="at step 4 network.* is nan; the last good.*step=1"):
        diverge(tmp_path, log_every_n_steps=0, limit_val_batches=1, val_check_interval=4,
                check_val_every_n_epoch=None)  # fmt: skip


class Spoil(Callback):
    """Makes a metric NaN before checkpoints are chosen by it."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, values

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callback_metrics[self.name] = torch.tensor(self.values.pop(0))


def best(tmp_path: Path, mode: str, values: list[float]) -> float | None:
    task, data = make("Classification")
    keeper = ModelCheckpoint(tmp_path, monitor="own", mode=mode, save_top_k=2)
    trainer = make_trainer(
        tmp_path,
        max_steps=len(values),
        callbacks=[Spoil("own", values), keeper],
        enable_checkpointing=True,
        **EVERY_STEP,
    )
    trainer.fit(task, datamodule=data)
    assert all(math.isfinite(score) for score in keeper.best_k_models.values())
    return None if keeper.best_model_score is None else float(keeper.best_model_score)


@pytest.mark.parametrize(
    "order", [[0.9, math.nan, 0.5], [math.nan, 0.5, 0.9], [0.5, 0.9, math.nan]]
)
def test_nan_is_never_best(order: tuple[float, ...], tmp_path: Path) -> None:
    assert best(tmp_path / "max", "max", list(order)) == pytest.approx(0.9)
    assert best(tmp_path / "min", "min", list(order)) == pytest.approx(0.5)


def test_nothing_is_best_of_nan_and_infinity(tmp_path: Path) -> None:
    assert best(tmp_path / "kept", "max", [math.nan, math.inf]) is None


def test_the_command_line_stops_or_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = configuration("Classification")
    tree["model"]["init_args"] |= {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e12}},
        "scheduler": None,
    }
    tree["trainer"] |= {"callbacks": None, "limit_val_batches": 0}
    Path("wild.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "--config", "wild.yaml"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "training diverged: at step" in line
    assert "train/loss is " in line
    assert main(["fit", "--config", "wild.yaml", "--on_divergence", "ignore"]) == 0


# What callbacks monitor


def test_callbacks_monitor_what_training_logs(tmp_path: Path) -> None:
    task, data = make("Classification", optimizer=sgd)
    keeper = ModelCheckpoint(
        tmp_path / "kept",
        monitor="train/loss",
        filename="{step}-{train/loss:.4f}",
        auto_insert_metric_name=False,
        every_n_train_steps=1,
        save_top_k=-1,
    )
    rows = Rows()
    trainer = make_trainer(
        tmp_path,
        max_steps=-1,
        max_epochs=9,
        logger=rows,
        callbacks=[keeper, EarlyStopping("train/loss", patience=0, min_delta=1.0)],
        enable_checkpointing=True,
    )
    trainer.fit(task, datamodule=data)
    assert trainer.current_epoch == 2  # no loss falls by 1
    losses = {step: row["train/loss"] for step, row in rows.rows if "train/loss" in row}
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == {
        f"{step}-{loss:.4f}" for step, loss in losses.items()
    }
    assert float(trainer.callback_metrics["train/grad_norm"]) > 0


# A resumed run


def resume(tmp_path: Path, first: list[Callback], then: list[Callback], **options: Any) -> Trainer:
    """Train three steps, then go on to six."""
    saved = tmp_path / "saved.ckpt"
    for steps, callbacks in ((3, first), (6, then)):
        task, data = make("Classification")
        trainer = make_trainer(tmp_path, max_steps=steps, callbacks=callbacks, **options)
        trainer.fit(task, datamodule=data, ckpt_path=saved if saved.exists() else None)
        trainer.save_checkpoint(saved)
    return trainer


def test_patience_is_that_of_the_configuration(tmp_path: Path) -> None:
    stopper = EarlyStopping("train/loss", patience=4)
    resume(tmp_path, [EarlyStopping("train/loss", patience=7)], [stopper])
    assert stopper.patience == 4


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    def fit(limit: timedelta, steps: int, checkpoint: Path | None) -> Trainer:
        task, data = make("Classification")
        trainer = make_trainer(tmp_path, max_steps=steps, max_time=limit)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        return trainer

    saved = tmp_path / "saved.ckpt"
    fit(timedelta(hours=1), 3, None).save_checkpoint(saved)
    with pytest.raises(ConfigurationError, match=r"trainer.max_time \(0:00:00.0.*is used up"):
        fit(timedelta(microseconds=1), 6, saved)
    assert fit(timedelta(hours=1), 6, saved).global_step == 6


def test_steps_that_grow_with_the_epochs_are_refused(tmp_path: Path) -> None:
    task, data = make("Classification")
    trainer = make_trainer(tmp_path, callbacks=[GradientAccumulationScheduler({1: 2})])
    with pytest.raises(ConfigurationError, match=r"data.batch_tokens is the size of an optimizer"):
        trainer.fit(task, datamodule=data)


def test_what_is_monitored_is_there_without_logging_steps(tmp_path: Path) -> None:
    task, data = make("Classification", optimizer=sgd)
    rows = Rows()
    trainer = make_trainer(
        tmp_path,
        max_steps=-1,
        max_epochs=9,
        logger=rows,
        log_every_n_steps=10,
        callbacks=[EarlyStopping("train/loss", patience=0, min_delta=1.0)],
    )
    trainer.fit(task, datamodule=data)
    assert trainer.current_epoch == 2
    assert rows.steps("train/loss") == [10]


@pytest.mark.parametrize("name", ["Translation", "LanguageModeling", "Denoising"])
def test_a_run_that_was_told_to_goes_on_through_validations(name: str, tmp_path: Path) -> None:
    task, data = make(name, optimizer=diverging)
    task.stop_when_diverged = False
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[SampleLogger()], **EVERY_STEP)
    trainer.fit(task, datamodule=data)
    assert trainer.callback_metrics["val/loss"].isnan()


def test_what_was_logged_last_is_known_after_a_resume(tmp_path: Path) -> None:
    trainer = resume(tmp_path, [], [], log_every_n_steps=3)
    assert trainer.callback_metrics.keys() >= {"train/loss", "train/grad_norm"}
    task, data = make("Classification")
    again = make_trainer(tmp_path, max_steps=7, log_every_n_steps=100)
    again.fit(task, datamodule=data, ckpt_path=tmp_path / "saved.ckpt")
    assert float(again.callback_metrics["train/loss"]) == trainer.callback_metrics["train/loss"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", MAKERS)
def test_an_evaluation_has_the_step_of_the_checkpoint_it_is_of(name: str, tmp_path: Path) -> None:
    task, data = make(name)
    rows = Rows()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"limit_val_batches": 1, "check_val_every_n_epoch": None}
    trainer = make_trainer(
        tmp_path, max_steps=3, logger=rows, callbacks=[saver], enable_checkpointing=True,
        val_check_interval=1, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    trainer.validate(task, datamodule=data, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert set(rows.steps("test/")) == {1}
    assert rows.steps("val/") == [1, 2, 3, 2]
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data)
    assert rows.steps("val/")[4:] == [4, 5]
    assert rows.steps("test/")[-1] == 5
    fresh = Rows()
    make_trainer(tmp_path, logger=fresh).test(
        load_task(tmp_path / "step=2.ckpt"), datamodule=make(name)[1]
    )
    assert set(fresh.steps("test/")) == {2}


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (ModelPruning("l1_unstructured", amount=0.5), "torch.nn.utils.prune"),
        (BackboneFinetuning(), "model.freeze"),
        (LearningRateFinder(attr_name="rate"), "leave attr_name out"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(callback: Any, why: str, tmp_path: Path) -> None:
    task, data = make("Classification")
    with pytest.raises(ConfigurationError, match=why):
        make_trainer(tmp_path, callbacks=[callback]).fit(task, datamodule=data)


def test_the_test_after_training_has_the_step_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint stays the best, since the rate is so high."""
    monkeypatch.chdir(tmp_path)
    tree = configuration("Classification")
    best = {"monitor": "val/loss", "save_top_k": 1}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}
    shown = [{"class_path": f"tx_lightning.callbacks.{n}"} for n in ("SampleLogger", "ClassReport")]
    tree["trainer"] |= {"max_steps": 3, "val_check_interval": 1, "callbacks": [saver, *shown]}
    high = {"class_path": "torch.optim.SGD", "init_args": {"lr": 30.0}}
    tree["model"]["init_args"] |= {"optimizer": high, "scheduler": None}
    Path("x.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "--config", "x.yaml", "--test_after", "true"]) == 0
    (run,) = Path("runs/x").iterdir()
    (kept,) = (run / "checkpoints").glob("*.ckpt")
    step = int(kept.stem.rpartition("=")[2])
    assert step < 3
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "test/loss" in row]
    assert [row["step"] for row in rows] == [step]
    samples = (run / "samples" / "test.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in samples} == {step}
