"""The same run, however it is spread over processes and accumulated micro-batches.

Tasks are trained for two epochs, ragged batches and the small last one included, by one process
with whole batches, by two and three processes, by accumulated micro-batches, and by both. In each
optimizer step the gradients must be the same before the optimizer, and clipping must see the same
norm. Some batches have fewer examples than there are parts.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tests.processes import Forked
from tests.stand_ins import fit_each, steps
from tests.test_every_task import configuration
from tx_lightning.checkpoints import read_checkpoint
from tx_lightning.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# The others have the batches and the loss of one of these.
TASKS = ["Translation", "LanguageModeling", "Classification", "MaskedLanguageModeling"]


class Spread(NamedTuple):
    """How a step is spread."""

    processes: int
    accumulate: int
    strategy: str

    def __str__(self) -> str:
        return f"{self.processes}-{self.accumulate}-{self.strategy.split('.')[-1]}"


WHOLE = Spread(1, 1, "auto")
SHARDED = Spread(2, 2, "tx_lightning.sharding.Sharded")
OTHERS = [
    Spread(1, 3, "auto"),
    Spread(2, 1, "ddp"),
    Spread(3, 1, "ddp"),
    Spread(2, 2, "ddp"),
    SHARDED,
]
EPOCHS = 2


def written(folder: Path, task: str, spread: Spread) -> Path:
    """Write the configuration of a run without dropout, which differs among micro-batches."""
    settings = without_dropout(configuration(task))
    # Not Adam: it turns the rounding of a gradient that is zero (keys' biases) into whole steps.
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}}
    settings["model"]["init_args"] |= {"optimizer": sgd, "scheduler": None}
    if task == "Classification":
        settings["model"]["init_args"]["network"]["init_args"]["dropout"] = 0.0  # of its head
        # Equal weights of two classes let the gradient of a balanced batch cancel to nothing.
        settings["model"]["init_args"]["class_weights"] = [3.0, 0.5]
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "save_on_train_epoch_end": True},
    }
    settings["trainer"] |= {
        "max_steps": -1,
        "max_epochs": EPOCHS,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": EPOCHS,
        "gradient_clip_val": 0.1,
        "accumulate_grad_batches": spread.accumulate,
        "devices": spread.processes,
        "strategy": {"class_path": spread.strategy} if "." in spread.strategy else spread.strategy,
        "callbacks": [saving, {"class_path": "tests.stand_ins.Recorder"}],
    }
    settings["data"]["init_args"]["batch_tokens"] = 64 if task == "LanguageModeling" else 96
    settings["data"]["init_args"]["eval_batch_tokens"] = 48  # as many batches as there are pairs
    file = folder / f"{task}-{spread}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def without_dropout(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: 0.0 if k == "dropout" else without_dropout(v) for k, v in tree.items()}
    return tree


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, <task>-<spread>."""
    folder = tmp_path_factory.mktemp("spread")
    for processes in (1, 2, 3):
        files = [
            str(written(folder, task, spread))
            for spread in (WHOLE, *OTHERS)
            if spread.processes == processes
            for task in TASKS
        ]
        environment = {**os.environ, "WANDB_MODE": "disabled"}
        if processes == 2:  # as a user starts them
            command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    *command,
                    "--log-dir",
                    folder,
                    "-m",
                    "tests.stand_ins",
                    *files,
                ],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=1200,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            continue
        output = folder / f"{processes}.txt"
        runs = Forked(
            fit_each, files, environment=environment, folder=ROOT, output=output, ranks=processes
        )
        try:
            status = runs.wait(timeout=1200)
        finally:
            runs.kill()
        assert status == 0, output.read_text()[-3000:]
    return folder


def recorded(run: Path) -> list[dict[str, Any]]:
    """What each process kept."""
    files = sorted(run.glob("recorded-*.pt"))
    return [torch.load(file, weights_only=True) for file in files]


def run_of(runs: Path, task: str, spread: Spread) -> Path:
    run = runs / f"{task}-{spread}"
    assert len(list(run.glob("recorded-*.pt"))) == spread.processes
    return run


