"""The progress bar is drawn by the clock, and always at the end of an epoch."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from tx_lightning.callbacks.progress_bar import ProgressBar
from tx_lightning.data import TranslationData
from tx_lightning.tasks import Translation


@pytest.mark.parametrize("seconds", [0.021, 10.0])
def test_drawn_at_most_ten_times_a_second(
    seconds: float,
    task: Translation,
    data: TranslationData,
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    drawn: list[int] = []

    def draw(_: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        drawn.append(batch_idx)

    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", draw)
    fit = trainer(ProgressBar(), enable_progress_bar=True, max_steps=-1, max_epochs=1)
    fit.fit(task, datamodule=data)
    last = int(fit.num_training_batches) - 1
    assert last == 4
    assert drawn == (list(range(last + 1)) if seconds > 1 else [0, last])
