"""metrics.jsonl and the W&B logger; what a whole run tells W&B is in test_cli.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import wandb_file
from tx_lightning.loggers import MetricsFile, WandB, best_values, read_metrics, wandb_mode
from tx_lightning.runs import rewind, sizes

ROOT = Path(__file__).resolve().parents[1]


def test_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"train/loss": 2.5}, step=1)
    assert read_metrics(logger.path)[0]["train/loss"] == 2.5
    logger.log_metrics({"val/bleu": 10.0, "val/loss": 1.0}, step=2)
    first, second = (json.loads(line) for line in logger.path.read_text().splitlines())
    assert (first["step"], second["step"]) == (1, 2)
    assert first["time"] <= second["time"]
    assert second["val/bleu"] == 10.0


def test_rewinding_drops_the_rows_that_will_be_made_again(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path)
    samples = tmp_path / "samples" / "val.jsonl"
    samples.parent.mkdir()
    assert sizes(tmp_path) == {}
    rewind(tmp_path, {})  # nothing there yet
    assert not logger.path.exists()
    at = {}
    for step in range(1, 10):
        logger.log_metrics({"train/loss": float(step)}, step=step)
        at[step] = sizes(tmp_path)
        with samples.open("a") as file:
            file.write(f"{step}\n")
    with logger.path.open("a") as file:
        file.write('{"step": 3, "train/l')  # as a kill leaves it
    rewind(tmp_path, {name: size + 1000 for name, size in at[9].items()})
    rewind(tmp_path, at[5])
    assert [row["step"] for row in read_metrics(logger.path)] == [1, 2, 3, 4, 5]
    assert samples.read_text() == "1\n2\n3\n4\n"
    logger.log_metrics({"train/loss": 6.5}, step=6)
    assert read_metrics(logger.path)[-1]["train/loss"] == 6.5
    rewind(tmp_path, at[1])
    assert samples.read_text() == ""


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who never heard of W&B; the path is that of their netrc, which is not there."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    return netrc


def test_without_a_key_runs_are_offline(no_key: Path) -> None:
    assert wandb_mode() == "offline"
    assert WandB().mode == "offline"
    no_key.write_text("machine example.org login user password x\n")
    assert wandb_mode() == "offline"
    no_key.write_text("machine")  # not a netrc
    assert wandb_mode() == "offline"


def test_with_a_key_runs_are_online(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_key.write_text("machine api.wandb.ai login user password x\n")
    no_key.chmod(0o600)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode() == "online"


@pytest.mark.parametrize(
    ("asked", "mode"), [("disabled", "disabled"), ("dryrun", "offline"), ("online", "online")]
)
def test_the_environment_and_the_file_decide(
    no_key: Path, monkeypatch: pytest.MonkeyPatch, asked: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    assert WandB().mode == mode
    assert WandB(mode="offline").mode == "offline"


def test_an_unknown_mode_names_the_known(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="WANDB_MODE='ofline' is not a mode; there are online"):
        WandB()


def test_a_disabled_run_takes_metrics_and_records_nothing(tmp_path: Path) -> None:
    logger = WandB(mode="disabled")
    logger.open_in(tmp_path / "run", "fit")
    logger.log_metrics({"val/bleu": 1.0}, step=1)
    logger.finish(failed=False)
    assert not list(tmp_path.rglob("*.wandb"))
    assert not list(tmp_path.rglob("run_id"))


def test_a_resumed_run_keeps_its_id_and_says_how_to_upload_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "experiment" / "2025"
    folder.mkdir(parents=True)
    for step in (1, 2):
        logger = WandB(mode="offline")
        logger.open_in(folder, "fit")
        logger.log_hyperparams({"model": {"init_args": {"dim": 4}}})
        logger.log_metrics({"val/bleu": 30.0 - step}, step=step)
        logger.finish(failed=False)
    assert len(list(folder.glob("wandb/offline-run-*"))) >= 1
    run = wandb_file.read(folder)
    assert run.run_id == (folder / "wandb" / "run_id").read_text().strip()
    assert [row["trainer/global_step"] for row in run.history] == [1, 2]
    assert run.config["model"] == {"init_args": {"dim": 4}}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "wandb sync " in said[0]
    assert Path(said[0].rpartition("wandb sync ")[2]).is_dir()


def test_the_history_survives_a_kill(tmp_path: Path) -> None:
    """A killed process loses at most the last row: those before it come to disk by themselves."""
    program = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from tests import wandb_file\n"
        "from tx_lightning.loggers import WandB\n"
        "logger = WandB(mode='offline')\n"
        "logger.open_in(Path(sys.argv[1]), 'fit')\n"
        "written = lambda: len(wandb_file.read(Path(sys.argv[1]), killed=True).history)\n"
        "for step in range(100):\n"
        "    logger.log_metrics({'train/loss': 1.0}, step=step)\n"
        "    time.sleep(0.01)\n"
        "    while step == 98 and written() < 99:\n"
        "        time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(wandb_file.read(tmp_path, killed=True).history) >= 99


def test_the_best_of_each_metric_is_found() -> None:
    rows = [{"val/bleu": 1.0, "val/loss": 3.0}, {"val/loss": 2.0, "step": 4}, {"val/bleu": 0.5}]
    assert best_values(rows) == {"val/bleu": 1.0, "val/loss": 2.0}
    assert best_values([]) == {}
