"""Callbacks that every task brings to its trainer, on the command line and in Python alike.

They see to it that all that is logged says the same step, that a rate which follows a score does so
after each validation, that a run which diverged ends, and that a resumed run obeys its
configuration.
"""

import math
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    Timer,
)
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import (
    _LoggerConnector,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch import Tensor

from tx_lightning.checkpoints import read_checkpoint, resumable_checkpoints
from tx_lightning.errors import ConfigurationError

C = TypeVar("C", bound=Callback)
AFTER_VALIDATION = sys.maxsize  # a schedule's frequency; Lightning never takes this step by itself


class Diverged(ValueError):
    """Training came to numbers that are not finite; the command ends with status 1."""


class StepNumbers(Callback):
    """Numbers everything that is logged by optimizer steps that are done: after ten, all say 10.

    Lightning counts from 0 in some places and from 1 in others, so that the learning rate and the
    loss of the same step, or a validation and its checkpoint, have different numbers. Here the
    trainer's counter is, during a step, the number of that step, and afterwards the number of steps
    done.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._logger_connector.__class__ = _NumberedConnector
        number_steps(trainer, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, trainer.global_step + 1)  # a run that goes on inside an epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, trainer.global_step + 1)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number_steps(trainer, trainer.global_step + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, evaluated_step(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, evaluated_step(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number_steps(trainer, trainer.global_step)


class _NumberedConnector(_LoggerConnector):
    """Decides which steps are logged, where the trainer's counter is the number of the step."""

    @property
    def should_update_logs(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or self.trainer._active_loop is not self.trainer.fit_loop:
            return super().should_update_logs
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        return step % every == 0 or self.trainer.should_stop


def number_steps(trainer: Trainer, step: int) -> None:
    """Have Lightning log what comes now under the number of an optimizer step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def evaluated_step(trainer: Trainer) -> int:
    """The step that the weights are of: that of training, or of the checkpoint they came from."""
    task: Any = trainer.lightning_module
    loaded: int | None = getattr(task, "loaded_step", None)
    if loaded is None or trainer.state.fn == TrainerFn.FITTING:
        return trainer.global_step
    return loaded


class PlateauSteps(Callback):
    """Steps `ReduceLROnPlateau` after each validation, with the metric that it monitors.

    Raises:
        ConfigurationError: No validation logs that metric.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in _plateaus(trainer):
            if not trainer.enable_validation:
                raise ConfigurationError(
                    f"ReduceLROnPlateau follows {config.monitor} of each validation, but there is "
                    "none: raise trainer.limit_val_batches or use another scheduler"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in _plateaus(trainer):
            value = trainer.callback_metrics.get(config.monitor)
            if trainer.sanity_checking and str(config.monitor).startswith("train/"):
                continue
            if value is None:
                logged = ", ".join(sorted(trainer.callback_metrics))
                raise ConfigurationError(
                    f"ReduceLROnPlateau monitors {config.monitor!r}, which is not logged: set "
                    f"scheduler.monitor to one of {logged}"
                )
            if not trainer.sanity_checking:
                pl_module.lr_scheduler_step(config.scheduler, value)


def _plateaus(trainer: Trainer) -> list[Any]:
    configs = trainer.lr_scheduler_configs if trainer.state.fn == "fit" else []
    return [config for config in configs if config.frequency == AFTER_VALIDATION]


class StopWhenDiverged(Callback):
    """Ends training when a loss or gradient norm that is logged is not finite.

    A checkpoint with a score that is not finite is never among the best, even where training is
    told to go on (`task.stop_when_diverged = False`, `fit --on_divergence ignore`).

    Raises:
        Diverged: Says the step, what was not finite, and the last checkpoint whose weights are.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                held: Any = callback
                held.check_monitor_top_k = partial(_is_among_the_best, callback)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A search with such weights finds nothing, which would be the first that is said of it.
        if trainer.state.fn == "fit":
            bad = [name for name, p in pl_module.named_parameters() if not p.isfinite().all()]
            self._check(trainer, pl_module, dict.fromkeys(bad[:1], math.nan))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        task: Any = pl_module
        step, metrics = task.logged
        if step == trainer.global_step:
            self._check(trainer, task, metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            values = trainer.callback_metrics
            losses: tuple[str, ...] = ("val/loss", "val/nll")
            found = {name: float(values[name]) for name in losses if name in values}
            self._check(trainer, pl_module, found)

    def _check(self, trainer: Trainer, task: Any, metrics: dict[str, float]) -> None:
        bad = [f"{name} is {v}" for name, v in metrics.items() if not math.isfinite(v)]
        if not bad or not task.stop_when_diverged:
            return
        good = _last_good(trainer)
        kept = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
        raise Diverged(
            f"training diverged: at step {trainer.global_step} {' and '.join(bad)}; {kept}. Lower "
            "the learning rate, warm it up or clip gradients (on_divergence=ignore goes on)"
        )


def _is_among_the_best(
    callback: ModelCheckpoint, trainer: Trainer, current: Tensor | None = None
) -> bool:
    if current is not None and callback.save_top_k != -1 and not torch.isfinite(current):
        return False
    return type(callback).check_monitor_top_k(callback, trainer, current)


def _last_good(trainer: Trainer) -> Path | None:
    """The newest checkpoint of this run whose weights are all finite."""
    folders = {
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None
    }
    found = [saved for folder in folders for saved in resumable_checkpoints(folder)[0]]
    for _, _, path in sorted(found, reverse=True):
        weights = read_checkpoint(path, lazily=True)["state_dict"].values()
        if all(bool(weight.isfinite().all()) for weight in weights):
            return path
    return None


class TrainerSettings(Callback):
    """Lets the configuration of the trainer hold, or refuses it in one line.

    Raises:
        ConfigurationError: `trainer.max_time` was used up before a run is resumed, or a callback
            contradicts how steps are split.
    """

    def __init__(self) -> None:
        self._patience: dict[EarlyStopping, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._patience = {s: s.patience for s in _callbacks(trainer, EarlyStopping)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "mps" and trainer.precision == "64-true":
            raise ConfigurationError(
                "trainer.precision=64-true: Apple's devices have no float64; use 32-true, or "
                "trainer.accelerator=cpu"
            )
        if _callbacks(trainer, GradientAccumulationScheduler):
            raise ConfigurationError(
                "GradientAccumulationScheduler has no meaning here: data.batch_tokens is the size "
                "of an optimizer step however it is split; use trainer.accumulate_grad_batches to "
                "split it, and data.batch_tokens to make it larger"
            )
        for stopper, patience in self._patience.items():
            stopper.patience = patience
        for timer in _callbacks(trainer, Timer):
            left = timer.time_remaining()
            if timer._offset and left is not None and left <= 0:
                limit = timedelta(seconds=left + timer._offset)
                raise ConfigurationError(
                    f"trainer.max_time ({limit}) is used up: this run has trained for "
                    f"{timedelta(seconds=round(timer._offset))} already; raise it to train on"
                )


def check_callbacks(trainer: Trainer, task: LightningModule) -> None:
    """Refuse callbacks that cannot work here, or look for what has another name.

    Raises:
        ConfigurationError: Says what to use instead.
    """
    for finder in _callbacks(trainer, BatchSizeFinder):
        if not lightning_hasattr(task, finder._batch_arg_name):
            raise ConfigurationError(
                f"BatchSizeFinder looks for {finder._batch_arg_name}, but the size of a batch is "
                "data.batch_tokens: set its batch_arg_name to batch_tokens"
            )
    for rates in _callbacks(trainer, LearningRateFinder):
        if rates._attr_name and not lightning_hasattr(task, rates._attr_name):
            raise ConfigurationError(
                f"LearningRateFinder looks for {rates._attr_name}, but the rate of a task is lr: "
                "leave attr_name out"
            )
    if _callbacks(trainer, ModelPruning):
        raise ConfigurationError(
            "ModelPruning replaces weights in the forward of each layer, but here several layers "
            "share and read the same ones: prune what was trained, with torch.nn.utils.prune"
        )
    if _callbacks(trainer, BackboneFinetuning) and not hasattr(task, "backbone"):
        raise ConfigurationError(
            "BackboneFinetuning needs a task with a backbone: use model.freeze and "
            "model.layer_decay, or a subclass of BaseFinetuning"
        )


def monitored(trainer: Trainer) -> list[str]:
    """The metrics by which callbacks choose checkpoints and stop training."""
    stoppers, savers = _callbacks(trainer, EarlyStopping), _callbacks(trainer, ModelCheckpoint)
    names = [*(s.monitor for s in stoppers), *(s.monitor for s in savers)]
    return [name for name in names if name is not None]


def _callbacks(trainer: Any, kind: type[C]) -> list[C]:
    """The callbacks of a kind, which type checkers do not see on a trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]
