from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from tx_lightning.callbacks import LRWarmup
from tx_lightning.schedules import InverseSquareRoot

# The data is constant: it does not matter where its loader goes on.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")

SchedulerFactory = Callable[[Optimizer], LRScheduler]

SCHEDULERS: dict[str, SchedulerFactory] = {
    "inverse square root": lambda o: InverseSquareRoot(o, reference_step=5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 6], gamma=0.3),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 1 - 0.01 * step),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9, eta_min=0.01),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=20, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.CosineAnnealingLR(o, T_max=5)],
        milestones=[4],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LinearLR(o, 0.5, total_iters=4)]
    ),
}


class Slope(LightningModule):
    """Its gradient is 1, so that SGD moves the parameter by the learning rate that it used."""

    def __init__(
        self, scheduler: SchedulerFactory | None, interval: str = "step", tensor_lr: bool = False
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.scheduler = scheduler
        self.interval = interval
        self.lr: float | Tensor = torch.tensor(1.0, dtype=torch.float64) if tensor_lr else 1.0
        self.used: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 1.0, logger=False)
        return self.weight * 1.0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        before = self.weight.item()
        super().optimizer_step(*args, **kwargs)
        self.used.append(before - self.weight.item())

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": self.scheduler(optimizer),
                "interval": self.interval,
                "monitor": "loss",
            },
        }


