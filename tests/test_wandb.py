"""W&B as its users know it: settings, environment, scripts, artifacts, an online run.

Nothing of wandb is replaced: offline runs are read from their files, and online ones are sent to a
server on this machine.
"""

import contextlib
import gc
import inspect
import io
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import wandb.env
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from wandb.cli import cli as commands
from wandb.sdk import wandb_setup

from tests import wandb_file
from tests.stand_ins import TRUST, TinyData, TinyTask
from tests.wandb_server import WandbServer
from tx_lightning import loggers
from tx_lightning.__main__ import main
from tx_lightning.averaging import best_checkpoints
from tx_lightning.errors import ConfigurationError
from tx_lightning.loggers import MetricsFile, WandB, read_metrics, wandb_mode
from tx_lightning.wandb_files import records, segments

KEY = "0" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory of a user who never used W&B, and a new session of wandb."""
    wandb.teardown()
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = list(sys.path)
    yield here
    sys.path[:] = path
    wandb.finish()
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server for which a key is configured."""
    made = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield made
    wandb.finish()
    wandb.teardown()
    made.close()


def trainer(*loggers: Any, **options: Any) -> Trainer:
    plain: dict[str, Any] = {
        "logger": list(loggers),
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**(plain | options))


def run_file(folder: str, **sections: Any) -> list[str]:
    """The words of a fit of the tiny task in a folder."""
    logger = sections.pop("logger", {"init_args": {"mode": "offline"}})
    trainer = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": {"class_path": "tx_lightning.loggers.WandB", **logger},
    }
    model = {"class_path": "tests.stand_ins.TinyTask"}
    data = {"class_path": "tests.stand_ins.TinyData"}
    run = {"model": model, "data": data, "trainer": trainer | sections}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    return ["fit", "--config", "run.yaml"]


def histories(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in ("_timestamp", "_runtime")}
        for row in wandb_file.read(folder).history
    ]


# Where a run goes.


def command(word: str) -> None:
    """A command of wandb's own, such as `wandb offline`."""
    with contextlib.redirect_stdout(io.StringIO()):
        vars(commands)[word].main([], standalone_mode=False)
    wandb.teardown()


