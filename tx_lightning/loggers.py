"""Where metrics go: a JSON Lines file in the run folder, always, and Weights & Biases."""

import json
import netrc
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from tx_lightning.runs import METRICS, shown
from tx_lightning.wandb_files import UnknownFormat, has_numbers, keep_history

MOST_SECONDS = 3_600

Mode = Literal["online", "offline", "disabled"]
BEST = {
    "val/bleu": "max",
    "val/chrf": "max",
    "val/accuracy": "max",
    "val/macro_f1": "max",
    "val/loss": "min",
    "val/nll": "min",
    "val/perplexity": "min",
    "val/bits_per_byte": "min",
    "val/excess_nats": "min",
}


class MetricsFile(Logger):
    """Appends each row of metrics to `metrics.jsonl` in the run folder, at once.

    A row is `{"step": ..., "time": seconds since 1970, name: value, ...}`. The file is what a run
    can be judged by when everything else failed: a killed process loses no row.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / METRICS

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: float(value) for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """The configuration stands in config.yaml beside the file."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a kill tore."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class WandB(WandbLogger):
    """Weights & Biases: online, offline or disabled, into the run folder.

    The run holds the resolved configuration (nested), the number of parameters, the statistics of
    the data and the signatures of the metrics. `val/bleu` is summarized by its maximum.

    When a run is resumed its id is kept, and its history has no step twice and no gap: offline, the
    files of earlier starts are cut to where training goes on from, and what a kill was faster than
    to write is taken from metrics.jsonl; online, rows that the server has are not sent again.

    Args:
        project: The project of the run.
        mode: Where the run goes. `auto` obeys WANDB_MODE; without it, it is online where an API key
            is configured (WANDB_API_KEY or `wandb login`) and offline elsewhere.
        entity: The user or team that owns the project.
        name: The name of the run; that of the run folder by default.
        group: Runs of one group, as seeds of one experiment, are shown together.
        tags: Labels of the run.
        notes: A longer description of the run.
        flush_seconds: How long history may wait in memory before it is on disk.

    Attributes:
        rows: Rows of history so far, those of earlier starts included.
    """

    def __init__(
        self,
        *,
        project: str = "tx_lightning",
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        flush_seconds: float = 0.05,
    ) -> None:
        super().__init__(
            project=project, name=name, entity=entity, group=group, tags=tags, notes=notes
        )
        self.mode: Mode = wandb_mode() if mode == "auto" else mode
        self._asked = mode != "auto" or bool(os.environ.get("WANDB_MODE"))
        if not 0 <= flush_seconds <= MOST_SECONDS:
            raise ValueError(
                f"flush_seconds={flush_seconds} of WandB must be from 0 to {MOST_SECONDS:,}"
            )
        self._flush_seconds = flush_seconds
        self.rows = 0
        self._missing: list[dict[str, Any]] = []
        self._resumed = False

    def open_in(self, folder: Path, job_type: str) -> None:
        """Write below a run folder, and take up the id that an earlier start left there.

        Args:
            folder: The run folder, `runs/<name>/<time>`.
            job_type: The verb: fit, validate, test or predict.
        """
        self._save_dir = str(folder)
        self._wandb_init.pop("anonymous", None)  # of no effect any more, and wandb warns of it
        self._id_file = folder / "wandb" / "run_id"
        if self._id_file.exists():
            self._id = self._id_file.read_text().strip()
        self._name = self._name or f"{folder.parent.name}/{folder.name}"
        self._wandb_init |= {
            "dir": self._save_dir,
            "id": self._id,
            "name": self._name,
            "mode": self.mode,
            "job_type": job_type,
        }

    def go_on(self, rows: int | None, metrics: Sequence[dict[str, Any]]) -> None:
        """Take up the history of a run that is resumed.

        Args:
            rows: `rows` when the checkpoint was written; None: it does not say.
            metrics: The rows of metrics.jsonl up to there.
        """
        self._resumed = True
        if self.mode != "offline":
            self.rows = rows or 0
            return
        try:
            kept = keep_history(Path(str(self._save_dir)), sys.maxsize if rows is None else rows)
        except (UnknownFormat, OSError) as error:
            print(f"W&B: steps that are taken again are written twice: {error}", file=sys.stderr)
            self.rows = rows or 0
            return
        self.rows = len(kept)
        if rows is not None:
            self._missing = list(metrics[sum(map(has_numbers, kept)) :])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row to the history; of a resumed run, not what the server has already."""
        run = self.experiment
        number, self.rows = self.rows, self.rows + 1
        if number >= run.starting_step:
            place = {} if step is None else {"trainer/global_step": step}
            run.log({**metrics, **place}, step=number, commit=True)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; it is started when first asked for."""
        if self._experiment is None:
            self._start()
        return self._experiment

    def _start(self) -> None:
        import wandb

        self._wandb_init["settings"] = wandb.Settings(
            x_transaction_log_flush_interval=self._flush_seconds, console="off", silent=True
        )
        run = super().experiment
        for metric, summary in BEST.items():
            run.define_metric(metric, summary=summary, step_metric="trainer/global_step")
        if self.mode == "disabled":
            return
        missing, self._missing = self._missing, []
        for row in missing:
            names = row.keys() - {"step", "time"}
            self.log_metrics({name: row[name] for name in names}, step=row["step"])
        self._id_file.parent.mkdir(exist_ok=True)
        self._id_file.write_text(f"{run.id}\n")
        if self.mode == "online":
            print(f"W&B: {run.url}", flush=True)
            return
        why = "" if self._asked else " (no API key is configured)"
        folder = shown(Path(run.settings.sync_dir))
        print(f"W&B is offline{why}; to upload this run: wandb sync {folder}", flush=True)

    @rank_zero_only
    def finish(self, *, failed: bool) -> None:
        """Close the run, so that everything is on disk or uploaded."""
        run: Any = self._experiment
        if run is None:
            return
        path = Path(str(self._save_dir)) / METRICS
        if self._resumed and self.mode == "offline" and path.exists():
            # Each start has a summary of its own, which should know the best of those before it.
            best = best_values(read_metrics(path))
            run.summary.update({name: {BEST[name]: value} for name, value in best.items()})
        run.finish(exit_code=int(failed))
        self._experiment = None


def best_values(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best value of each metric of `BEST` in rows of metrics."""
    found: dict[str, float] = {}
    for row in metrics:
        for name in BEST.keys() & row.keys():
            better = max if BEST[name] == "max" else min
            found[name] = better(found.get(name, row[name]), row[name])
    return found


def wandb_mode() -> Mode:
    """What `auto` means here: WANDB_MODE, else online with an API key and offline without."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    modes: dict[str, Mode] = {
        "online": "online",
        "run": "online",
        "shared": "online",
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "disabled",
    }
    if asked:
        if asked not in modes:
            raise ValueError(f"WANDB_MODE={asked!r} is not a mode; there are {', '.join(modes)}")
        return modes[asked]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files: Iterable[Path] = [Path.home() / ".netrc", Path.home() / "_netrc"]
    if os.environ.get("NETRC"):
        files = [Path(os.environ["NETRC"]).expanduser()]
    for file in files:
        try:
            entry = netrc.netrc(file).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False
