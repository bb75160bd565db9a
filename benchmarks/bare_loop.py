"""Other training loops that take turns with `fit` in the same process.

On a shared machine two runs one after the other differ by more than what is to be measured, so the
two alternate every few steps. The bare PyTorch loop trains a copy of the same network, and each of
its turns covers the very batches of the other's turn.
"""

import copy
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from tx_lightning.data import TranslationData
from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.sampler import StepSampler
from tx_lightning.data.tokenizers import PAD
from tx_lightning.losses import linear_cross_entropy
from tx_lightning.tasks import Translation
from tx_lightning.tasks.steps import configure_optimizers


class Turns(Callback, ABC):
    """Before each turn of `fit`, runs as many steps of another loop.

    A turn in which an epoch ends is left out on both sides: there `fit` validates and saves. The
    first turn warms both up and is left out too.

    Args:
        turn: Steps of one turn.
        results: JSON file for the seconds of each turn: {"turn", "fit": [...], "bare": [...]}.
    """

    def __init__(self, turn: int, results: str) -> None:
        self.turn = turn
        self.results = Path(results)
        self.seconds: dict[str, list[float]] = {"fit": [], "bare": []}
        self._steps = 0
        self._started = 0.0  # when the current turn of fit began
        self._last_bare = 0.0  # seconds of the bare turn before it
        self._epoch_ended = True  # the first turn does not count

    @abstractmethod
    def loop(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """The other loop, one step at a time."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loop = self.loop(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps % self.turn == 0:
            ended = self._clock(pl_module)
            if self._steps and not self._epoch_ended:
                self.seconds["fit"].append(ended - self._started)
                self.seconds["bare"].append(self._last_bare)
            if self._steps:
                self._epoch_ended = False
            for _ in range(self.turn):
                next(self._loop)
            self._started = self._clock(pl_module)
            self._last_bare = self._started - ended
        self._steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results.write_text(json.dumps({"turn": self.turn, **self.seconds}), "utf-8")

    def _clock(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class BareLoop(Turns):
    """The loop that a person would write without a framework, on a copy of a translation network.

    Args:
        turn: Steps of one turn.
        results: JSON file for the seconds of each turn.
    """

    def loop(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        task = pl_module
        assert isinstance(task, Translation)
        network = copy.deepcopy(task.network)
        device, clip = task.device, trainer.gradient_clip_val
        mixed = trainer.precision == "bf16-mixed"
        optimizer = configure_optimizers(network, task.optimizer, None)["optimizer"]
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4000))
        data = trainer.datamodule  # type: ignore[attr-defined]  # set when fit begins
        assert isinstance(data, TranslationData)
        for batch in batches(data):
            batch = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                hidden = network.hidden(batch.source, batch.target[:, :-1])
                labels = batch.target[:, 1:]
                real = labels != PAD
                loss = linear_cross_entropy(
                    hidden[real], network.output_weight, labels[real], task.label_smoothing
                ).loss
            (loss / batch.step_tokens).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            yield


def batches(data: TranslationData) -> Iterator[TranslationBatch]:
    """The training batches of all epochs, in the order of fit."""
    loader = data.train_dataloader()
    sampler = loader.batch_sampler
    assert isinstance(sampler, StepSampler)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader
