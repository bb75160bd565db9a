import random
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tx_lightning.callbacks import LongestBatch
from tx_lightning.callbacks.longest_batch import BatchTooLarge
from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.translation import TranslationData
from tx_lightning.losses import TokenLoss
from tx_lightning.tasks import Translation

MakeTrainer = Callable[..., Trainer]


def everything(task: Translation) -> list[Any]:
    """Return all that training goes on from."""
    return [
        [p.detach().clone() for p in task.parameters()],
        [p.grad for p in task.parameters()],
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.from_numpy(np.random.get_state(legacy=False)["state"]["key"].astype(np.int64)),  # noqa: NPY002
        [child.training for child in task.modules()],
        task._train_sums,
        task._step_sums,
    ]


class Compare(Callback):
    """Looks at the task before and after another callback's `on_fit_start`."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.batches: list[TranslationBatch] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Translation)
        pl_module.network.decoder.eval()  # a mode that differs from the rest
        before = everything(pl_module)
        hook = pl_module.register_forward_pre_hook(lambda _, inputs: self.see(pl_module, *inputs))
        self.callback.on_fit_start(trainer, pl_module)
        hook.remove()
        torch.testing.assert_close(everything(pl_module), before, rtol=0, atol=0)
        pl_module.network.decoder.train()

    def see(self, task: Translation, batch: TranslationBatch) -> None:
        assert all(child.training for child in task.modules())
        self.batches.append(batch)


def test_runs_the_largest_batch_and_leaves_no_trace(
    task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    compare = Compare(LongestBatch())
    trainer(compare, max_steps=1).fit(task, data)
    [batch] = compare.batches
    assert torch.equal(batch.source, data.largest_batch().source)
    assert batch.rows > 1


def test_training_is_the_same_with_it(
    data: TranslationData, trainer: MakeTrainer, task: Translation
) -> None:
    start = {name: value.clone() for name, value in task.state_dict().items()}
    trainer().fit(task, data)
    without = {name: value.clone() for name, value in task.state_dict().items()}
    task.load_state_dict(start)
    trainer(LongestBatch()).fit(task, data)
    torch.testing.assert_close(task.state_dict(), without, rtol=0, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_too_little_memory_names_the_budget(
    error: Exception,
    task: Translation,
    data: TranslationData,
    trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = copy(error)  # parameters live on, and a raised one holds what its frames hold

    def fail(batch: TranslationBatch) -> TokenLoss:
        raise error

    monkeypatch.setattr(task, "forward", fail)
    with pytest.raises(
        BatchTooLarge, match=r"data\.batch_tokens=160 is too much .* of cpu"
    ) as info:
        trainer(LongestBatch()).fit(task, data)
    assert "trainer.accumulate_grad_batches" in str(info.value)
    assert info.value.__cause__ is error


def test_another_error_stays_what_it_is(
    task: Translation, data: TranslationData, trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: TranslationBatch) -> TokenLoss:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(task, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer(LongestBatch()).fit(task, data)


def test_data_without_a_largest_batch_is_refused(task: Translation, trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"needs data with largest_batch\(\), which NoneType"):
        LongestBatch().on_fit_start(trainer(), task)
