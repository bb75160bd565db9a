import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from tx_lightning.callbacks import Throughput, throughput
from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.tokenizers import PAD
from tx_lightning.data.translation import TranslationData
from tx_lightning.tasks import Translation


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Ranks:
    """What the callback uses of a trainer, with a strategy of three processes alike."""

    def __init__(self, logger: Any, every: int) -> None:
        self.global_step = 0
        self.log_every_n_steps = every
        self.loggers = [logger]
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)
        self.collectives = 0

    def reduce(self, counts: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        self.collectives += 1
        return counts * 3


def batch(source_length: int, target_length: int, rows: int, padding: int) -> TranslationBatch:
    source = torch.full((rows, source_length), 7)
    target = torch.full((rows, target_length + 1), 7)
    source[0, source_length - padding :] = PAD
    return TranslationBatch(
        source=source,
        target=target,
        places=torch.arange(rows * target_length),
        indices=list(range(rows)),
        source_text=[],
        target_text=[],
        step_tokens=1,
        parts=1,
        source_tokens=rows * source_length - padding,
        target_tokens=rows * target_length,
    )


def step(callback: Throughput, trainer: Any, clock: Clock, seconds: float, done: bool) -> None:
    callback.on_train_batch_start()
    clock.now += seconds
    trainer.global_step += done
    callback.on_train_batch_end(trainer, None, None, batch(5, 4, 2, padding=3), 0)  # type: ignore[arg-type]


def test_rates_of_two_accumulated_steps_on_three_processes(clock: Clock, recorder: Any) -> None:
    trainer: Any = Ranks(recorder, every=2)
    callback = Throughput()
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for _ in range(2):
        for done in (False, True):
            step(callback, trainer, clock, 1.0, done)
            clock.now += 0.5  # waiting for data
    seconds = 4 * 1.0 + 3 * 0.5
    assert recorder.rows == [
        (
            2,
            {
                "train/tokens_per_second": pytest.approx(3 * 4 * 8 / seconds),
                "train/source_tokens_per_second": pytest.approx(3 * 4 * 7 / seconds),
                "train/padding_share": pytest.approx(3 / 18),
                "train/step_time": pytest.approx(seconds / 2),
            },
        )
    ]
    assert trainer.collectives == 1


def test_each_window_starts_anew_and_validation_does_not_count(clock: Clock, recorder: Any) -> None:
    trainer: Any = Ranks(recorder, every=1)
    callback = Throughput()
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    clock.now += 1000  # before the first step
    step(callback, trainer, clock, 2.0, True)
    clock.now += 1.0
    callback.on_validation_start(trainer, None)  # type: ignore[arg-type]
    clock.now += 1000
    step(callback, trainer, clock, 4.0, True)
    times = [row["train/step_time"] for _, row in recorder.rows]
    assert times == pytest.approx([2.0, 1.0 + 4.0])


def test_training_starts_anew_after_another(clock: Clock, recorder: Any) -> None:
    trainer: Any = Ranks(recorder, every=3)
    callback = Throughput()
    for _ in range(2):
        trainer.global_step = 0
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
        step(callback, trainer, clock, 1.0, True)
        clock.now += 1000
    step(callback, trainer, clock, 1.0, True)
    step(callback, trainer, clock, 1.0, True)
    assert recorder.rows[0][1]["train/step_time"] == pytest.approx(1002 / 3 + 1 / 3)


class Count(Callback):
    """Counts from the tensors what the batches say of themselves."""

    def __init__(self) -> None:
        self.tokens = self.positions = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: TranslationBatch, i: int
    ) -> None:
        source, target = batch.source, batch.target[:, 1:]
        self.tokens += int((source != PAD).sum() + (target != PAD).sum())
        self.positions += source.numel() + target.numel()


def test_in_a_real_fit(
    task: Translation, data: TranslationData, trainer: Callable[..., Trainer], recorder: Any
) -> None:
    count = Count()
    started = time.perf_counter()
    fit = trainer(Throughput(), count, logger=recorder, log_every_n_steps=4)
    fit.fit(task, data)
    elapsed = time.perf_counter() - started
    [(logged_at, row)] = recorder.named("train/step_time")
    [(_, share)] = recorder.named("train/padding_share")
    [(_, rate)] = recorder.named("train/tokens_per_second")
    assert logged_at == 4
    assert share["train/padding_share"] == pytest.approx(1 - count.tokens / count.positions)
    assert 0 < row["train/step_time"] < elapsed / 4
    assert rate["train/tokens_per_second"] > 0