@pytest.mark.parametrize(
    ("word", "with_key", "without_key"),
    [
        ("offline", "offline", "offline"),
        ("disabled", "disabled", "disabled"),
        ("online", "online", "offline"),
        ("enabled", "online", "offline"),
    ],
)
def test_the_commands_of_wandb_count(
    word: str, with_key: str, without_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word == "online":
        command("offline")
    if word == "enabled":
        command("disabled")
    command(word)
    assert WandB().mode == without_key
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert WandB().mode == with_key
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert WandB().mode == mode
        for asked in ("online", "offline", "disabled"):
            assert WandB(mode=asked).mode == asked


MODES = st.sampled_from([None, "online", "offline", "disabled", "dryrun", "run"])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(variable=MODES, local=MODES, of_user=MODES, hidden=st.booleans(), folder=st.booleans())
def test_with_a_key_the_mode_is_the_one_that_wandb_itself_finds(
    variable: str | None, local: str | None, of_user: str | None, hidden: bool, folder: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        (Path.cwd() / ".wandb").mkdir(exist_ok=True) if hidden else None
        below = Path(".wandb" if Path(".wandb").exists() else "wandb")
        user = Path(os.environ["WANDB_CONFIG_DIR"])
        for where, mode in ((below, local), (user, of_user)):
            where.mkdir(exist_ok=True)
            text = "" if mode is None else f"[default]\nmode = {mode}\n"
            (where / "settings").write_text(text)
        if variable is not None:
            patch.setenv("WANDB_MODE", variable)
        if folder:
            patch.setenv("WANDB_DIR", str(user.parent / "elsewhere"))
        theirs = wandb_setup.singleton().settings.mode
        assert wandb_mode() == {"dryrun": "offline", "run": "online"}.get(theirs, theirs)
        wandb.teardown()


def test_with_wandb_dir_the_file_that_the_command_writes_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb.init` does not read it; its user was told that the run will be offline."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    assert WandB().mode == "online"
    command("offline")
    assert (tmp_path / "elsewhere" / "wandb" / "settings").exists()
    assert WandB().mode == "offline"


@pytest.mark.parametrize(
    ("value", "mode"), [("true", "disabled"), ("1", "disabled"), ("", "online")]
)
def test_wandb_disabled_counts_where_no_mode_is_given(
    value: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert WandB().mode == mode
    monkeypatch.setenv("WANDB_MODE", "online")
    assert WandB().mode == "online"


def test_what_is_no_mode_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "is not a mode; there are online, run, shared, offline, dryrun, disabled"
    Path("wandb").mkdir()
    Path("wandb/settings").write_text("[default]\nmode = ofline\n")
    with pytest.raises(ConfigurationError, match=rf"mode in .*settings='ofline' {known}"):
        WandB()
    for value in ("", "OFFLINE", "ofline"):
        monkeypatch.setenv("WANDB_MODE", value)
        with pytest.raises(ConfigurationError, match=f"WANDB_MODE='{value}' {known}"):
            WandB()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    with pytest.raises(ConfigurationError, match="base_url") as caught:
        _ = WandB().experiment
    assert "\n" not in str(caught.value)


def test_a_key_counts_wherever_wandb_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wandb_mode() == "offline"
    netrc, user = tmp_path / "netrc", tmp_path / "config" / "settings"
    user.parent.mkdir()
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode() == "online"
    user.write_text("[default]\nbase_url = https://wandb.example.org\n")  # of `wandb login --host`
    assert wandb_mode() == "offline"
    netrc.write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert wandb_mode() == "online"
    netrc.unlink()
    user.write_text(f"[default]\napi_key = {KEY}\n")
    assert wandb_mode() == "online"
    user.unlink()
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "token")
    assert wandb_mode() == "online"


def test_nothing_leaves_the_machine_of_a_run_that_is_not_online(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even wandb's reports on itself, which it sends when a process ends."""
    from wandb.analytics.opentelemetry import opentelemetry_proxy as reports

    def logged(logger: WandB) -> str:
        for name in ("_singleton_telemetry_proxy", "_singleton_telemetry_recorder"):
            monkeypatch.setattr(reports, name, None)
        logger.log_metrics({"val/bleu": 1.0}, step=1)
        logger.finish(failed=False)
        proxy = reports.get_open_telemetry_proxy()
        wandb.teardown()
        if proxy is not None:
            proxy.shutdown()
        assert "WANDB_ERROR_REPORTING" not in os.environ
        return capsys.readouterr().out

    sync = "; to upload this run: wandb sync wandb/offline-run-"
    assert logged(WandB(mode="offline")).startswith(f"W&B is offline{sync}")
    assert logged(WandB(mode="disabled")) == ""
    command("offline")
    said = f"W&B is offline (mode = offline in wandb/settings){sync}"
    assert logged(WandB()).startswith(said)
    command("disabled")
    assert logged(WandB()) == "W&B is disabled (mode = disabled in wandb/settings)\n"
    command("online")
    monkeypatch.delenv("WANDB_API_KEY")
    assert logged(WandB()).startswith(f"W&B is offline (no API key is configured){sync}")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert logged(WandB()) == "W&B is disabled (WANDB_DISABLED)\n"
    assert server.requests == []


def test_the_settings_of_the_session_hold(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setup(wandb.Settings(mode="offline", project="of-the-session", silent=True))
    logger = WandB()
    logger.log_metrics({"val/bleu": 1.0}, step=1)
    assert logger.mode == "offline"
    assert logger.name == "of-the-session"
    logger.finish(failed=False)
    assert "W&B is offline; to upload this run" in capsys.readouterr().out
    assert server.requests == []


# What the environment says.

COUNTS = "counts where the configuration says nothing"
MODE = "decides the mode, as test_the_commands_of_wandb_count says"
RUN_FOLDER = "counts, but files of the command line are in the run folder"
QUIET = "counts; without it wandb prints nothing"
WANDB = "left to wandb, to which it is not overridden"
NO_MEANING = "wandb 0.31 or a run of a logger does not use it"
VARIABLES = {
    COUNTS: "ENTITY JOB_TYPE NAME NOTES PROJECT RESUME RUN_ID TAGS RUN_GROUP",
    MODE: "API_KEY BASE_URL CONFIG_DIR IDENTITY_TOKEN_FILE MODE",
    RUN_FOLDER: "DIR",
    QUIET: "QUIET SILENT",
    WANDB: """APP_URL ARTIFACT_DIR ARTIFACT_FETCH_FILE_URL_BATCH_SIZE CACHE_DIR CONFIG_PATHS
        CREDENTIALS_FILE DATA_DIR DEBUG CORE_DEBUG DISABLE_CODE DISABLE_GIT DOCKER
        ENABLE_DCGM_PROFILING ERROR_REPORTING FILE_PUSHER_TIMEOUT GIT_COMMIT GIT_REMOTE_URL GIT_ROOT
        HOST HTTP_TIMEOUT IGNORE_GLOBS INIT_TIMEOUT INSECURE_DISABLE_SSL NOTEBOOK_NAME ORGANIZATION
        PROGRAM SAVE_CODE SERVICE SWEEP_ID SWEEP_PARAM_PATH USERNAME USER_EMAIL X_EXECUTABLE
        LAUNCH_QUEUE_ENTITY LAUNCH_QUEUE_NAME LAUNCH_TRACE_ID""",
    NO_MEANING: """AGENT_DISABLE_FLAPPING AGENT_KILL_DELAY AGENT_MAX_INITIAL_FAILURES
        AGENT_REPORT_INTERVAL ANONYMOUS ARGS CRASH_NOSYNC_TIME DESCRIPTION INITED JUPYTER MAGIC
        RUN_DIR RUN_STORAGE_ID SHOW_RUN""",
}


def test_each_variable_of_wandb_is_decided() -> None:
    """A new version of wandb may have new ones."""
    there = {
        value.removeprefix("WANDB_")
        for name, value in vars(wandb.env).items()
        if name.isupper() and isinstance(value, str) and value.startswith("WANDB_")
    }
    decided = [name for names in VARIABLES.values() for name in names.split()]
    assert sorted(decided) == sorted(there)
    assert len(decided) == len(set(decided)) > 60


ENVIRONMENT = {
    "WANDB_PROJECT": "project-e",
    "WANDB_ENTITY": "entity-e",
    "WANDB_NAME": "name-e",
    "WANDB_RUN_GROUP": "group-e",
    "WANDB_TAGS": "one-e,two-e",
    "WANDB_NOTES": "notes-e",
    "WANDB_JOB_TYPE": "job-e",
    "WANDB_RUN_ID": "id-e",
}


def told(folder: Path) -> tuple[Any, ...]:
    """What a run says of itself."""
    (path,) = segments(folder)
    wandb_file.read(folder)
    (run, *_) = [r.run for _, r in records(path) if r.WhichOneof("record_type") == "run"]
    group, job = run.run_group, run.job_type
    about = (run.project, run.entity, run.display_name, group, list(run.tags), run.notes)
    return (*about, job, run.run_id)


def logged(logger: WandB, folder: str | None = None) -> WandB:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        logger.open_in(Path(folder).absolute(), "fit")
    logger.log_metrics({"val/bleu": 1.0}, step=1)
    logger.finish(failed=False)
    return logger


def test_configuration_before_environment_before_settings_files_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logged(WandB(), "runs/fit/now")
    defaults: Any = ("tx_lightning", "", "fit/now", "", [], "", "fit", logger.version)
    assert told(Path("runs/fit/now")) == defaults

    fields = {"project": "project", "entity": "entity", "run_name": "name", "run_group": "group"}
    lines = [f"{field} = {value}-f" for field, value in fields.items()]
    Path("wandb").mkdir()
    Path("wandb/settings").write_text("\n".join(["[default]", "mode = offline", *lines]))
    logged(WandB(), "file")
    assert told(Path("file"))[:4] == ("project-f", "entity-f", "name-f", "group-f")

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    logged(WandB(), "environment")
    said = ("project-e", "entity-e", "name-e", "group-e", ["one-e", "two-e"], "notes-e", "job-e")
    assert told(Path("environment")) == (*said, "id-e")
    logged(WandB())  # outside the command line
    assert told(tmp_path / "elsewhere") == (*said, "id-e")

    configured = WandB(
        project="project-c",
        entity="entity-c",
        name="name-c",
        group="group-c",
        tags=["one-c"],
        notes="notes-c",
        id="id-c",
        save_dir="place-c",
        job_type="job-c",
    )
    logged(configured, "configured")
    said = ("project-c", "entity-c", "name-c", "group-c", ["one-c"], "notes-c", "job-c")
    assert told(Path("place-c")) == (*said, "id-c")
    assert configured.name == "project-c"
    assert configured.version == "id-c"


def test_wandb_prints_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(WandB())
    assert capsys.readouterr().err == ""
    wandb.teardown()
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    logger = WandB()
    assert logger.experiment.settings.console == "wrap"
    assert "wandb: " in capsys.readouterr().err
    logger.finish(failed=False)
    own = WandB(settings=wandb.Settings(console="off", x_disable_stats=True))
    assert own.experiment.settings.console == "off"
    assert own.experiment.settings.x_disable_stats


def test_a_resumed_run_stays_in_its_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "first")
    monkeypatch.setenv("WANDB_NAME", "named")
    logged(WandB(), "run")
    wandb.teardown()
    monkeypatch.setenv("WANDB_PROJECT", "second")
    monkeypatch.setenv("WANDB_NAME", "renamed")
    logged(WandB(), "run")
    wandb_file.read(Path("run"))
    runs = [
        (record.run.project, record.run.display_name, record.run.run_id)
        for path in segments(Path("run"))
        for _, record in records(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(segments(Path("run"))) == 2
    assert len(set(runs)) == 1
    assert runs[0][:2] == ("first", "named")
    assert logged(WandB(project="third"), "run").name == "third"


def test_the_arguments_of_wandb_logger_are_accepted_or_refused() -> None:
    theirs = inspect.signature(WandbLogger.__init__).parameters.keys() - {"kwargs"}
    ours = inspect.signature(WandB.__init__).parameters.keys()
    assert theirs - ours == {"anonymous"}
    for wrong, says in (
        ({"anonymous": True}, "anonymous of WandB has no effect"),
        ({"reinit": True}, "call wandb.finish"),
        ({"proiect": "x"}, "no argument 'proiect' (did you mean 'project'?)"),
        ({"offline": True, "mode": "online"}, "offline=True and mode='online' of WandB: give one"),
        ({"id": "a", "version": "b"}, "version='b' of WandB contradicts id='a'"),
        ({"save_dir": "a", "dir": "b"}, "dir='b' of WandB contradicts save_dir='a'"),
        ({"flush_seconds": math.nan}, "flush_seconds=nan of WandB must be from 0 to 3,600"),
        ({"log_model": "some"}, "log_model='some' of WandB must be True, False or 'all'"),
        ({"checkpoint_name": "a/b", "log_model": True}, "checkpoint_name='a/b' of WandB: "),
    ):
        arguments: dict[str, Any] = wrong
        with pytest.raises(ConfigurationError) as caught:
            WandB(**arguments)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    assert WandB(offline=True).mode == "offline"
    assert WandB(version="v").version == WandB(id="v").version == "v"
    assert WandB(dir="d").save_dir == WandB(save_dir="d").save_dir == "d"


def test_what_wandb_refuses_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match="W&B cannot start the run: ") as caught:
        _ = WandB(id="a/b", mode="offline").experiment
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"WANDB_MODE=offline$") as caught:
        _ = WandB(mode="online").experiment  # without a key, and without a terminal
    assert "wandb login" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_artifacts_cannot_be_fetched_offline() -> None:
    logger = WandB(mode="offline")
    for fetch in (logger.use_artifact, logger.download_artifact, WandB.download_artifact):
        with pytest.raises(ConfigurationError, match="fetch it beforehand with `wandb artifact"):
            fetch("me/p/model:latest")


# In a script or notebook.


def test_one_logger_for_a_fit_and_tests_with_a_finish_between() -> None:
    logger, task = WandB(mode="offline"), TinyTask(6)
    fit = trainer(logger)
    fit.fit(task, TinyData())
    fit.test(task, TinyData(), verbose=False)
    first = wandb.run
    wandb.finish()
    assert first is not None
    fit.test(task, TinyData(), verbose=False)
    assert wandb.run is not None
    assert wandb.run is not first
    assert wandb.run.id == first.id == logger.version
    wandb.finish()
    rows = histories(Path())
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert [sorted(row.keys() & {"val/bleu", "test/loss"}) for row in rows] == [
        ["val/bleu"],
        ["test/loss"],
        ["test/loss"],
    ]
    assert wandb_file.read(Path()).summary["val/bleu"] == {"max": 2}
    saved = fit.checkpoint_callback
    assert isinstance(saved, ModelCheckpoint)
    assert f"/tx_lightning/{logger.version}/checkpoints/" in saved.best_model_path


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_loggers_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    ids = []
    for finishes in (True, False, True):
        logger = WandB(mode="offline", save_dir="place")
        trainer(logger, max_epochs=2).fit(TinyTask(6), TinyData())
        ids.append(logger.version)
        if finishes:
            wandb.finish()
    assert ids[0] != ids[1] == ids[2], "without wandb.finish() the run in progress is used"
    rows = [(row["_step"], row["val/bleu"]) for row in histories(Path("place"))]
    assert sorted(rows) == [(0, 2), (0, 2), (1, 4), (1, 4), (2, 2), (3, 4)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert [("in progress" in line, "wandb sync place/" in line) for line in said] == [
        (False, True),
        (False, True),
        (True, False),
    ]


def test_the_users_own_run_is_used_and_left_open() -> None:
    quiet = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="mine", mode="offline", dir="mine", settings=quiet)
    run.log({"own": 1})
    logger = WandB(project="other", mode="disabled")
    trainer(logger, max_epochs=2).fit(TinyTask(6), TinyData())
    assert (logger.version, logger.name, logger.mode) == (run.id, "mine", "offline")
    run.log({"own": 2})
    logger.finish(failed=False)
    assert wandb.run is run
    given = WandB(experiment=run)
    trainer(given).test(TinyTask(6), TinyData(), verbose=False)
    wandb.finish()
    rows = histories(Path("mine"))
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row.get("own") for row in rows] == [1, None, None, 2, None]
    assert [row.get("val/bleu") for row in rows] == [None, 2, 4, None, None]
    assert "test/loss" in rows[4]
    assert wandb_file.read(Path("mine")).summary["val/bleu"] == {"max": 4}


def test_rows_of_the_users_own_calls_do_not_displace_ours() -> None:
    """`wandb.log` beside the logger, and hooks that log with the next row."""
    task, logger = TinyTask(6), WandB(mode="offline", prefix="p")
    logger.watch(task, log="all", log_freq=1)
    logger.log_metrics({"val/bleu": 1.0}, step=1)
    wandb.log({"own": 1})
    trainer(logger).fit(task, TinyData())
    assert logger.rows == 3
    wandb.finish()
    rows = histories(Path())
    assert [row.get("p-val/bleu") for row in rows] == [1, None, 2]
    assert [row.get("own") for row in rows] == [None, 1, None]
    kinds = [value["_type"] for name, value in rows[2].items() if name.startswith("gradients/")]
    assert kinds == ["histogram", "histogram"]
    assert wandb_file.read(Path()).summary["p-val/bleu"] == {"max": 2}


def test_media_are_what_wandb_logger_documents() -> None:
    logger = WandB(mode="offline")
    logger.log_image("image", [np.zeros((4, 4, 3), dtype=np.uint8)], step=1, caption=["black"])
    logger.log_text("text", columns=["a"], data=[["x"]], step=2)
    logger.log_table("table", columns=["a"], data=[["x"]], step=3)
    Path("sound.wav").touch()
    with pytest.raises(wandb.errors.Error, match="soundfile"):  # of which nothing depends
        logger.log_audio("audio", ["sound.wav"], step=4)
    wandb.finish()
    rows = histories(Path())
    kinds = [row[name]["_type"] for row, name in zip(rows, ("image", "text", "table"), strict=True)]
    assert kinds == ["images/separated", "table-file", "table-file"]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]


