"""Where metrics go: a JSON Lines file in the run folder, always, and Weights & Biases."""

import contextlib
import math
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from tx_lightning.errors import ConfigurationError
from tx_lightning.metrics_file import BEST, MetricsFile, best_values, plain, read_metrics
from tx_lightning.runs import shown
from tx_lightning.strict_json import finite
from tx_lightning.wandb_artifacts import CheckpointArtifacts
from tx_lightning.wandb_files import (
    UnknownFormat,
    has_numbers,
    is_complete,
    keep_history,
    logged_files,
    run_of,
)
from tx_lightning.wandb_settings import (
    Mode,
    check_arguments,
    init_arguments,
    mode_and_reason,
    no_reports,
    one_line_errors,
    quiet_settings,
    same,
    wandb_mode,
)

__all__ = ["BEST", "MetricsFile", "WandB", "best_values", "read_metrics", "wandb_mode"]

PROJECT = "tx_lightning"
STEP = "trainer/global_step"
MOST_SECONDS = 3_600
_PATIENCE = 10.0  # seconds for W&B's service to write the end of a run


class WandB(WandbLogger):
    """Weights & Biases: online, offline or disabled.

    It does what Lightning's WandbLogger does, in a script or notebook as on the command line, where
    its files are in the run folder. Where an argument is null, W&B's environment variables count
    (WANDB_PROJECT, WANDB_NAME, ...), then its settings files, then the default. WANDB_DIR counts
    outside the command line. If a run is in progress in the process, it is used.

    The run holds the resolved configuration (nested), the number of parameters, the statistics of
    the data and the signatures of the metrics. `val/bleu` is summarized by its maximum, and values
    that are not finite are no candidates for it.

    When a run is resumed, id, project and name are kept, and its history has no step twice and no
    gap: offline, the files of earlier starts are cut to the step where training resumes, and rows
    that were lost in a kill are taken from metrics.jsonl; online, rows that the server has are not
    sent again. If W&B's service dies, the logger goes on without it.

    Args:
        project: The project of the run; tx_lightning by default.
        mode: Where the run goes. `auto` obeys WANDB_MODE, then `wandb offline` and `wandb disabled`
            in the working directory or for the user; without them, it is online if an API key is
            configured (WANDB_API_KEY or `wandb login`) and offline if not.
        entity: The user or team that owns the project.
        name: The name of the run; that of the run folder by default.
        group: Runs of one group, such as seeds of one experiment, are shown together.
        tags: Labels of the run.
        notes: A longer description of the run.
        id: The id of the run; one that exists is continued.
        version: The same as `id`.
        save_dir: The folder for W&B's files; the run folder by default.
        dir: The same as `save_dir`.
        offline: The same as `mode: offline`.
        log_model: Whether to log checkpoints as artifacts: true logs the best, the last and the
            averaged one when training ends, "all" logs each one when it is saved. Offline, they are
            copied, and `wandb sync` uploads them.
        checkpoint_name: The name of these artifacts; model-ID by default.
        prefix: Put before the name of each metric, with a dash.
        experiment: A run of `wandb.init` to use.
        add_file_policy: Whether checkpoints are copied before the upload ("mutable") or not.
        flush_seconds: How long history may wait in memory before it is on disk.
        **init: Other arguments of `wandb.init`, such as `job_type` or `settings`.

    Attributes:
        mode: The mode of the run.
        checkpoints: What has become of its checkpoints.

    Raises:
        ConfigurationError: When arguments contradict each other or do not exist, or the run cannot
            be started.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        id: str | None = None,  # noqa: A002  # as WandbLogger has it
        version: str | None = None,
        save_dir: str | Path | None = None,
        dir: str | Path | None = None,  # noqa: A002
        offline: bool = False,
        log_model: Literal["all"] | bool = False,
        checkpoint_name: str | None = None,
        prefix: str = "",
        experiment: Any = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        flush_seconds: float = 0.05,
        **init: Any,
    ) -> None:
        check_arguments(init)
        if offline:
            if mode not in ("auto", "offline"):
                raise ConfigurationError(f"offline=True and mode={mode!r} of WandB: give one")
            mode = "offline"
        super().__init__(project=project or PROJECT, prefix=prefix)
        self.checkpoints = CheckpointArtifacts(
            log_model, checkpoint_name, add_file_policy, self._recording
        )
        folder = same("save_dir", save_dir, "dir", dir)
        self._save_dir = None if folder is None else str(folder)
        self._id = same("id", id, "version", version)
        self._given = {
            **init,
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": tags,
            "notes": notes,
        }
        self._asked = mode != "auto"
        self.mode, self._why = mode_and_reason() if mode == "auto" else (mode, "")
        if not 0 <= flush_seconds <= MOST_SECONDS:
            raise ConfigurationError(
                f"flush_seconds={flush_seconds} of WandB must be from 0 to {MOST_SECONDS:,}"
            )
        self._flush_seconds = flush_seconds
        self._folder: Path | None = None  # the run folder
        self._defaults = {"project": PROJECT, "resume": "allow"}
        self._rows = 0  # rows that were logged, in earlier starts as well
        self._sent = 0  # the first rows, which the server or the files have already
        self._goes_on = False  # whether the next row continues the history of another file
        self._missing: list[dict[str, Any]] = []
        self._resumed = False
        self._adopted = False
        self._best: dict[str, float] = {}
        self._own_summary = False
        if experiment is not None:
            self._adopt(experiment)

    def open_in(self, folder: Path, job_type: str) -> None:
        """Write below a run folder, and take up the run that an earlier start left there.

        Args:
            folder: The run folder, `runs/<name>/<time>`.
            job_type: The verb: fit, validate, test or predict.
        """
        self._folder = folder
        self._save_dir = self._save_dir or str(folder)
        if self._id is None and self._id_file.exists():
            self._id = self._id_file.read_text().strip()
        self._defaults |= {"name": f"{folder.parent.name}/{folder.name}", "job_type": job_type}
        with contextlib.suppress(UnknownFormat, OSError):
            earlier = run_of(self._files_folder, self._id) if self._id else None
            if earlier is not None:
                kept = {"project": earlier.project, "entity": earlier.entity}
                kept["name"] = earlier.display_name
                self._given |= {
                    key: kept[key] for key in kept if kept[key] and self._given[key] is None
                }

    @property
    def _id_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "wandb" / "run_id"

    @property
    def _files_folder(self) -> Path:
        return Path(str(self._save_dir))

    def go_on(self, rows: int | None, metrics: Sequence[dict[str, Any]]) -> None:
        """Take up the history of a run that is resumed.

        Args:
            rows: `rows` when the checkpoint was written; None: it does not say.
            metrics: The rows of metrics.jsonl up to there.
        """
        self._resumed = True
        self._rows = rows or 0
        self._best = best_values(metrics)
        assert self._folder is not None
        folder, run_id = (self._files_folder, self._id) if self._id else (self._folder, None)
        try:
            if self.mode == "offline":
                kept = keep_history(folder, sys.maxsize if rows is None else rows, run_id)
                self._rows, self._sent = len(kept), len(kept) + kept.sent
                if rows is not None:
                    self._missing = list(metrics[sum(map(has_numbers, kept)) :])
            self.checkpoints.logged = logged_files(folder, run_id)
        except (UnknownFormat, OSError) as error:
            again = "steps that are taken again are written twice"
            said = again if self.mode == "offline" else "checkpoints may be logged again"
            print(f"W&B: {said}: {error}; the file is not changed", file=sys.stderr)

    @property
    def rows(self) -> int:
        """Rows of history so far, those of earlier starts and of the user's own calls included."""
        run: Any = self._experiment
        rows = self._rows
        if run is not None and not self._adopted and rows >= self._sent:
            with self._unless_lost(), contextlib.suppress(TimeoutError):
                rows = max(rows, run.step)  # asks the service, which may be slow
        return rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row to the history; of a resumed run, not what the server has already."""
        run = self.experiment
        number, self._rows = self._rows, self._rows + 1
        if number < self._sent:
            return
        row = {self._named(name): value for name, value in metrics.items()}
        if step is not None and not self._given.get("sync_tensorboard"):
            row[STEP] = step
        first = {"step": number} if self._goes_on else {}
        self._goes_on = False
        with self._unless_lost():
            run.log(row, commit=True, **first)
            self._summarize(metrics)

    def _named(self, metric: str) -> str:
        return f"{self._prefix}-{metric}" if self._prefix else metric

    def _summarize(self, metrics: Mapping[str, Any]) -> None:
        """Keep the best values in the summary where W&B's own would be wrong.

        W&B takes NaN for the best of all; and each start of an offline run has a summary of its
        own, which knows nothing of those before it.
        """
        values = {name: plain(value) for name, value in metrics.items() if name in BEST}
        if not values:
            return
        self._best = best_values([self._best, values])
        numbers = [value for value in values.values() if isinstance(value, float)]
        self._own_summary |= not all(map(math.isfinite, numbers))
        if self._own_summary:
            self._write_summary()

    def _write_summary(self) -> None:
        best = {self._named(name): {BEST[name]: value} for name, value in self._best.items()}
        self.experiment.summary.update(best)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        with self._unless_lost():
            super().log_hyperparams(finite(values))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        super().log_table(key, columns, finite(data), dataframe, step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; it is started when first asked for, and again after `wandb.finish()`."""
        if self._experiment is None or _is_finished(self._experiment):
            self._start()
        return self._experiment

    def _start(self) -> None:
        import wandb

        self._experiment, self._adopted = None, False
        if wandb.run is not None:
            self._adopt(wandb.run)
            print(
                f"W&B: logging to the run in progress, {wandb.run.name or wandb.run.id}; to start "
                "a new one, call wandb.finish() before the trainer starts",
                flush=True,
            )
            return
        remedy = "; without W&B's server: --trainer.logger.mode offline, or WANDB_MODE=offline"
        with one_line_errors("W&B cannot start the run", remedy if self.mode == "online" else ""):
            given = {**self._given, "id": self._id, "dir": self._save_dir}
            self._wandb_init = init_arguments(given, self._defaults)
            # In mode auto wandb.setup and the answer to a login prompt count as well.
            auto = self.mode == "online" and not self._asked
            self._wandb_init["mode"] = None if auto else self.mode
            if self.mode != "disabled" and self._wandb_init["dir"] is not None:
                self._wandb_init["dir"] = _writable(Path(self._wandb_init["dir"]).expanduser())
            settings = quiet_settings(self._flush_seconds, self._given.get("settings"))
            if self._folder is not None:
                settings.use_dot_wandb = False  # the run folder has wandb/
            self._wandb_init["settings"] = settings
            with no_reports(self.mode):
                run = super().experiment
        self._belongs_to(run)
        if self.mode == "disabled":
            if self._why:
                print(f"W&B is disabled{self._why}", flush=True)
            return
        self._take_up(run)
        self._announce(run)

    def _take_up(self, run: Any) -> None:
        """Go on with the history where an earlier start, or `wandb.finish()`, has ended it."""
        if self._folder is not None:
            self._id_file.parent.mkdir(exist_ok=True)
            self._id_file.write_text(f"{run.id}\n")
        if self.mode == "online":
            self._sent = max(self._sent, run.starting_step) if self._resumed else 0
        missing, self._missing = self._missing, []
        self._goes_on = self.mode == "offline" and max(self._rows, self._sent) > 0
        if self._best:  # of an earlier start
            self._own_summary = True
            self._write_summary()
        for row in missing:
            names = row.keys() - {"step", "time"}
            self.log_metrics({name: row[name] for name in names}, step=row["step"])

    def _belongs_to(self, run: Any) -> None:
        """Remember which run this is, also for the time after a `wandb.finish()`."""
        self.mode = _mode_of(run)
        self._id, self._project = run.id, run.project
        self._given |= {"project": run.project, "entity": run.entity or None}
        for metric, summary in BEST.items():
            run.define_metric(self._named(metric), summary=summary, step_metric=STEP)

    def _adopt(self, run: Any) -> None:
        """Log to a run that the user, or another logger, has started; it is theirs to finish."""
        self._experiment, self._adopted = run, True
        self._missing, self._sent, self._goes_on = [], 0, False
        self._belongs_to(run)

    def _announce(self, run: Any) -> None:
        if self.mode == "online":
            print(f"W&B: {run.url}", flush=True)
            return
        folder = shown(Path(run.settings.sync_dir))
        print(f"W&B is offline{self._why}; to upload this run: wandb sync {folder}", flush=True)

    @property
    def files(self) -> Path | None:
        """The folder of W&B's files of this start, None where it has written none."""
        run = self._experiment
        return None if run is None or self.mode == "disabled" else Path(run.settings.sync_dir)

    @contextlib.contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Go on without W&B when its service has ended: metrics.jsonl has what it misses."""
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (ConnectionError, HandleAbandonedError, MailboxClosedError):
            if self._experiment is None:
                raise
            said = (
                "W&B's service has ended: the run goes on without it; metrics.jsonl has every row"
            )
            print(said, file=sys.stderr)
            self._experiment, self.mode = _replaced(self._experiment), "disabled"

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log the checkpoints that are new, now or when training ends."""
        with self._unless_lost():
            self.checkpoints.saved(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints of a training that has ended well; the run goes on."""
        with self._unless_lost():
            self.checkpoints.end(log=status == "success")

    @rank_zero_only
    def log_checkpoint(self, path: Path, aliases: Sequence[str]) -> None:
        """Log a checkpoint as an artifact where `log_model` says so.

        Args:
            path: The checkpoint.
            aliases: Names of this version of the artifact.
        """
        with self._unless_lost():
            self.checkpoints.log(path, aliases)

    def _recording(self) -> Any:
        """The run, None where it records nothing."""
        return None if self.mode == "disabled" else self.experiment

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        run = self.experiment
        _check_online(self.mode, artifact)
        return run.use_artifact(artifact, type=artifact_type)

    @staticmethod
    def download_artifact(
        artifact: str,
        save_dir: str | Path | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str | None:
        import wandb

        if use_artifact and wandb.run is not None:
            _check_online(_mode_of(wandb.run), artifact)
        return WandbLogger.download_artifact(artifact, save_dir, artifact_type, use_artifact)

    @rank_zero_only
    def finish(self, *, failed: bool) -> None:
        """Close the run, so that everything is on disk or uploaded; not one that was adopted."""
        run: Any = self._experiment
        if run is not None and not self._adopted and not _is_finished(run):
            with self._unless_lost():
                run.finish(exit_code=int(failed))
            if self.mode == "offline":
                _wait_for(Path(run.settings.sync_file))
        self._experiment = None


def _mode_of(run: Any) -> Mode:
    return "disabled" if run.disabled else "offline" if run.offline else "online"


def _check_online(mode: Mode, artifact: str) -> None:
    if mode != "online":
        raise ConfigurationError(
            f"artifact {artifact} cannot be fetched while W&B is {mode}: use mode online, or fetch "
            f"it beforehand with `wandb artifact get {artifact}`"
        )


def _writable(folder: Path) -> str:
    """Return the folder, or one for temporary files where it cannot be written to."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return str(folder)
    found = tempfile.mkdtemp(prefix="wandb-")
    print(f"W&B: cannot write to {shown(folder)}: its files are in {found}", file=sys.stderr)
    return found


def _replaced(run: Any) -> Any:
    """Remove a run whose service has ended from wandb, and return a disabled run."""
    import wandb
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.module import unset_globals

    # They tell the service first, which fails; not called, they would fail when the process ends.
    for end in (run.unwatch, run.finish, wandb.teardown, wandb_setup.singleton().asyncer.join):
        with contextlib.suppress(Exception):
            end()
    disabled = wandb.init(mode="disabled", settings=wandb.Settings(silent=True))
    unset_globals()  # type: ignore[no-untyped-call]
    return disabled


def _is_finished(run: Any) -> bool:
    return bool(vars(run).get("_is_finished"))  # a disabled run does not have it


def _wait_for(path: Path) -> None:
    """Wait until W&B's service has written the end of a run, which it does after `finish`."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, UnknownFormat):
            if is_complete(path):
                return
        time.sleep(0.01)
    print(
        f"W&B: {shown(path)} is not complete, the disk may be full; metrics.jsonl has every row",
        file=sys.stderr,
    )
