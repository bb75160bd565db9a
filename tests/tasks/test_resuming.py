"""A resumed run does what its configuration says now, or says by name what it cannot change."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_every_task import configuration
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import newest_checkpoint, read_checkpoint
from tx_lightning.loggers import read_metrics
from tx_lightning.schedules import InverseSquareRoot

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 9}}
MONITOR = {
    "class_path": "lightning.pytorch.callbacks.LearningRateMonitor",
    "init_args": {"logging_interval": "step"},
}
PLATEAU = {
    "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
    "init_args": {"monitor": "val/loss", "patience": 0, "threshold": 1.0, "factor": 0.5},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of three steps, without and with warmup."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("begun")
        patch.chdir(folder)
        patch.setenv("TX_LIGHTNING_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        for warmup in (0, 5):
            file = experiment(f"warmup{warmup}", warmup)
            found[warmup] = fit(file, "--trainer.max_steps", "3").absolute()
    return found


@pytest.fixture
def begun(folders: dict[int, Path], tmp_path: Path) -> Callable[[int], Path]:
    """A copy of such a run."""
    return lambda warmup: Path(shutil.copytree(folders[warmup], tmp_path / "begun"))


def experiment(name: str, warmup: int = 0, **model: Any) -> str:
    """A classifier of six steps, a validation after each."""
    tree = configuration("Classification")
    tree["model"]["init_args"] |= {"optimizer": ADAMW, "scheduler": COSINE, **model}
    tree["trainer"] |= {"val_check_interval": 1}
    callbacks = {callback["class_path"].split(".")[-1]: callback for callback in
                 tree["trainer"]["callbacks"]}  # fmt: skip
    callbacks["LRWarmup"]["init_args"] = {"warmup_steps": warmup}
    tree["trainer"]["callbacks"] = [callbacks["LRWarmup"], callbacks["ModelCheckpoint"], MONITOR]
    Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return f"{name}.yaml"


def fit(file: str, *words: str) -> Path:
    assert main(["fit", "--config", file, *words]) == 0
    (run,) = Path("runs", Path(file).stem).iterdir()
    return run


def rates(run: Path) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: value for row in rows for name, value in row.items()
            if name.startswith("lr-") and name.endswith("pg1")}  # fmt: skip


def groups(run: Path) -> list[dict[str, Any]]:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    (state,) = read_checkpoint(newest)["optimizer_states"]
    return [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]


def optimizer(**changes: Any) -> dict[str, Any]:
    return {**ADAMW, "init_args": {**ADAMW["init_args"], **changes}}  # type: ignore[dict-item]


CHANGES: dict[str, dict[str, Any]] = {
    "rate": {"optimizer": optimizer(lr=0.0001)},
    "decay and betas": {"optimizer": optimizer(weight_decay=0.5, betas=[0.5, 0.6], eps=0.001)},
    "schedule": {"scheduler": {**COSINE, "init_args": {"T_max": 30, "eta_min": 0.001}}},
    "kind of schedule": {
        "scheduler": {
            "class_path": "tx_lightning.schedules.InverseSquareRoot",
            "init_args": {"reference_step": 2},
        }
    },
    "no schedule": {"scheduler": None},
    "rate and no schedule": {"scheduler": None, "optimizer": optimizer(lr=0.01)},
}


def expected_rates(change: str, warmup: int) -> tuple[list[float], dict[str, Any]]:
    """The rates of steps 4 to 6 by torch alone, and the settings of the optimizer after them."""
    model = {"optimizer": ADAMW, "scheduler": COSINE, **CHANGES[change]}
    adamw = torch.optim.AdamW([torch.zeros(1)], **model["optimizer"]["init_args"])
    kinds: dict[str, Any] = {
        "CosineAnnealingLR": torch.optim.lr_scheduler.CosineAnnealingLR,
        "InverseSquareRoot": InverseSquareRoot,
    }
    schedule = None
    if (scheduler := model["scheduler"]) is not None:
        kind = kinds[scheduler["class_path"].rpartition(".")[2]]
        schedule = kind(adamw, **scheduler["init_args"])
    found = []
    for step in range(1, 7):
        (group,) = adamw.param_groups
        found.append(group["lr"] * (min(1, step / warmup) if warmup else 1))
        adamw.step()
        if schedule is not None:
            schedule.step()
    return found[3:], {k: v for k, v in group.items() if k not in ("params", "lr")}


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_the_configuration_holds(change: str, warmup: int, begun: Any) -> None:
    """From the fourth step on, rates and settings are those of a run that began with the change."""
    run = begun(warmup)
    before = rates(run)
    changed = experiment("changed", warmup, **CHANGES[change])
    words = ["--config", changed, "--model_from", "config", "--trainer.max_steps", "6"]
    assert main(["fit", "--resume", str(run), *words]) == 0
    found = rates(run)
    assert {step: found[step] for step in (1, 2, 3)} == before
    wanted, settings = expected_rates(change, warmup)
    assert [found[step] for step in (4, 5, 6)] == pytest.approx(wanted)
    (matrices, vectors) = groups(run)
    assert {key: value for key, value in matrices.items() if key != "lr"} == settings
    assert vectors["weight_decay"] == 0


def test_what_follows_from_scores_keeps_its_rate_and_takes_the_rest() -> None:
    run = fit(experiment("begun", scheduler=PLATEAU), "--trainer.max_steps", "3")
    changed = experiment("changed", scheduler=PLATEAU, optimizer=optimizer(weight_decay=0.7))
    words = ["--config", changed, "--model_from", "config", "--trainer.max_steps", "6"]
    assert main(["fit", "--resume", str(run), *words]) == 0
    assert list(rates(run).values()) == pytest.approx([0.003 / 2**k for k in range(6)])
    assert groups(run)[0]["weight_decay"] == 0.7


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "class": (
        {},
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
        "model.optimizer.class_path was 'torch.optim.AdamW'",
    ),
    "freeze": ({}, {"freeze": ["encoder.layers.*"]}, "model.freeze was"),
    "grouping": ({}, {"layer_decay": 0.5}, "model.layer_decay was None"),
    "rate of a plateau": (
        {"scheduler": PLATEAU},
        {"scheduler": PLATEAU, "optimizer": optimizer(lr=0.1)},
        "model.optimizer.lr was 0.003",
    ),
    "plateau": (
        {"scheduler": PLATEAU},
        {"scheduler": {**PLATEAU, "init_args": {**PLATEAU["init_args"], "patience": 3}}},  # type: ignore[dict-item]
        "model.scheduler.patience was 0",
    ),
    "to a plateau": ({}, {"scheduler": PLATEAU}, "model.scheduler.class_path was"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_state_has_no_place_for_is_refused_by_name(
    change: str, begun: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, message = REFUSED[change]
    if before:
        run = fit(experiment("begun", **before), "--trainer.max_steps", "3")
    else:
        run = begun(0)
    changed = experiment("changed", **after)
    words = ["--config", changed, "--model_from", "config", "--trainer.max_steps", "6"]
    assert main(["fit", "--resume", str(run), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