def test_tables_are_valid_json() -> None:
    logger = WandB(mode="offline")
    logger.log_table("table", columns=["a", "b"], data=[["x", math.nan], ["y", -math.inf]], step=3)
    wandb.finish()
    (file,) = Path("wandb").rglob("*.table.json")
    assert strict(file.read_text()) == {"columns": ["a", "b"], "data": [["x", None], ["y", None]]}


def strict(text: str) -> Any:
    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refused)


# Checkpoints as artifacts.


def artifacts(folder: Path) -> list[Any]:
    """The artifacts of all starts of a run, but those of tables."""
    wandb_file.read(folder)
    found = [
        record.artifact
        for path in segments(folder)
        for _, record in records(path)
        if record.WhichOneof("record_type") == "artifact"
    ]
    return [artifact for artifact in found if artifact.type == "model"]


def about(artifact: Any) -> tuple[str, bool]:
    """The name of a logged file, and whether it was the best."""
    metadata = strict(artifact.metadata)
    return metadata["original_filename"], "best" in artifact.aliases


def saving(**options: Any) -> ModelCheckpoint:
    plain: dict[str, Any] = {
        "every_n_train_steps": 1,
        "save_top_k": 2,
        "save_last": True,
        "monitor": "step",
        "mode": "max",
        "filename": "{step}",
    }
    return ModelCheckpoint(**(plain | options))


