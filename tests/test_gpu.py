"""What needs an NVIDIA GPU: `pytest -m gpu`, or all of it with benchmarks/gpu.sh."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import MAKERS, make, make_trainer
from tx_lightning.decoding import Beam, Decoding, Greedy, Sampling
from tx_lightning.nn.attention import fused_attention, naive_attention
from tx_lightning.tasks import LanguageModeling, Translation
from tx_lightning.tasks.continuation import continue_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two NVIDIA GPUs")

CUDA: dict[str, Any] = {
    "accelerator": "gpu",
    "devices": 1,
    "limit_val_batches": 1,
    "val_check_interval": 3,
    "check_val_every_n_epoch": None,
}
TEXTS = ["Das Kind tanzt .", "", "Die alte Frau hat das Buch gelesen .", "Er schläft ."]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_task_trains_in_each_precision(name: str, precision: str, tmp_path: Path) -> None:
    task, data = make(name)
    trainer = make_trainer(tmp_path, precision=precision, gradient_clip_val=1.0, **CUDA)
    trainer.fit(task, datamodule=data)
    assert trainer.callback_metrics["val/loss"].isfinite()
    trainer.test(task, datamodule=data, verbose=False)
    assert trainer.callback_metrics["test/loss"].isfinite()


@pytest.mark.parametrize("name", MAKERS)
def test_each_task_trains_compiled(name: str, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        task, data = make(name)
        if compiled:
            task.network.compile()
        trainer = make_trainer(tmp_path, **CUDA)
        trainer.fit(task, datamodule=data)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_the_gpu_takes_the_steps_of_the_cpu(name: str, tmp_path: Path) -> None:
    losses = []
    for options in ({**CUDA, "accelerator": "cpu"}, CUDA):
        task, data = make(name)
        trainer = make_trainer(tmp_path, **options)
        trainer.fit(task, datamodule=data)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_training_step_never_waits_for_the_device(name: str) -> None:
    task, data = make(name)
    data.prepare_data()
    data.setup()
    task.attach(data.tokenizers)
    task = task.cuda()
    batches = [batch.to("cuda") for batch in itertools.islice(data.train_dataloader(), 3)]
    for number, batch in enumerate(batches):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one warms up
        try:
            task(batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("search", [Greedy(), Beam(beam_size=4), Sampling(n_samples=2, seed=5)])
def test_translations_are_those_of_the_cpu(search: Decoding) -> None:
    task, data = make("Translation")
    assert isinstance(task, Translation)
    data.prepare_data()
    task.attach(data.tokenizers)
    on_cpu = [[h.tokens for h in found] for found in task.translate(TEXTS, search)]
    on_gpu = [[h.tokens for h in found] for found in task.cuda().translate(TEXTS, search)]
    assert on_cpu == on_gpu


def test_continuations_are_those_of_the_cpu() -> None:
    task, data = make("LanguageModeling")
    assert isinstance(task, LanguageModeling)
    data.prepare_data()
    task.attach(data.tokenizers)

    def continued() -> list[list[int]]:
        found = continue_texts(
            task.network,
            task.tokenizer,
            ["The old", "A child"],
            Greedy(),
            max_new_tokens=20,
            past_context="slide",
        )
        return [best.tokens for best, *_ in found]

    on_cpu = continued()
    task.cuda()
    assert continued() == on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_is_the_naive_one(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 33, 16, device="cuda", dtype=dtype) for _ in range(3))
    expected, _ = naive_attention(q.float(), k.float(), v.float(), causal=causal)
    found = fused_attention(q, k, v, None, causal, 0.0)
    assert torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_run_goes_on_on_the_other_device(first: str, tmp_path: Path) -> None:
    other = {"gpu": "cpu", "cpu": "gpu"}[first]
    losses = []
    for devices in ((first, first), (first, other)):
        saved = tmp_path / "saved.ckpt"
        for steps, device, start in ((3, devices[0], None), (6, devices[1], saved)):
            task, data = make("Translation")
            trainer = make_trainer(tmp_path, **{**CUDA, "accelerator": device, "max_steps": steps})
            trainer.fit(task, datamodule=data, ckpt_path=start)
            trainer.save_checkpoint(saved)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@TWO
@pytest.mark.parametrize("name", MAKERS)
def test_two_gpus_take_the_steps_of_one(name: str, tmp_path: Path) -> None:
    losses = []
    for devices in (1, 2):
        task, data = make(name)
        options = {**CUDA, "devices": devices, "strategy": "ddp_spawn" if devices > 1 else "auto"}
        trainer = make_trainer(tmp_path, **options)
        trainer.fit(task, datamodule=data)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
