"""What a resumed run takes from its configuration although the optimizer's state says otherwise.

Lightning restores the whole state of optimizer and schedule, hyperparameters included, so that a
learning rate changed in the configuration would never be used. Here the configuration holds, or the
change is refused by name. Where nothing changed the state is left alone, and the run goes on bit by
bit.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tx_lightning.configuration import differences
from tx_lightning.errors import ConfigurationError

_OF_THE_OPTIMIZER = ("optimizer", "scheduler", "layer_decay", "freeze")
FROM_CONFIGURATION = "rates_from_configuration"  # in a checkpoint whose rates were replaced


class Configured(Protocol):
    """A task whose optimizer and schedule follow from its settings."""

    settings: dict[str, Any] | None

    def configure_optimizers(self) -> Any: ...


def hold_configuration(task: Configured, checkpoint: dict[str, Any]) -> None:
    """Put the hyperparameters of the configuration into a checkpoint that training resumes from.

    The schedule is carried forward to the checkpoint's step, so that its rate is what it would be
    had the run been started with it. `checkpoint[FROM_CONFIGURATION]` then says that rates were
    replaced.

    Args:
        task: Its `settings` are those of the configuration.
        checkpoint: Is changed in place, before the trainer restores optimizer and schedule.

    Raises:
        ConfigurationError: A change that the optimizer's state has no place for.
    """
    ours, theirs = task.settings, checkpoint["tx_lightning"]["task"]
    if ours is None or theirs is None or not checkpoint.get("optimizer_states"):
        return
    changed = differences(_relevant(theirs), _relevant(ours))
    if not changed:
        return
    for name, (before, now) in changed.items():
        _check_possible(name, before, now, _relevant(ours))
    built = task.configure_optimizers()
    optimizer, config = built["optimizer"], built.get("lr_scheduler")
    schedule = None if config is None else config["scheduler"]
    state = checkpoint["optimizer_states"][0]
    keeps_rates = isinstance(schedule, ReduceLROnPlateau)
    if schedule is not None and not keeps_rates:
        _forward(schedule, optimizer, checkpoint["global_step"])
    for restored, fresh in zip(state["param_groups"], optimizer.param_groups, strict=True):
        kept = {"params", "lr", "initial_lr"} if keeps_rates else {"params"}
        values = {key: restored[key] for key in kept & restored.keys()}
        restored.clear()
        restored.update({**fresh, **values})
    if not keeps_rates:
        checkpoint["lr_schedulers"] = [] if schedule is None else [schedule.state_dict()]
        checkpoint[FROM_CONFIGURATION] = True


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = settings.get("init_args", {})
    return {name: arguments.get(name) for name in _OF_THE_OPTIMIZER}


def _check_possible(name: str, before: Any, now: Any, ours: Mapping[str, Any]) -> None:
    """Refuse a change that cannot be carried over to the optimizer's state."""
    shown = f"model.{name} was {before!r} when the run was started and is {now!r} now"
    if name in ("optimizer", "optimizer.class_path") or name.startswith("freeze"):
        raise ConfigurationError(
            f"{shown}: a resumed run keeps its optimizer's state, which does not suit that; start "
            "a new run with --pretrained CHECKPOINT"
        )
    if name == "layer_decay" and None in (before, now):
        raise ConfigurationError(
            f"{shown}: the optimizer's parameters are grouped otherwise; start a new run with "
            "--pretrained CHECKPOINT"
        )
    plateau = "ReduceLROnPlateau" in str(ours["scheduler"])
    of_rates = name.startswith("scheduler") or name in ("optimizer.lr", "layer_decay")
    if plateau and of_rates:
        raise ConfigurationError(
            f"{shown}: the rate of ReduceLROnPlateau follows from the scores so far, so that a "
            "resumed run cannot change it; start a new run with --pretrained CHECKPOINT"
        )


def _forward(schedule: LRScheduler, optimizer: Optimizer, steps: int) -> None:
    """Take the steps of a schedule that the run has taken already."""
    with warnings.catch_warnings():
        # The optimizer has not stepped, and its own steps do not matter here.
        warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)`")
        for _ in range(steps):
            schedule.step()
