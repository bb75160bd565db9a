"""Run the largest batch before the first, so that memory that does not suffice shows at once."""

from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.fsdp import FSDPModule

from tx_lightning.callbacks.modes import mode
from tx_lightning.data.batches import Batch


@runtime_checkable
class HasLargestBatch(Protocol):
    """A datamodule that knows the largest batch of its training, and the budget that bounds it."""

    batch_tokens: int

    def largest_batch(self) -> Batch:
        """Return this process's part of it."""


class BatchTooLarge(ValueError):
    """The largest training batch does not fit into memory; the message says what to lower."""


class LongestBatch(Callback):
    """Run forward and backward on the largest training batch before training starts.

    Nothing comes of it: parameters, gradients, optimizer, metrics and random numbers stay as they
    were. What the optimizer itself keeps, as Adam its moments, is allocated by the first step and
    not counted.

    Raises:
        BatchTooLarge: When the memory of the device does not suffice.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HasLargestBatch):
            raise ValueError(
                f"LongestBatch needs data with largest_batch(), which {type(data).__name__} lacks: "
                "use a data module of this package or remove the callback"
            )
        batch = data.largest_batch()
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        try:
            with (
                isolate_rng(),
                mode(pl_module, training=True),
                trainer.precision_plugin.forward_context(),
            ):
                loss = pl_module(trainer.strategy.batch_to_device(batch)).loss
                if isinstance(pl_module, FSDPModule):  # shards have no gradient without it
                    loss.backward()
                    pl_module.zero_grad()
                else:
                    # Unlike backward(), it leaves .grad alone and starts no exchange.
                    torch.autograd.grad(loss, parameters, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise BatchTooLarge(
                f"data.batch_tokens={data.batch_tokens} is too much for the memory of "
                f"{trainer.strategy.root_device}: the largest training batch ({batch.describe()}) "
                "does not fit; lower it, or raise trainer.accumulate_grad_batches, which splits "
                "each batch"
            ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)  # what torch says on the CPU
