"""How fast training is, measured without slowing it."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tx_lightning.data.batches import Batch

TIMINGS = (
    "train/tokens_per_second",
    "train/source_tokens_per_second",
    "train/step_time",
)  # metrics that differ between two runs of the same


class Throughput(Callback):
    """Log tokens per second, the share of padding and the time of an optimizer step.

    On every logging step it logs, over the steps since the last one and over all processes:
    `train/tokens_per_second` (target tokens of a translation, else those that are read),
    `train/source_tokens_per_second` where there is a source, `train/padding_share` (of all
    positions, how many hold no token) and `train/step_time` (seconds per optimizer step). Waiting
    for data counts; validation does not, nor does what follows it up to the next step. Between
    logging steps it only adds integers.
    """

    def __init__(self) -> None:
        self._started: float | None = None  # None while the clock is stopped
        self._forget()

    def _forget(self) -> None:
        self._seconds = 0.0
        self._steps = 0
        self._source_tokens = self._target_tokens = self._positions = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = None
        self._step = trainer.global_step
        self._forget()

    def on_train_batch_start(self, *_: Any) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._source_tokens += batch.read_tokens
        self._target_tokens += batch.tokens
        self._positions += batch.positions
        if trainer.global_step == self._step:
            return  # still accumulating
        self._step = trainer.global_step
        self._steps += 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self._step % every == 0:
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock(trainer)

    def _stop_clock(self, trainer: Trainer) -> None:
        """Add the time since the clock was started, when the device has done its work."""
        if self._started is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._seconds += time.perf_counter() - self._started
        self._started = None

    def _log(self, trainer: Trainer) -> None:
        self._stop_clock(trainer)
        self._started = time.perf_counter()
        counts = torch.tensor(
            [self._source_tokens, self._target_tokens, self._positions],
            device=trainer.strategy.root_device,
        )
        source, target, positions = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        metrics = {
            "train/tokens_per_second": target / self._seconds,
            "train/padding_share": 1 - (source + target) / positions,
            "train/step_time": self._seconds / self._steps,
        }
        if source:
            metrics["train/source_tokens_per_second"] = source / self._seconds
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)
        self._forget()
