from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tx_lightning.averaging import average_checkpoints
from tx_lightning.callbacks import CheckpointAveraging
from tx_lightning.checkpoints import checkpoint_record


class Climber(LightningModule):
    """Its weight is the number of steps taken; validation is best at step 4."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return -self.weight

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self.weight - 4).abs())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/weight", self.weight)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tx_lightning"] = checkpoint_record(None, None)
        loss = self.trainer.callback_metrics["val/loss"]
        checkpoint["metrics"] = {"val/loss": float(loss)}

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=1.0)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(1)))


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=7,
        callbacks=list(callbacks),
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def keep_all(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", save_top_k=-1, filename="{step}")


@pytest.mark.parametrize(("best", "mean"), [(None, 6.0), ("val/loss", 4.0)])
def test_fit_ends_with_the_average_which_test_loads(
    best: str | None, mean: float, tmp_path: Path
) -> None:
    fitted = trainer(tmp_path, CheckpointAveraging(3, best), keep_all(tmp_path))
    fitted.fit(Climber(), loader(), loader())
    averaged = tmp_path / "checkpoints" / "averaged.ckpt"
    results = trainer(tmp_path, enable_checkpointing=False).test(
        Climber(), loader(), ckpt_path=averaged, verbose=False
    )
    assert results == [{"test/weight": mean}]


def test_equals_the_plain_function(tmp_path: Path) -> None:
    trainer(tmp_path, CheckpointAveraging(2), keep_all(tmp_path)).fit(Climber(), loader(), loader())
    folder = tmp_path / "checkpoints"
    average_checkpoints([folder / "step=6.ckpt", folder / "step=7.ckpt"], tmp_path / "mean.ckpt")
    assert (tmp_path / "mean.ckpt").read_bytes()
    one, two = (
        torch.load(path, weights_only=True)
        for path in (tmp_path / "mean.ckpt", folder / "averaged.ckpt")
    )
    assert one == two


def test_training_does_not_go_on_from_an_average(tmp_path: Path) -> None:
    trainer(tmp_path, CheckpointAveraging(2), keep_all(tmp_path)).fit(Climber(), loader(), loader())
    averaged = tmp_path / "checkpoints" / "averaged.ckpt"
    with pytest.raises(KeyError, match="only the model"):
        trainer(tmp_path, enable_checkpointing=False).fit(
            Climber(), loader(), loader(), ckpt_path=averaged
        )


def test_without_checkpoints_it_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add a ModelCheckpoint"):
        trainer(tmp_path, CheckpointAveraging(2), enable_checkpointing=False).fit(
            Climber(), loader(), loader()
        )


def test_a_development_run_has_nothing_to_average(tmp_path: Path) -> None:
    trainer(tmp_path, CheckpointAveraging(2), fast_dev_run=True).fit(Climber(), loader(), loader())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="n=0 of CheckpointAveraging"):
        CheckpointAveraging(0)
