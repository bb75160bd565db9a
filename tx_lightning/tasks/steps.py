"""What every task does around an optimizer step: parameter groups, randomness, clipping."""

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


def configure_optimizers(
    network: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> dict[str, Any]:
    """Build the optimizer, weight decay on matrices only, and a schedule stepped every step."""
    matrices = [p for p in network.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in network.parameters() if p.requires_grad and p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    built = optimizer([group for group in groups if group["params"]])
    if scheduler is None:
        return {"optimizer": built}
    schedule = scheduler(built)
    if isinstance(schedule, ReduceLROnPlateau):
        return {
            "optimizer": built,
            "lr_scheduler": {"scheduler": schedule, "interval": "epoch", "monitor": "val/loss"},
        }
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def seed_batch(trainer: Trainer, batch_idx: int) -> None:
    """Seed torch for one training batch: a pure function of seed, epoch, step and part of the step.

    The parts of an optimizer step are numbered over processes and accumulated micro-batches alike,
    so that dropout differs among them, is the same after a resume, and does not depend on how the
    parts are spread.
    """
    step, accumulated = divmod(batch_idx, trainer.accumulate_grad_batches)
    part = accumulated * trainer.world_size + trainer.global_rank
    run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    entropy = np.random.SeedSequence([run_seed, trainer.current_epoch, step, part])
    seed = int(entropy.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def clip_gradients(
    task: LightningModule, max_norm: float | None, algorithm: str | None
) -> Tensor | None:
    """Clip the gradients and return their norm before; valid for fused optimizers and bfloat16.

    Args:
        task: Its parameters' gradients are clipped.
        max_norm: `trainer.gradient_clip_val`; None only measures.
        algorithm: `trainer.gradient_clip_algorithm`: "norm" (default) or "value".

    Raises:
        ValueError: With float16 gradient scaling, under which the norm of a fused optimizer's
            gradients is not the true one.
    """
    if task.trainer.precision == "16-mixed":
        raise ValueError(
            "trainer.precision=16-mixed scales gradients, so that their norm cannot be clipped or "
            "logged exactly: use bf16-mixed or 32-true"
        )
    parameters = [p for p in task.parameters() if p.grad is not None]
    if algorithm == "value" and max_norm is not None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_value_(parameters, max_norm)
        return norm
    return torch.nn.utils.clip_grad_norm_(
        parameters, float("inf") if max_norm is None else max_norm
    )
