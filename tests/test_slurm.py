"""The job file for SLURM: starts, is requeued after SIGUSR1, and goes on in its run folder."""

import os
import subprocess
from pathlib import Path

import pytest

from tx_lightning.callbacks.graceful_stop import SIGNALS

JOB = Path(__file__).resolve().parents[1] / "experiments" / "trainer" / "slurm.sbatch"


def submit(folder: Path, status: int, *words: str) -> tuple[int, list[str]]:
    """Run the job with stand-ins for SLURM's commands; return its status and what they were told.

    Args:
        folder: Where the job runs.
        status: How the training ends.
        words: Arguments of the job.
    """
    bin_folder, told = folder / "bin", folder / "told"
    bin_folder.mkdir(exist_ok=True)
    told.write_text("")
    for name, ends in (("srun", status), ("scontrol", 0)):
        script = bin_folder / name
        script.write_text(f'#!/bin/bash\necho "{name} $*" >> "{told}"\nexit {ends}\n')
        script.chmod(0o755)
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    done = subprocess.run(["bash", str(JOB), *words], cwd=folder, env=environment, check=False)
    return done.returncode, told.read_text().splitlines()


def test_a_stopped_job_is_requeued_and_goes_on_where_it_was(tmp_path: Path) -> None:
    sizes = "--trainer.num_nodes 2 --trainer.devices 8"
    status, told = submit(tmp_path, 128 + 10, "--config", "a.yaml", "--name", "x")
    begin = "--config a.yaml --name x --trainer.default_root_dir runs/slurm/17"
    assert told == [f"srun tx-lightning fit {begin} {sizes}", "scontrol requeue 17"]
    assert status == 138
    run = tmp_path / "runs/slurm/17"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    status, told = submit(tmp_path, 0, "--config", "a.yaml", "--name", "x")
    assert told == [f"srun tx-lightning fit --resume runs/slurm/17 {sizes}"]
    assert status == 0


def test_consent_to_own_classes_is_given_again_after_a_requeue(tmp_path: Path) -> None:
    run = tmp_path / "runs/slurm/17"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    words = ["--trust", "one", "--config", "a.yaml", "--trust=two.three", "--name", "x"]
    _, told = submit(tmp_path, 0, *words)
    sizes = "--trainer.num_nodes 2 --trainer.devices 8"
    trusted = "--trust one --trust=two.three"
    assert told == [f"srun tx-lightning fit --resume runs/slurm/17 {trusted} {sizes}"]


@pytest.mark.parametrize("status", [0, 1, 2, 137, 143])
def test_other_ends_are_not_requeued(status: int, tmp_path: Path) -> None:
    found, told = submit(tmp_path, status, "--config", "a.yaml")
    assert found == status
    assert [line.split()[0] for line in told] == ["srun"]


def test_the_signal_that_the_job_asks_for_is_heard() -> None:
    assert "#SBATCH --signal=USR1@" in JOB.read_text()
    assert {signal.name for signal in SIGNALS} == {"SIGINT", "SIGTERM", "SIGUSR1"}
