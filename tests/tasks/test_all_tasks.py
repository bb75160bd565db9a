"""What holds for every task there is, whoever builds the trainer."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import tx_lightning.tasks
from tests.small import MAKERS, make, make_trainer, sgd
from tx_lightning.tasks.task import Task

VALIDATED: dict[str, Any] = {
    "limit_val_batches": 1,
    "val_check_interval": 3,
    "check_val_every_n_epoch": None,
}


def concrete(kind: type) -> bool:
    """Whether a class has a body for each of its methods; LightningModule is no ABC."""
    methods = (inspect.getattr_static(kind, name) for name in dir(kind))
    return not any(vars(m).get("__isabstractmethod__") for m in methods if inspect.isfunction(m))


def test_every_task_is_made_here() -> None:
    found: set[str] = set()
    waiting: list[type] = [Task]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("tx_lightning.") and concrete(kind):
            found.add(kind.__name__)
    assert found == MAKERS.keys()
    assert found == set(tx_lightning.tasks.__all__) - {"Task"}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_precision_trains_and_validates(name: str, precision: str, tmp_path: Path) -> None:
    task, data = make(name, optimizer=sgd)
    trainer = make_trainer(tmp_path, precision=precision, **VALIDATED)
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 3
    losses = {name: trainer.callback_metrics[name] for name in ("train/loss", "val/loss")}
    assert all(loss.isfinite() for loss in losses.values()), losses
    kinds = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    assert {p.dtype for p in task.network.parameters()} == {kinds.get(precision, torch.float32)}