LAST, ONE, TWO, THREE = "last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"


@pytest.mark.parametrize(
    ("log_model", "save_top_k", "expected"),
    [
        (False, 2, []),
        (True, 2, [(TWO, False), (THREE, True), (LAST, False)]),
        (True, -1, [each for name in (ONE, TWO, THREE) for each in ((name, True), (LAST, False))]),
        ("all", 2, [each for name in (ONE, TWO, THREE) for each in ((name, True), (LAST, False))]),
    ],
)  # fmt: skip
def test_checkpoints_are_logged_offline_for_a_later_sync(
    log_model: Any, save_top_k: int, expected: list[tuple[str, bool]]
) -> None:
    logger = WandB(mode="offline", log_model=log_model)
    fit = trainer(logger, limit_train_batches=3, callbacks=[saving(save_top_k=save_top_k)])
    fit.fit(TinyTask(6), TinyData())
    fit.test(TinyTask(6), TinyData(), verbose=False)
    wandb.finish()
    found = artifacts(Path())
    assert [about(artifact) for artifact in found] == expected
    assert all("latest" in artifact.aliases for artifact in found)
    assert {artifact.name for artifact in found} <= {f"model-{logger.version}"}
    for artifact in found[-2:]:  # the others were replaced meanwhile
        (entry,) = artifact.manifest.contents
        assert entry.path == "model.ckpt"
        (saved,) = Path("tx_lightning").rglob(about(artifact)[0])
        assert Path(entry.local_path).read_bytes() == saved.read_bytes()
        assert Path(entry.local_path) != saved
        assert strict(artifact.metadata)["ModelCheckpoint"]["save_top_k"] == save_top_k