def fit(
    folder: Path,
    module: Slope,
    *callbacks: Callback,
    steps: int = 12,
    accumulate: int = 1,
    ckpt_path: Path | None = None,
    logger: CSVLogger | None = None,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=logger or False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader(TensorDataset(torch.zeros(40)), batch_size=5), ckpt_path=ckpt_path
    )
    return trainer


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def scheduled(factory: SchedulerFactory | None, steps: int = 12) -> list[float]:
    """Return the schedule's own rates, from a bare loop."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = factory(optimizer) if factory else None
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return rates


def warmed(rates: list[float], warmup_steps: int) -> list[float]:
    return [rate * min(1.0, t / warmup_steps) for t, rate in enumerate(rates, start=1)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_multiplied_and_undisturbed(name: str, tmp_path: Path) -> None:
    module = Slope(SCHEDULERS[name])
    trainer = fit(tmp_path, module, LRWarmup(5))
    expected = scheduled(SCHEDULERS[name], 13)
    assert module.used == pytest.approx(warmed(expected, 5)[:12], rel=1e-12, abs=1e-15)
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected[12]  # to the last bit


def test_without_a_schedule(tmp_path: Path) -> None:
    module = Slope(None)
    fit(tmp_path, module, LRWarmup(4), steps=6)
    assert module.used == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-12)


def test_equals_the_2017_formula(tmp_path: Path) -> None:
    d_model, warmup_steps = 512, 5
    peak = d_model**-0.5 * warmup_steps**-0.5
    module = Slope(lambda optimizer: InverseSquareRoot(optimizer, reference_step=warmup_steps))
    module.lr = peak
    fit(tmp_path, module, LRWarmup(warmup_steps))
    formula = [d_model**-0.5 * min(t**-0.5, t * warmup_steps**-1.5) for t in range(1, 13)]
    assert module.used == pytest.approx(formula, rel=1e-12)
    warmup = LRWarmup(4000)
    schedule = InverseSquareRoot(SGD(module.parameters(), lr=1.0), reference_step=4000)
    for t in (1, 2, 3999, 4000, 4001, 100_000):
        schedule.last_epoch = t - 1
        noam = min(t**-0.5, t * 4000**-1.5) / 4000**-0.5
        assert schedule.get_lr()[0] * warmup.factor(t) == pytest.approx(noam, rel=1e-15)


def test_the_unit_is_the_optimizer_step(tmp_path: Path) -> None:
    module = Slope(SCHEDULERS["exponential"])
    fit(tmp_path, module, LRWarmup(5), steps=7, accumulate=2)
    assert module.used == pytest.approx(warmed(scheduled(SCHEDULERS["exponential"], 7), 5))


@pytest.mark.parametrize("stop", [3, 5, 8])  # within the warmup, at its end, after it
@pytest.mark.parametrize("name", ["inverse square root", "exponential", "cosine"])
def test_resume_goes_on_as_if_never_stopped(name: str, stop: int, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    whole = Slope(SCHEDULERS[name])
    fit(tmp_path, whole, SaveAt(stop, path), LRWarmup(5))
    resumed = Slope(SCHEDULERS[name])
    fit(tmp_path, resumed, LRWarmup(5), ckpt_path=path)
    assert resumed.used == pytest.approx(whole.used[stop:], rel=1e-12)


def test_resume_with_another_warmup_keeps_the_schedule(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    fit(tmp_path, Slope(SCHEDULERS["exponential"]), LRWarmup(5), SaveAt(3, path), steps=4)
    resumed = Slope(SCHEDULERS["exponential"])
    fit(tmp_path, resumed, LRWarmup(0), ckpt_path=path)
    assert resumed.used == pytest.approx(scheduled(SCHEDULERS["exponential"])[3:])


def test_state_round_trip() -> None:
    callback, copy = LRWarmup(5), LRWarmup(5)
    for state in ({"scheduled": [[0.5, 0.25]]}, {"scheduled": None}):
        callback.load_state_dict(state)
        copy.load_state_dict(callback.state_dict())
        assert copy.state_dict() == state


def test_the_monitor_logs_the_rate_that_is_used(tmp_path: Path) -> None:
    module = Slope(SCHEDULERS["exponential"])
    monitor = LearningRateMonitor("step")
    fit(tmp_path, module, monitor, LRWarmup(5), logger=CSVLogger(tmp_path))
    assert monitor.lrs["lr-SGD"] == pytest.approx(module.used, rel=1e-12)


def test_plateau_schedules_lower_their_own_rate(tmp_path: Path) -> None:
    def plateau(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    module = Slope(plateau)  # the loss stays, so that every step but the first halves the rate
    fit(tmp_path, module, LRWarmup(4), steps=6)
    halved = [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    assert module.used == pytest.approx(warmed(halved, 4))


def test_epoch_schedules_are_undisturbed(tmp_path: Path) -> None:
    module = Slope(SCHEDULERS["exponential"], interval="epoch")  # 8 batches an epoch
    fit(tmp_path, module, LRWarmup(10))
    assert module.used == pytest.approx(warmed([1.0] * 8 + [0.9] * 4, 10))


def test_a_tensor_rate_stays_the_same_tensor(tmp_path: Path) -> None:
    module = Slope(SCHEDULERS["exponential"], tensor_lr=True)
    trainer = fit(tmp_path, module, LRWarmup(5))
    assert trainer.optimizers[0].param_groups[0]["lr"] is module.lr
    assert module.used == pytest.approx(warmed(scheduled(SCHEDULERS["exponential"]), 5))


def test_an_interrupted_fit_leaves_schedule_and_module_clean(tmp_path: Path) -> None:
    class Failure(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("stop")

    module = Slope(SCHEDULERS["exponential"])
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module, LRWarmup(5), Failure())
    assert "lr_scheduler_step" not in vars(module)
    fit(tmp_path, module, LRWarmup(5), steps=3)
    assert "lr_scheduler_step" not in vars(module)
    assert module.used == pytest.approx(warmed(scheduled(SCHEDULERS["exponential"], 3), 5))


def test_a_failure_before_training_is_not_hidden(tmp_path: Path) -> None:
    class Failure(Callback):
        def on_fit_start(self, *_: Any) -> None:
            raise RuntimeError("early")

    path = tmp_path / "stop.ckpt"
    warmup = LRWarmup(5)
    fit(tmp_path, Slope(SCHEDULERS["exponential"]), LRWarmup(5), SaveAt(3, path), steps=4)
    with pytest.raises(RuntimeError, match="early"):
        fit(tmp_path, Slope(SCHEDULERS["exponential"]), warmup, Failure(), ckpt_path=path)
    assert warmup.state_dict() == {"scheduled": None}


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=-1 .* must not be negative"):
        LRWarmup(-1)
