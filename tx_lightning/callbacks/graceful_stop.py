"""Ctrl-C, SIGTERM and SIGUSR1 end training at a step boundary, with a checkpoint.

What is said last is how to go on.
"""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tx_lightning.runs import CHECKPOINTS

ASK_EVERY = 8  # steps between two agreements of several processes, which cost a collective each
# Ctrl-C; what a machine that goes down sends; what SLURM sends on request before it preempts a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """Training was asked to stop by a signal, and did at a step boundary."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class GracefulStop(Callback):
    """Saves `checkpoints/interrupted.ckpt` and ends training when a signal asks for it.

    The handlers only take a note; the processes agree at a step boundary, or when a validation
    ends. A second Ctrl-C does not wait for that.

    Args:
        folder: The run folder.
        resume: The command that goes on with the run.
    """

    def __init__(self, folder: Path, resume: str) -> None:
        self.folder = folder
        self.resume = resume
        self.checkpoint = folder / CHECKPOINTS / "interrupted.ckpt"
        self._asked: int = 0
        self._step = -1

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            # Lightning asks all processes before every batch, more than a millisecond each.
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return  # inside an accumulation window: its gradients would be lost
        self._step = trainer.global_step
        if trainer.world_size == 1 or self._step % ASK_EVERY == 0:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_asked(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.checkpoint.unlink(missing_ok=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not trainer.is_global_zero or not any((self.folder / CHECKPOINTS).glob("*.ckpt")):
            return
        go_on = f"to go on: {self.resume}"
        print(f"\nstopped at step {trainer.global_step}; {go_on}", file=sys.stderr, flush=True)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signum

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = bool(self._asked)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.checkpoint)
        raise Interrupted(self._asked or signal.SIGTERM)


def _nothing() -> None:
    """What is left to do where GracefulStop has agreed already."""
