"""What every task does around an optimizer step: parameter groups, randomness, clipping, logs."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredPlateau
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tx_lightning.tasks.companions import AFTER_VALIDATION

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NO_DECAY = {"weight_decay": 0.0}
_EMBEDDING = re.compile(r"embedding|positions")


def configure_optimizers(
    network: nn.Module,
    optimizer: OptimizerCallable,
    scheduler: LRSchedulerCallable | None,
    *,
    layer_decay: float | None = None,
) -> dict[str, Any]:
    """Build the optimizer, weight decay on matrices only, and a schedule stepped every step.

    `ReduceLROnPlateau` is stepped after each validation instead, see `PlateauSteps`.

    Args:
        network: Its parameters are trained, but for frozen ones.
        optimizer: Builds the optimizer from parameter groups.
        scheduler: Builds the schedule from the optimizer; None: the rate is constant.
        layer_decay: The learning rate of each layer is that of the next one times this factor
            (Howard & Ruder 2018, section 3.2).

    Raises:
        ValueError: When `layer_decay` is not above 0 and at most 1, or a `ReduceLROnPlateau` for
            scores that should rise does not say which.
    """
    check_layer_decay(layer_decay)
    depths = parameter_depths(network)
    deepest = max(depths.values(), default=0)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            depth = depths[name] if layer_decay is not None else deepest
            members.setdefault((depth, parameter.dim() >= 2), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (_, is_matrix), parameters in sorted(members.items(), reverse=True):
        groups.append({"params": parameters} if is_matrix else {"params": parameters, **_NO_DECAY})
    built = optimizer(groups)
    if layer_decay is not None:
        for (depth, _), group in zip(
            sorted(members, reverse=True), built.param_groups, strict=True
        ):
            group["lr"] *= layer_decay ** (deepest - depth)
    if scheduler is None:
        return {"optimizer": built}
    schedule = scheduler(built)
    config: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
    if isinstance(schedule, ReduceLROnPlateau):
        config |= {"monitor": _monitor(schedule), "frequency": AFTER_VALIDATION}
    return {"optimizer": built, "lr_scheduler": config}


def _monitor(schedule: ReduceLROnPlateau) -> str:
    if isinstance(schedule, MonitoredPlateau):
        return schedule.monitor
    if schedule.mode != "min":
        raise ValueError(
            f"torch's ReduceLROnPlateau follows val/loss, which should fall, but mode is "
            f"{schedule.mode}: use lightning.pytorch.cli.ReduceLROnPlateau, which has a monitor"
        )
    return "val/loss"


def check_layer_decay(layer_decay: float | None) -> None:
    """Refuse a factor that is no share, before anything runs."""
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1")


def check_states(optimizers: Sequence[Optimizer]) -> None:
    """Refuse the state of a fused optimizer that is not of the shape of its parameter.

    The kernels do not look: they would read and write beyond the memory of a smaller one.

    Raises:
        ValueError: When a checkpoint brought such a state.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            for parameter in group["params"]:
                for name, value in optimizer.state[parameter].items():
                    shape = () if name == "step" else tuple(parameter.shape)
                    found = tuple(value.shape) if isinstance(value, Tensor) else type(value)
                    if value is not None and found != shape:
                        raise ValueError(
                            f"the checkpoint's optimizer state {name} of a parameter of shape "
                            f"{tuple(parameter.shape)} is {found}: it does not fit"
                        )


def parameter_depths(network: nn.Module) -> dict[str, int]:
    """Return how far up each parameter stands: embeddings 0, then the layers, then all above them.

    Encoder and decoder are counted side by side.
    """
    names = [name for name, _ in network.named_parameters()]
    layers = {name: int(match[1]) + 1 for name in names if (match := _LAYER.search(name))}
    top = max(layers.values(), default=0) + 1
    return {name: layers.get(name, 0 if _EMBEDDING.search(name) else top) for name in names}


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
    task: LightningModule, optimizer: Optimizer, max_norm: float | None, algorithm: str | None
) -> Tensor:
    """Clip the gradients and return their norm before; valid in every precision.

    With float16 gradient scaling, fused optimizers take scaled gradients: these are unscaled first,
    so that the norm is the true one. It is infinite where float16 overflowed, and the step is then
    skipped by the scaler.

    Args:
        task: Its parameters' gradients are clipped.
        optimizer: The optimizer that will step.
        max_norm: `trainer.gradient_clip_val`; None only measures.
        algorithm: `trainer.gradient_clip_algorithm`: "norm" (default) or "value".
    """
    scaler = gradient_scaler(task.trainer)
    if scaler is not None and _optimizer_handles_unscaling(optimizer):
        scaler.unscale_(optimizer)
    parameters = [p for p in task.parameters() if p.grad is not None]
    if algorithm == "value" and max_norm is not None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_value_(parameters, max_norm)
    else:
        limit = float("inf") if max_norm is None else max_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss in `trainer.precision=16-mixed`, None in every other precision."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def scale_gradients(module: nn.Module, factor: float) -> None:
    """Multiply the gradients of all parameters."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def selected(places: Tensor, *tables: Tensor) -> list[Tensor]:
    """Select rows of tables without waiting for the device: each (B, T, ...) -> (N, ...).

    Args:
        places: (N,), places in B x T.
        tables: Tensors whose first two dimensions are B and T.
    """
    return [table.flatten(0, 1).index_select(0, places) for table in tables]


def log_metrics(
    trainer: Trainer, metrics: Mapping[str, float], step: int, *, loggers: bool = True
) -> None:
    """Log numbers at once, and let callbacks monitor them.

    `LightningModule.log` costs 0.3 ms a number in every step; this is called on logging steps only.

    Args:
        trainer: Has the loggers and callbacks.
        metrics: Numbers by name.
        step: The optimizer step that they are of.
        loggers: Whether the loggers are told; they know it already when a run is resumed.
    """
    for logger in trainer.loggers if loggers else []:
        logger.log_metrics(dict(metrics), step=step)
    trainer.callback_metrics.update(
        {
            name: torch.tensor(value, dtype=torch.float64, device="cpu")
            for name, value in metrics.items()
        }
    )
