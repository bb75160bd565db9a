"""Lightning's progress bar, which is otherwise drawn in every step."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

_INTERVAL = 0.1  # seconds


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn at most ten times a second in training, and at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = float("-inf")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if now - self._drawn >= _INTERVAL or batch_idx + 1 == self.train_progress_bar.total:
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
