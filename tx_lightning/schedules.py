"""Learning-rate schedules as pure functions of the step; torch's own have the other shapes.

A schedule knows nothing of warmup: `tx_lightning.callbacks.LRWarmup` composes with any of them.
"""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def inverse_square_root(step: int, reference_step: int) -> float:
    """Return sqrt(reference_step / step), and 1 up to the reference step.

    Args:
        step: The optimizer step, counted from 1 as in Vaswani et al. 2017, eq. 3.
        reference_step: The last step at which the factor is 1.
    """
    return math.sqrt(reference_step / max(step, reference_step))


class InverseSquareRoot(LRScheduler):
    """The optimizer's learning rate, falling with 1 / sqrt(step) after the reference step.

    With `LRWarmup(warmup_steps=reference_step)` and the learning rate
    d_model^-0.5 * reference_step^-0.5 it is the schedule of Vaswani et al. 2017, eq. 3, at every
    step. Step it once per optimizer step.

    Args:
        optimizer: Its learning rate is the peak, one per parameter group.
        reference_step: Number of steps at the peak before the fall; usually the warmup steps.
        last_epoch: The last optimizer step that was scheduled; -1 at the start.

    Raises:
        ValueError: When `reference_step` is below 1, or one of the two is no step.
    """

    def __init__(
        self, optimizer: Optimizer, reference_step: int = 4000, last_epoch: int = -1
    ) -> None:
        _check_step("reference_step", reference_step)
        _check_step("last_epoch", last_epoch)
        if reference_step < 1:
            raise ValueError(
                f"reference_step={reference_step} of InverseSquareRoot must be at least 1: "
                "give the number of warmup steps, or 1 to fall from the first step on"
            )
        if last_epoch != -1 and not all("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                f"last_epoch={last_epoch} of InverseSquareRoot needs an optimizer that was "
                "scheduled before, with initial_lr in its groups: leave it out to begin"
            )
        self.reference_step = reference_step
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the next optimizer step."""
        factor = inverse_square_root(self.last_epoch + 1, self.reference_step)
        return [base * factor for base in self.base_lrs]


def _check_step(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value} of InverseSquareRoot must be an integer")