def test_a_failed_or_disabled_run_logs_no_checkpoints() -> None:
    class Broken(TinyTask):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    fit = trainer(
        WandB(mode="offline", log_model=True), limit_train_batches=3, callbacks=[saving()]
    )
    with pytest.raises(KeyError):
        fit.fit(Broken(6), TinyData())
    wandb.finish()
    assert artifacts(Path()) == []
    trainer(WandB(mode="disabled", log_model="all"), callbacks=[saving(dirpath="x")]).fit(
        TinyTask(6), TinyData()
    )
    assert not list(Path(os.environ["WANDB_DATA_DIR"]).rglob("*"))


SAVING = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"save_last": True, "save_top_k": 2, "monitor": "step", "mode": "max"},
}
AVERAGING = {"class_path": "tx_lightning.callbacks.CheckpointAveraging"}


@pytest.mark.parametrize("log_model", [True, "all"])
def test_a_resumed_run_logs_no_checkpoint_twice(log_model: Any) -> None:
    logger = {
        "init_args": {"mode": "offline", "log_model": log_model, "checkpoint_name": "best-of-all"},
        "dict_kwargs": {"job_type": "study"},
    }
    words = run_file("run", callbacks=[SAVING, AVERAGING], logger=logger)
    assert main(words) == 0
    first = artifacts(Path("run"))
    assert {about(artifact)[0] for artifact in first} == {
        "epoch=0-step=2.ckpt",
        LAST,
        "averaged.ckpt",
    }
    assert main(["fit", "--resume", "run", *TRUST, "--trainer.max_epochs", "2"]) == 0
    found = artifacts(Path("run"))
    files = [(about(artifact), artifact.manifest.contents[0].digest) for artifact in found]
    assert len(set(files)) == len(files) == 6
    assert sorted(about(artifact) for artifact in found[len(first) :]) == [
        ("averaged.ckpt", False),
        ("epoch=1-step=4.ckpt", True),
        (LAST, False),
    ]
    assert {artifact.name for artifact in found} == {"best-of-all"}
    averaged = [artifact for artifact in found if about(artifact)[0] == "averaged.ckpt"]
    assert all("averaged" in artifact.aliases for artifact in averaged)
    assert wandb_file.read(Path("run")).job_type == "study"
    assert [row["_step"] for row in histories(Path("run"))] == [0, 1]