def gradients(run: Path) -> Iterator[tuple[torch.Tensor, float]]:
    """Gradient and norm of each step; those of all processes are the same."""
    processes = recorded(run)
    for step, (gradient, norm) in enumerate(
        zip(processes[0]["gradients"], processes[0]["norms"], strict=True)
    ):
        for other in processes[1:]:
            assert torch.equal(other["gradients"][step], gradient)
            assert other["norms"][step] == norm
        yield gradient.double(), norm


@pytest.mark.parametrize("spread", OTHERS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_and_their_norm_are_the_same(task: str, spread: Spread, runs: Path) -> None:
    whole = list(gradients(run_of(runs, task, WHOLE)))
    found = list(gradients(run_of(runs, task, spread)))
    assert len(whole) == len(found) >= 20
    for (ours, norm), (theirs, other) in zip(whole, found, strict=True):
        assert float((ours - theirs).norm() / ours.norm()) < 1e-6
        assert norm == pytest.approx(float(ours.norm()), rel=1e-6)
        assert other == pytest.approx(norm, rel=1e-6)
    assert any(norm > 0.1 for _, norm in whole), "nothing was clipped"


@pytest.mark.parametrize("spread", OTHERS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_parameters_are_the_same_after_twenty_steps(task: str, spread: Spread, runs: Path) -> None:
    states = [
        read_checkpoint(run_of(runs, task, each) / "checkpoints" / "last.ckpt")
        for each in (WHOLE, spread)
    ]
    assert states[0]["global_step"] == states[1]["global_step"] >= 20
    for name, value in states[0]["state_dict"].items():
        if value.is_floating_point():
            torch.testing.assert_close(
                states[1]["state_dict"][name], value, rtol=1e-5, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("spread", [WHOLE, *OTHERS], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_every_example_is_seen_once_an_epoch_in_the_same_steps(
    task: str, spread: Spread, runs: Path
) -> None:
    found = steps(run_of(runs, task, spread))
    assert found == steps(run_of(runs, task, WHOLE))
    epochs = [Counter[int]() for _ in range(EPOCHS)]
    for (epoch, _), examples in found.items():
        epochs[epoch].update(examples)
    for counted in epochs:
        assert set(counted.values()) == {1}
    if task == "LanguageModeling":  # blocks, from an offset that is new in each epoch
        for counted in epochs:
            starts = sorted(counted)
            assert starts == list(range(starts[0], starts[-1] + 1, 16))
    else:
        assert [sorted(counted) for counted in epochs] == [list(range(len(epochs[0])))] * EPOCHS
    order = [[examples for (at, _), examples in found.items() if at == epoch] for epoch in (0, 1)]
    assert order[0] != order[1]


@pytest.mark.parametrize("spread", OTHERS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_validation_sees_each_example_once_and_scores_the_same(
    task: str, spread: Spread, runs: Path
) -> None:
    run, whole = run_of(runs, task, spread), run_of(runs, task, WHOLE)

    def evaluated(run: Path) -> Counter[tuple[int, int]]:
        return Counter(
            (step, example)
            for process in recorded(run)
            for step, examples in process["evaluated"]
            for example in examples
        )

    assert evaluated(run) == evaluated(whole)
    assert set(evaluated(run).values()) == {1}
    rows = [
        [row for row in read_metrics(r / "metrics.jsonl") if "val/loss" in row]
        for r in (whole, run)
    ]
    assert len(rows[0]) == len(rows[1]) == 1
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"time"}:
            # The weights differ in the last digits already.
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name


@pytest.mark.parametrize("task", TASKS)
def test_shards_are_parts_of_the_parameters(task: str, runs: Path) -> None:
    total = recorded(run_of(runs, task, WHOLE))[0]["held"]
    parts = [process["held"] for process in recorded(run_of(runs, task, SHARDED))]
    assert sum(parts) == total
    assert max(parts) < 0.6 * total


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_has_other_numbers_of_batches_on_each_process(task: str, runs: Path) -> None:
    """What would hang if evaluation with shards were an exchange among all processes."""
    counts = [len(p["evaluated"]) for p in recorded(run_of(runs, task, SHARDED))]
    if task != "LanguageModeling":  # its few blocks are the same number on each
        assert counts[0] != counts[1]
