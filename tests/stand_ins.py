"""A task and data so small that a run takes no time; class paths in tests name them."""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tx_lightning.checkpoints import checkpoint_record
from tx_lightning.metrics import CorpusBLEU
from tx_lightning.sharding import whole
from tx_lightning.tasks.task import Task

TRUST = ["--trust", "tests"]  # consent to these classes


class TinyTask(LightningModule):
    """Pulls a linear layer to zero.

    Args:
        vocab_size: Outputs.
        dim: Inputs.
        lr: Learning rate.
    """

    def __init__(self, vocab_size: int, dim: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim={dim} must be even")
        self.settings: dict[str, Any] | None = None
        self.tokenizers: dict[str, str] | None = {"source": "{}", "target": "{}"}
        self.lr = lr
        self.layer = nn.Linear(dim, vocab_size)
        self.scores = CorpusBLEU()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean())
        self.log("val/bleu", float(min(self.trainer.global_step, 30)))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tx_lightning"] = checkpoint_record(self.settings, self.tokenizers)


class TinyData(LightningDataModule):
    """Equal rows, so that weights depend on the number of steps alone.

    Args:
        vocab_size: What the task's follows.
        seed: What `seed_everything` sets.
        batches: Rows, one a batch.
    """

    def __init__(self, vocab_size: int = 6, seed: int = 0, batches: int = 10) -> None:
        super().__init__()
        self.batches = batches
        self.statistics: dict[str, int | float | str] = {"pairs": batches}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.ones(self.batches, 4)))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.train_dataloader()

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.train_dataloader()


class SignalAt(Callback):
    """Sends a signal to its own process in the middle of a step.

    Args:
        batch: After how many batches of the run.
        name: As SIGTERM.
    """

    def __init__(self, batch: int, name: str) -> None:
        self.batch = batch
        self.signum = signal.Signals[name]
        self.seen = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == self.batch:
            os.kill(os.getpid(), self.signum)


class KillAt(Callback):
    """Kills the process at the moment that $KILL_AT names, as "validation:20"; $PAUSE slows it.

    It is the first one that is not before the number: `window:S` is between the micro-batches of
    step S, `epoch_end:S` the end of an epoch, S steps or more into the run, `validation:S` in the
    validation after step S, `saving:S` when half of a checkpoint of step S is written. `crash:S` is
    no kill, but an error in step S, on the last process; `first_crashes:S` on the first. The pause
    is in seconds, before each batch: time for a test to do something.
    """

    def __init__(self) -> None:
        moment, _, number = os.environ.get("KILL_AT", "").partition(":")
        self._moment, self._number = moment, int(number or 0)

    def _now(self, moment: str, trainer: Trainer) -> bool:
        return moment == self._moment and trainer.global_step >= self._number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(float(os.environ.get("PAUSE", "0")))
        last = trainer.global_rank == trainer.world_size - 1
        if last and self._now("crash", trainer):
            raise RuntimeError("crashed on purpose")
        if trainer.is_global_zero and self._now("first_crashes", trainer):
            raise RuntimeError("crashed on purpose")
        if batch_idx % trainer.accumulate_grad_batches and self._now("window", trainer):
            _die()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._now("epoch_end", trainer):
            _die()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        if self._now("validation", trainer):
            _die()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._now("saving", trainer):
            write = torch.save

            def half(checkpoint: Any, file: Any) -> None:
                write(checkpoint, file)
                file.flush()
                os.ftruncate(file.fileno(), file.tell() // 2)
                _die()

            torch.save = half  # type: ignore[assignment]


class Recorder(Callback):
    """Keeps what each process computed, in files of its own in the run folder.

    `batches-<rank>.jsonl` has a line (epoch, step, positions in the split) for each micro-batch;
    `recorded-<rank>.pt`, written at the end, `gradients`, before clipping, and `norms`, which
    clipping saw, of each optimizer step, `evaluated`, the examples of each validation, and `held`,
    how many parameters this process has.
    """

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.norms: list[float] = []
        self.evaluated: list[tuple[int, list[int]]] = []
        self.held = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        examples = batch.indices if batch.loss_tokens else []  # none is real where one was lent
        line = json.dumps([trainer.current_epoch, trainer.global_step, examples])
        name = f"batches-{trainer.global_rank}.jsonl"
        with (Path(trainer.default_root_dir) / name).open("a") as file:
            file.write(f"{line}\n")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        parameters = list(pl_module.parameters())
        found = [whole(p.grad).flatten() for p in parameters if p.grad is not None]
        self.gradients.append(torch.cat(found).clone())
        self.held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Task)
        if len(self.norms) < len(self.gradients) and pl_module._grad_norm is not None:
            self.norms.append(float(pl_module._grad_norm))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        self.evaluated.append((trainer.global_step, batch.indices))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        kept = {
            "gradients": self.gradients,
            "norms": self.norms,
            "evaluated": self.evaluated,
            "held": self.held,
        }
        torch.save(kept, folder / f"recorded-{trainer.global_rank}.pt")


def steps(run: Path) -> dict[tuple[int, int], list[int]]:
    """The examples of each (epoch, step) of a run with a Recorder; of steps taken again, all."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in run.glob("batches-*.jsonl"):
        for line in path.read_text().splitlines():
            epoch, step, examples = json.loads(line)
            found.setdefault((epoch, step), []).extend(examples)
    return {step: sorted(examples) for step, examples in sorted(found.items())}


def free_port() -> int:
    """A port that nobody takes before it is used.

    Not one that the system chooses: it might give that to another process as well. The range below
    those is divided by process id.
    """
    for port in itertools.count(10_000 + os.getpid() * 20 % 20_000):
        with socket.socket() as tried:
            with contextlib.suppress(OSError):
                tried.bind(("127.0.0.1", port))
                return port
    raise AssertionError("unreachable")


def fit_each(files: list[str]) -> None:
    """Run fit on each file in this process, which torchrun may have started; names its folder."""
    from tx_lightning.__main__ import main

    for file in files:
        words = [
            "fit",
            "--config",
            file,
            "--trainer.default_root_dir",
            str(Path(file).with_suffix("")),
        ]
        if status := main(words):
            raise SystemExit(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    fit_each(sys.argv[1:])
