"""metrics.jsonl and the W&B logger; what a whole run tells W&B is in test_cli.py."""

import ast
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tests import wandb_file
from tests.stand_ins import TRUST
from tx_lightning.__main__ import main
from tx_lightning.callbacks import class_report, predictions, sample_logging
from tx_lightning.callbacks.predictions import PredictionWriter
from tx_lightning.errors import one_line
from tx_lightning.loggers import MetricsFile, WandB, best_values, read_metrics, wandb_mode
from tx_lightning.metrics import Confusion
from tx_lightning.metrics_file import MetricsError, plain
from tx_lightning.provenance import add_start
from tx_lightning.runs import rewind, sizes
from tx_lightning.tasks.task import Row

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


def strict(text: str) -> Any:
    """Parse JSON as the standard has it."""

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refused)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in path.read_text("utf-8").splitlines()]


LOGGED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(min_size=1), LOGGED, max_size=4))
def test_whatever_is_logged_is_a_line_of_valid_json(metrics: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        logger = MetricsFile(Path(folder))
        logger.log_metrics(metrics, step=3)
        (row,) = rows_of(logger.path)
        (read,) = read_metrics(logger.path)
    for name, value in metrics.items() if not metrics.keys() & {"step", "time"} else ():
        if isinstance(value, float):
            assert row[name] == (value if math.isfinite(value) else None)
            assert read[name] == value or (math.isnan(read[name]) and not math.isfinite(value))
        elif value is not None and not isinstance(value, list | dict):
            assert (
                row[name] == read[name] == (value if not isinstance(value, int) else plain(value))
            )


def test_values_that_are_no_floats(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "tensor": torch.tensor(2.5),
        "of one": torch.tensor([3]),
        "bfloat16": torch.tensor([1.0, math.nan], dtype=torch.bfloat16),
        "numpy": np.float32(0.5),
        "array": np.array([[1, 2]]),
        "truth": torch.tensor(True),
        "bool": False,
        "text": "on",
        "nested": {"a": {"b": torch.tensor(math.inf)}, 3: [1, None]},
        "none": None,
        "large": 10**400,
        "path": Path("x"),
    }
    logger = MetricsFile(tmp_path)
    logger.log_metrics(values, step=None)
    (row,) = rows_of(logger.path)
    del row["time"]
    assert row == {
        "step": None,
        "tensor": 2.5,
        "of one": 3,
        "bfloat16": [1.0, None],
        "numpy": 0.5,
        "array": [[1, 2]],
        "truth": True,
        "bool": False,
        "text": "on",
        "nested": {"a": {"b": None}, "3": [1, None]},
        "none": None,
        "large": str(10**400),
        "path": "x",
    }
    (read,) = read_metrics(logger.path)
    assert read["step"] is None
    for value in (read["nested"]["a"]["b"], read["nested"]["3"][1], read["bfloat16"][1]):
        assert math.isnan(value)


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has bare NaN."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 2.5, "val/loss": NaN}\n{"step": 2, "val/loss": 1.5}\n')
    first, second = read_metrics(path)
    assert math.isnan(first["val/loss"])
    assert second == {"step": 2, "val/loss": 1.5}


def test_a_full_disk_stops_the_run_and_leaves_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"val/loss": 1.0}, step=1)
    before = logger.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(MetricsError) as caught:
            logger.log_metrics({"val/loss": 2.0}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert logger.path.read_bytes() == before
    said = f"metrics cannot be written to {logger.path}: File too large; solve this, then resume "
    assert str(caught.value) == one_line(caught.value) == f"{said}the run or start it again"
    logger.log_metrics({"val/loss": 3.0}, step=2)
    assert [row["step"] for row in read_metrics(logger.path)] == [1, 2]
    logger.path.unlink()
    logger.path.symlink_to("/dev/full")
    with pytest.raises(MetricsError, match="No space left on device"):
        logger.log_metrics({"val/loss": 1.0}, step=1)
    with pytest.raises(MetricsError, match="Not a directory"):
        MetricsFile(Path(__file__)).log_metrics({"val/loss": 1.0}, step=1)


# Which JSON is written without `to_json`, as it is not for others to read.
OWN_JSON = {
    "cli.py": "words for the parser",
    "configuration.py": "a text in a message",
    "data/labelled_sources.py": "the text of a label",
    "data/store.py": "what a fingerprint is made of",
    "data/synchronous_grammar.py": "what a fingerprint is made of",
    "data/tokenizers.py": "what the library tokenizers has written",
    "strict_json.py": "to_json itself",
    "weights/configuration.py": "a value in a message",
    "weights/folders.py": "a check that names are text",
    "weights/marian.py": "what the library tokenizers has written",
    "weights/tokenizer_files.py": "what the library tokenizers has written",
}


def test_all_json_of_the_package_goes_through_one_function() -> None:
    package = ROOT / "tx_lightning"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    assert found == OWN_JSON.keys()


def test_each_file_of_json_is_valid_whatever_the_numbers(tmp_path: Path) -> None:
    rows: list[Row] = [{"text": "größer", "score": math.nan}, {"text": "x", "score": -math.inf}]
    sample_logging._append(tmp_path / "val.jsonl", 3, rows)
    assert [row["score"] for row in rows_of(tmp_path / "val.jsonl")] == [None, None]

    nothing = Confusion(torch.zeros(2, 2, dtype=torch.int64))
    class_report._write(tmp_path / "report.json", 3, ["a", "b"], nothing)
    assert strict((tmp_path / "report.json").read_text())["accuracy"] is None

    for _ in range(2):
        add_start({"config": {"trainer": {"gradient_clip_val": math.inf}}}, tmp_path)
    (start,) = strict((tmp_path / "provenance.json").read_text())
    assert start["config"]["trainer"] == {"gradient_clip_val": None}

    writer = PredictionWriter(tmp_path)
    fake: Any = SimpleNamespace(global_rank=0)
    writer.on_predict_start(fake, LightningModule())
    hypothesis: Any = SimpleNamespace(text="x", score=-math.inf)
    writer.on_predict_batch_end(fake, LightningModule(), [(0, [hypothesis])], None, 0)
    part = writer._part(0)
    assert strict(part.read_text()) == [0, [[None, "x"]]]
    ((_, ((score, text),)),) = list(predictions._rows(part))
    assert math.isnan(score)
    assert text == "x"


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


@pytest.mark.parametrize(
    "values", [(0.9, math.nan, 0.5), (math.nan, 0.9), (0.9, math.inf), (0.9, "x")]
)
def test_what_is_not_a_finite_number_is_never_best(values: tuple[Any, ...]) -> None:
    assert best_values([{"val/bleu": value} for value in values]) == {"val/bleu": 0.9}
    assert best_values([{"val/bleu": math.nan}]) == {}


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(), max_size=6))
def test_the_best_is_the_extreme_of_the_finite_values(values: list[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    expected = {"val/bleu": max(finite), "val/loss": min(finite)} if finite else {}
    assert best_values([{"val/bleu": value, "val/loss": value} for value in values]) == expected


BASE = {
    "model": {"class_path": "tests.stand_ins.TinyTask"},
    "data": {"class_path": "tests.stand_ins.TinyData"},
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": f"{__name__}.LogsAnything"}],
    },
}


class LogsAnything(Callback):
    """Logs values of all kinds to every logger, as other people's callbacks do."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        values: dict[str, Any] = {"a": torch.tensor(1), "b": "x", "c": True, "d": {"e": math.nan}}
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # which refuses text
                logger.log_metrics(values, step=trainer.global_step)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["--trainer.logger", "false"], True),
        (["--trainer.logger", "null"], True),
        (["--trainer.logger", "[]"], True),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv"], True),
        ([], True),
        (["--trainer.fast_dev_run", "true"], False),
        (["--trainer.barebones", "true"], False),
    ],
)  # fmt: skip
def test_the_file_of_metrics_is_there_whatever_the_loggers_are(
    words: list[str], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    arguments = ["--config", "run.yaml", "--trainer.default_root_dir", "run", *words]
    assert main(["fit", *arguments]) == 0
    path = Path("run/metrics.jsonl")
    assert path.exists() == there
    if not there:
        return
    rows = rows_of(path)
    assert [row["val/bleu"] for row in rows if "val/bleu" in row] == [2.0, 4.0]
    assert {"a": 1.0, "b": "x", "c": True, "d": {"e": None}}.items() <= rows[0].items()
    if words and words[-1] != "false":
        return
    with path.open("a") as file:
        file.write('{"step": 9, "val/bleu": 9.0}\n{"torn')  # after the checkpoint
    assert main(["fit", "--resume", "run", *TRUST, "--trainer.max_epochs", "3"]) == 0
    values = [row["val/bleu"] for row in rows_of(path) if "val/bleu" in row]
    assert values == [2.0, 4.0, 6.0]


def test_a_run_that_cannot_write_its_metrics_stops_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    Path("run").mkdir()
    Path("run/metrics.jsonl").symlink_to("/dev/full")
    assert main(["fit", "--config", "run.yaml", "--trainer.default_root_dir", "run"]) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    (error,) = errors
    assert error.startswith(
        "error: metrics cannot be written to run/metrics.jsonl: No space left on device; "
    )
    Path("run/metrics.jsonl").unlink()
    assert main(["fit", "--resume", "run", *TRUST]) == 0
    assert [row["val/bleu"] for row in rows_of(Path("run/metrics.jsonl")) if "val/bleu" in row]
