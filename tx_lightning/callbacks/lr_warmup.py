"""Linear learning-rate warmup on top of whatever schedule is configured."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tx_lightning.nn.checks import check_size
from tx_lightning.tasks.resuming import FROM_CONFIGURATION

Rates = list[list[float]]  # per optimizer, per parameter group


class LRWarmup(Callback):
    """Multiply the schedule's learning rate by step / warmup_steps during the first steps.

    It composes with every schedule of torch, and with none. The schedule does not see the factor:
    it reads and writes its own rate, also where it computes the next from the last. At all other
    times the optimizer holds the rate that is used, which is what `LearningRateMonitor` logs.
    A step is an optimizer step, however many batches it accumulates. With
    `InverseSquareRoot(reference_step=warmup_steps)` this is Vaswani et al. 2017, eq. 3.

    Args:
        warmup_steps: The first optimizer step with the schedule's full rate; 0 for no warmup.

    Raises:
        ValueError: When `warmup_steps` is negative.
    """

    def __init__(self, warmup_steps: int = 4000) -> None:
        if warmup_steps < 0:
            raise ValueError(
                f"warmup_steps={warmup_steps} of LRWarmup must not be negative: "
                "give a number of optimizer steps, 0 for no warmup"
            )
        check_size("warmup_steps", warmup_steps, least=0)
        self.warmup_steps = warmup_steps
        self._scheduled: Rates | None = None  # the schedule's rates while the optimizer's are less
        self._rates_replaced = False  # in the checkpoint that training resumes from

    def factor(self, step: int) -> float:
        """Return what the rate of an optimizer step, counted from 1, is multiplied by."""
        return 1.0 if step >= self.warmup_steps else step / self.warmup_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cool(trainer)  # when resumed: the checkpoint's optimizer holds the lowered rates
        if not self._warm(trainer):
            return
        step_scheduler = type(pl_module).lr_scheduler_step

        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            self._cool(trainer)
            step_scheduler(pl_module, scheduler, metric)
            self._warm(trainer)

        # The trainer has no callback hook around a scheduler's step; it calls this method.
        vars(pl_module)["lr_scheduler_step"] = lr_scheduler_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._scheduled is None:
            return
        self._cool(trainer)
        if not self._warm(trainer):
            self._release(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's rates, which the checkpoint's optimizer does not hold."""
        return {"scheduled": self._scheduled}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._rates_replaced = checkpoint.get(FROM_CONFIGURATION, False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduled = None if self._rates_replaced else state_dict["scheduled"]

    def _warm(self, trainer: Trainer) -> bool:
        """Lower the rates for the next optimizer step; return whether it is one of the warmup."""
        factor = self.factor(trainer.global_step + 1)
        if factor == 1:
            return False
        self._scheduled = _read(trainer)
        _write(trainer, [[rate * factor for rate in rates] for rates in self._scheduled])
        return True

    def _cool(self, trainer: Trainer) -> None:
        """Give the optimizer its schedule's own rates."""
        if self._scheduled is not None:
            _write(trainer, self._scheduled)
            self._scheduled = None

    def _release(self, pl_module: LightningModule) -> bool:
        """Give the module its own method back; return whether it was replaced."""
        return vars(pl_module).pop("lr_scheduler_step", None) is not None

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._release(pl_module):
            self._cool(trainer)
        self._scheduled = None


def _read(trainer: Trainer) -> Rates:
    return [[float(g["lr"]) for g in optimizer.param_groups] for optimizer in trainer.optimizers]


def _write(trainer: Trainer, rates: Rates) -> None:
    for optimizer, values in zip(trainer.optimizers, rates, strict=True):
        for group, value in zip(optimizer.param_groups, values, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)  # what the compiled or captured step refers to
            else:
                group["lr"] = value
