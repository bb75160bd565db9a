"""Show what the model says: source, reference and hypothesis of a few sentences."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich import box
from rich.table import Table
from rich.text import Text
from sacrebleu.metrics.bleu import BLEU

from tx_lightning.tasks.translation import Sample, Translation


@dataclass(frozen=True)
class ScoredSample:
    """A row of the table; bleu is the sentence BLEU, 0 to 100, of effective order."""

    source: str
    reference: str
    hypothesis: str
    bleu: float


class SampleLogger(Callback):
    """Log the same few sentences after each validation, and after a test.

    They go to the console, as table `val/samples` (`test/samples`) to Weights & Biases, and as
    lines of JSON to `samples/val.jsonl` (`samples/test.jsonl`) in the run folder, each with its
    step. Among several processes, the first shows sentences of its own share.

    Args:
        n: How many sentences, from the beginning of the split.
        console: Whether to print them.

    Raises:
        ValueError: When `n` is below 1, or the task is not one of translation.
    """

    def __init__(self, n: int = 5, console: bool = True) -> None:
        if n < 1:
            raise ValueError(f"n={n} of SampleLogger must be at least 1: remove it to log none")
        self.n = n
        self.console = console
        self._bleu = BLEU(effective_order=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Translation):
            raise ValueError(f"SampleLogger cannot show samples of a {type(pl_module).__name__}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log("val", trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("test", trainer, pl_module)

    def _log(self, split: str, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Translation)
        if not trainer.is_global_zero or not pl_module.samples:
            return
        rows = [self._scored(sample) for sample in pl_module.samples[: self.n]]
        step = trainer.global_step
        _append(Path(trainer.default_root_dir) / "samples" / f"{split}.jsonl", step, rows)
        columns = list(asdict(rows[0]))
        data = [list(asdict(row).values()) for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"{split}/samples", columns=columns, data=data, step=step)
        if self.console:
            rich.get_console().print(_table(f"{split} samples at step {step}", rows))

    def _scored(self, sample: Sample) -> ScoredSample:
        score = self._bleu.sentence_score(sample.hypothesis, [sample.reference]).score
        return ScoredSample(sample.source, sample.reference, sample.hypothesis, round(score, 2))


def _append(path: Path, step: int, rows: list[ScoredSample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **asdict(row)}, ensure_ascii=False) for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def _table(title: str, rows: list[ScoredSample]) -> Table:
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row("source", Text(row.source))
        table.add_row("reference", Text(row.reference))
        table.add_row("hypothesis", Text(row.hypothesis, style="bold"))
        table.add_row("BLEU", f"{row.bleu:.1f}", end_section=True)
    return table
