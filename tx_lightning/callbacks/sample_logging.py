"""Show what the model says: a few examples of each evaluation, as the task shows them."""

from pathlib import Path

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich import box
from rich.table import Table
from rich.text import Text

from tx_lightning.decoding import NotFinite
from tx_lightning.nn.checks import check_size
from tx_lightning.strict_json import to_json
from tx_lightning.tasks.companions import evaluated_step
from tx_lightning.tasks.task import Row, Task


class SampleLogger(Callback):
    """Log a few examples after each validation, and after a test, with what comes of them.

    A translation task shows its first sentences, a language model continues the beginnings of its
    first blocks, a classifier shows misclassified examples first. They go to the console, as table
    `val/samples` (`test/samples`) to Weights & Biases, and as lines of JSON to `samples/val.jsonl`
    (`samples/test.jsonl`) in the run folder, each with its step. Among several processes, the first
    shows examples of its own share.

    Args:
        n: How many examples.
        console: Whether to print them.

    Raises:
        ValueError: When `n` is below 1, or the task has no samples to show.
    """

    def __init__(self, n: int = 5, console: bool = True) -> None:
        if n < 1:
            raise ValueError(f"n={n} of SampleLogger must be at least 1: remove it to log none")
        check_size("n", n)
        self.n = n
        self.console = console

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Task):
            raise ValueError(f"SampleLogger cannot show samples of a {type(pl_module).__name__}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log("val", trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("test", trainer, pl_module)

    def _log(self, split: str, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not trainer.is_global_zero:
            return
        try:
            rows = pl_module.sample_rows(self.n)
        except NotFinite:
            if pl_module.stop_when_diverged:
                raise
            return
        if not rows:
            return
        step = evaluated_step(trainer)
        _append(Path(trainer.default_root_dir) / "samples" / f"{split}.jsonl", step, rows)
        columns = list(rows[0])
        data = [list(row.values()) for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"{split}/samples", columns=columns, data=data, step=step)
        if self.console:
            rich.get_console().print(_table(f"{split} samples at step {step}", rows))


def _append(path: Path, step: int, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [to_json({"step": step, **row}, ensure_ascii=False) for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        for name, value in row.items():
            shown = value if isinstance(value, str) else f"{value:.4g}"
            table.add_row(name, Text(shown), end_section=name == list(row)[-1])
    return table