def test_what_cannot_be_copied_is_said_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = WandB(mode="offline", log_model=True)
    checkpoint = Path("some.ckpt")
    checkpoint.write_bytes(b"weights")
    (tmp_path / "data").write_text("in the place of a folder")
    logger.log_checkpoint(checkpoint, ["one"])
    said = capsys.readouterr().err
    assert said.startswith("W&B: checkpoint some.ckpt was not logged: ")
    assert said.count("\n") == 1
    (tmp_path / "data").unlink()
    for _ in range(2):
        logger.log_checkpoint(checkpoint, ["two"])
    Path("link.ckpt").symlink_to(checkpoint)
    logger.log_checkpoint(Path("link.ckpt"), ["three"])
    wandb.finish()
    (artifact,) = artifacts(Path())
    assert set(artifact.aliases) == {"latest", "two"}


# Online.


def test_an_online_run_is_resumed_without_a_row_twice(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(steps: range, rows: int | None) -> WandB:
        logger, metrics = WandB(log_model=True), MetricsFile(Path("run").absolute())
        logger.open_in(Path("run").absolute(), "fit")
        if rows is not None:
            logger.go_on(rows, read_metrics(metrics.path)[:rows])
        for step in steps:
            value = math.nan if step == 2 else 50.0 - step
            for each in (logger, metrics):
                each.log_metrics({"val/bleu": value}, step=step)
        assert logger.rows == steps.stop
        checkpoint = Path("some.ckpt")
        checkpoint.write_bytes(bytes(steps))
        logger.log_checkpoint(checkpoint, ["best"])
        logger.finish(failed=False)
        return logger

    Path("run").mkdir()
    first = start(range(4), None)
    run_id = str(first.version)
    assert f"W&B: {server.url}/me/tx_lightning/runs/{run_id}\n" in capsys.readouterr().out
    second = start(range(2, 6), 2)
    assert second.version == run_id
    rows = server.history[run_id]
    assert [(row["_step"], row["trainer/global_step"]) for row in rows] == [
        (n, n) for n in range(6)
    ]
    assert server.summary[run_id]["val/bleu"] == {"max": 50.0}
    assert [a["artifactCollectionName"] for a in server.artifacts] == 2 * [f"model-{run_id}"]
    assert server.requests.count("/artifact/model.ckpt") == 2


def test_sync_uploads_what_was_recorded_offline(server: WandbServer) -> None:
    logger = WandB(mode="offline", log_model=True)
    trainer(logger, callbacks=[saving()]).fit(TinyTask(6), TinyData())
    folder = logger.files
    wandb.finish()
    assert folder is not None
    wandb_file.read(Path())
    assert server.requests == []
    commands.sync.main([str(folder)], standalone_mode=False)
    assert [row["val/bleu"] for row in server.history[str(logger.version)]] == [2]
    assert server.requests.count("/artifact/model.ckpt") == 3


def test_checkpoints_that_the_server_refuses_do_not_stop_training(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuses = True
    logger = WandB(log_model="all")
    trainer(logger, callbacks=[saving()]).fit(TinyTask(6), TinyData())
    wandb.finish()
    assert "was not logged: " in capsys.readouterr().err
    assert server.artifacts == []
    assert [row["val/bleu"] for row in server.history[str(logger.version)]] == [2]


# When things go wrong.


def test_the_summary_of_wandb_has_the_best_that_is_a_number() -> None:
    """W&B's own maximum of (0.9, NaN, 0.5) is NaN."""
    cases = [
        ((0.9, math.nan, 0.5), 0.9),
        ((math.nan, 0.5, 0.9), 0.9),
        ((0.5, math.inf, 0.7), 0.7),
        ((0.5, -math.inf, math.nan), 0.5),
    ]
    for number, (values, best) in enumerate(cases):
        logger = WandB(mode="offline", save_dir=str(number))
        for step, value in enumerate(values):
            row = {"val/bleu": value, "val/loss": -value, "train/loss": value}
            logger.log_metrics(row, step=step)
        wandb.finish()
        run = wandb_file.read(Path(str(number)))
        assert run.summary["val/bleu"] == {"max": best}
        assert run.summary["val/loss"] == {"min": -best}
        assert [str(row["val/bleu"]) for row in run.history] == [f"{value:g}" for value in values]


def test_after_a_resume_the_summary_knows_the_best_before_it() -> None:
    every = {"class_path": SAVING["class_path"], "init_args": {"save_top_k": -1}}
    words = run_file("run", max_epochs=2, callbacks=[every, {"class_path": f"{__name__}.NaNAt"}])
    assert main(words) == 0
    assert main(["fit", "--resume", "run", *TRUST, "--trainer.max_epochs", "3"]) == 0
    assert histories(Path("run"))[0]["val/bleu"] == 2
    rows = read_metrics(Path("run/metrics.jsonl"))
    assert [math.isnan(row["val/bleu"]) for row in rows] == [False, True, True]
    assert [path.name for path in best_checkpoints(Path("run/checkpoints"), 5)] == [
        "epoch=0-step=2.ckpt"
    ]
    for path in segments(Path("run")):
        summary = wandb_file.WandbFile()
        for _, record in records(path):
            wandb_file._add(summary, record)
        assert summary.summary["val/bleu"] == {"max": 2}


class NaNAt(Callback):
    """Turns the metrics of all validations but the first into NaN."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:
            pl_module.log("val/bleu", math.nan)


def service() -> int:
    """The process of wandb's service."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise AssertionError("there is none")


def test_training_goes_on_without_the_service_of_wandb(
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed: list[int] = []

    class KillsService(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                killed.append(service())
                os.kill(killed[0], signal.SIGKILL)

    logger = WandB(mode="offline", log_model="all")
    fit = trainer(
        logger,
        MetricsFile(Path()),
        max_epochs=3,
        callbacks=[KillsService(), saving(every_n_train_steps=3)],
    )
    fit.fit(TinyTask(6), TinyData())
    assert fit.global_step == 6
    logger.finish(failed=False)
    assert [row["val/bleu"] for row in read_metrics(Path("metrics.jsonl"))] == [2, 4, 6]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B")]
    assert said[-1].startswith("W&B's service has ended: the run goes on without it; ")
    assert wandb.run is None
    logged(WandB(mode="offline", save_dir="next"))
    assert histories(Path("next"))
    # What wandb leaves behind of a service that was killed.
    for path in Path(tempfile.gettempdir()).glob(f"wandb-{os.getpid()}-{killed[0]}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for found in gc.get_objects():
        if type(found) is subprocess.Popen and found.pid in killed:
            found.wait()
    for handler in [
        h for h in logging.getLogger("wandb").handlers if isinstance(h, logging.FileHandler)
    ]:
        logging.getLogger("wandb").removeHandler(handler)
        handler.close()


def test_a_full_disk_of_wandb_is_said_and_training_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_PATIENCE", 0.2)
    logger = WandB(mode="offline")
    _ = logger.experiment
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(service(), resource.RLIMIT_FSIZE, (20_000, hard))
    for step in range(300):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finish(failed=False)
    said = capsys.readouterr().err
    assert "wandb is not complete, the disk may be full; metrics.jsonl has every row" in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("file").touch()
    logger = WandB(mode="offline", save_dir="file/below")
    logger.log_metrics({"val/bleu": 1.0}, step=1)
    logger.finish(failed=False)
    said = capsys.readouterr()
    assert said.err.startswith("W&B: cannot write to file/below: its files are in ")
    assert said.err.count("\n") == 1
    assert logger.files is None
    (folder,) = {line.rpartition(" ")[2] for line in said.out.splitlines()}
    assert Path(folder).is_dir()
    shutil.rmtree(Path(folder).parents[1])


def test_what_is_said_is_true_in_each_mode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run of the command line that goes through the modes one after the other."""

    def said(*words: str) -> list[str]:
        wandb.teardown()
        begun = Path("run").exists()
        resume = ["--resume", "run", *TRUST] if begun else run_file("run", logger={})[1:]
        epochs = str(1 + len(list(Path("run").glob("wandb/offline-*"))))
        assert main(["fit", *resume, "--trainer.max_epochs", epochs, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("W&B")]

    def latest() -> str:
        return str(segments(Path("run"))[-1].parent)

    offline = said()
    assert offline == [
        f"W&B is offline (no API key is configured); to upload this run: wandb sync {latest()}",
        f"W&B run: {latest()}",
    ]
    command("disabled")
    assert said() == ["W&B is disabled (mode = disabled in wandb/settings)"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert said() == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = said()
    assert first == f"W&B is offline; to upload this run: wandb sync {latest()}"
    assert second == f"W&B run: {latest()}"
    assert said("--trainer.logger", "false") == []
    assert len(segments(Path("run"))) == 2
    assert [row["trainer/global_step"] for row in histories(Path("run"))] == [2, 4]
    assert [row["step"] for row in read_metrics(Path("run/metrics.jsonl"))] == [2, 4, 6]
