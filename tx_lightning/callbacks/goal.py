"""A number that a run must reach, so that a script can tell success from failure."""

from lightning.pytorch import Callback, LightningModule, Trainer


class GoalMissed(ValueError):
    """A metric fell short of what the run was to reach; the command ends with status 1."""


class Goal(Callback):
    """Fail after `test` if a metric is below a bound. Put it last among the callbacks.

    Args:
        metric: Name of the metric, as test/bleu.
        at_least: The least value that will do.

    Raises:
        GoalMissed: When the metric is below the bound, or NaN.
    """

    def __init__(self, metric: str, at_least: float) -> None:
        self.metric = metric
        self.at_least = at_least

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = trainer.callback_metrics
        if self.metric not in values:
            raise ValueError(
                f"metric={self.metric!r} of Goal was not logged; there are {', '.join(values)}"
            )
        value = float(values[self.metric])
        if not value >= self.at_least:
            raise GoalMissed(f"{self.metric} is {value:.2f}, below the goal of {self.at_least}")
        if trainer.is_global_zero:
            print(f"{self.metric} is {value:.2f}, the goal was {self.at_least}", flush=True)
