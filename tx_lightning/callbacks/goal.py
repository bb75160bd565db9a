"""A number that a run must reach, so that a script can tell success from failure."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer


class GoalMissed(ValueError):
    """A metric fell short of what the run was to reach; the command ends with status 1."""


class Goal(Callback):
    """Fail after `test` if a metric is below a bound, or above one. Put it last of the callbacks.

    Args:
        metric: Name of the metric, as test/bleu.
        at_least: The least value that will do; null: any.
        at_most: The largest value that will do; null: any.

    Raises:
        ValueError: When there is no bound.
        GoalMissed: When the metric is beyond one, or NaN.
    """

    def __init__(
        self, metric: str, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        if at_least is None and at_most is None:
            raise ValueError(f"Goal for {metric} has no bound: give at_least or at_most")
        for name, bound in (("at_least", at_least), ("at_most", at_most)):
            if bound is not None and not math.isfinite(bound):
                raise ValueError(f"{name}={bound} of Goal must be a finite number")
        self.metric = metric
        self.at_least = at_least
        self.at_most = at_most

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = trainer.callback_metrics
        if self.metric not in values:
            raise ValueError(
                f"metric={self.metric!r} of Goal was not logged; there are {', '.join(values)}"
            )
        value = float(values[self.metric])
        if self.at_least is not None and not value >= self.at_least:
            raise GoalMissed(f"{self.metric} is {value:.4g}, below the goal of {self.at_least:g}")
        if self.at_most is not None and not value <= self.at_most:
            raise GoalMissed(f"{self.metric} is {value:.4g}, above the goal of {self.at_most:g}")
        if trainer.is_global_zero:
            bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
            bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
            print(f"{self.metric} is {value:.4g}, the goal was {' and '.join(bounds)}", flush=True)
