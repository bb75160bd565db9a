"""What is taken for what: the confusion matrix of a classifier, and the scores of each class.

Shapes: C classes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich import box
from rich.table import Table
from rich.text import Text

from tx_lightning.callbacks.pictures import new_figure, save, visible, width_of, write
from tx_lightning.metrics import Confusion
from tx_lightning.strict_json import to_json
from tx_lightning.tasks.companions import evaluated_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CLASSES = 100  # in a picture and in the chart of W&B
_NUMBERED = 20  # with more classes the cells have no numbers
_WIDE, _NARROW = 50, 17  # pixels for a cell
_LABEL, _TITLE = 8, 9  # points of a text
_TOP, _PAD = 35, 6  # pixels
_COLUMNS = ["label", "precision", "recall", "f1", "support"]


@runtime_checkable
class CountsConfusion(Protocol):
    """A task that counts what it takes for what.

    Attributes:
        labels: Label i is class i.
        confusion: Of the last evaluation of each split, `val` and `test`.
    """

    labels: list[str] | None
    confusion: dict[str, Confusion]


class ClassReport(Callback):
    """Report precision, recall and F1 of every class, and draw the confusion matrix.

    After a test, and for the last validation when training has ended or after `validate`. The
    matrix goes to `confusion/test.png` (`confusion/val.png`) in the run folder, the scores and the
    counts to `reports/test.json` (`reports/val.json`) and, as a table, to the console. Weights &
    Biases receives the picture `test/confusion`, the chart `test/confusion_matrix` and the table
    `test/report`. Picture and chart show up to 100 classes: the first.

    Args:
        console: Whether to print the table.

    Raises:
        ValueError: When the task counts no confusions.
    """

    def __init__(self, console: bool = True) -> None:
        self.console = console

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, CountsConfusion):
            raise ValueError(
                f"ClassReport has nothing to report of a {type(pl_module).__name__}: it needs a "
                "task whose answers are labels, as Classification; remove it from the callbacks"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("val", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report("val", trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("test", trainer, pl_module)

    def _report(self, split: str, trainer: Trainer, task: LightningModule) -> None:
        assert isinstance(task, CountsConfusion)
        if not trainer.is_global_zero or task.labels is None or split not in task.confusion:
            return
        labels, confusion, step = task.labels, task.confusion[split], evaluated_step(trainer)
        if not int(confusion.counts.sum()):
            return  # it was limited to no batch
        folder = Path(trainer.default_root_dir)
        rows = report_rows(labels, confusion)
        _write(folder / "reports" / f"{split}.json", step, labels, confusion)
        picture = folder / "confusion" / f"{split}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        title = f"{split}, step {step}, accuracy {confusion.accuracy:.4f}"
        save(draw_confusion(confusion, labels, title), picture)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"{split}/confusion", [str(picture)], step=step)
                logger.log_table(f"{split}/report", columns=_COLUMNS, data=rows, step=step)
                chart = _chart(labels, confusion, f"{split} confusion")
                logger.log_metrics({f"{split}/confusion_matrix": chart}, step=step)
        if self.console:
            rich.get_console().print(_table(f"{split} at step {step}", rows, confusion))


def report_rows(labels: list[str], confusion: Confusion) -> list[list[str | float]]:
    """For each class its label, precision, recall, F1 and support."""
    return [[label, *scores] for label, scores in zip(labels, confusion.per_class(), strict=True)]


def draw_confusion(confusion: Confusion, labels: list[str], title: str) -> "Figure":
    """Draw the matrix, a row for each true class; its colour is the share of the row.

    Args:
        confusion: The counts.
        labels: C labels.
        title: Of the picture.
    """
    counts = confusion.counts[:_MOST_CLASSES, :_MOST_CLASSES]
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)  # of the classes that are shown
    names = [visible(label) for label in labels[:_MOST_CLASSES]]
    numbered = len(names) <= _NUMBERED
    cell = _WIDE if numbered else _NARROW
    side = len(names) * cell
    margin = max(width_of(name, _LABEL) for name in names) + 5 * _PAD
    width = max(margin + side, width_of(title, _TITLE)) + 2 * _PAD
    height = margin + side + _TOP
    figure = new_figure(width, height)
    write(figure, _PAD / width, 1 - 14 / height, title, size=_TITLE)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_axis_off()
    before, below = -0.5 - _PAD / cell, len(names) - 0.5 + _PAD / cell
    for i, name in enumerate(names):
        write(axes, before, i, name, size=_LABEL, ha="right")
        write(axes, i, below, name, size=_LABEL, ha="center", va="top", rotation=90)
        for j in range(len(names) if numbered else 0):
            color = "white" if shares[i, j] > 0.5 else "black"
            number = f"{int(counts[i, j]):,}"
            write(axes, j, i, number, size=7, ha="center", color=color)
    legend = "down: label, across: predicted"
    write(figure, _PAD / width, _PAD / height, legend, size=_LABEL, va="bottom")
    return figure


def _write(path: Path, step: int, labels: list[str], confusion: Confusion) -> None:
    report = {
        "step": step,
        "accuracy": confusion.accuracy,
        "macro_f1": confusion.macro_f1,
        "classes": [
            dict(zip(_COLUMNS, row, strict=True)) for row in report_rows(labels, confusion)
        ],
        "confusion": confusion.counts.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _chart(labels: list[str], confusion: Confusion, title: str) -> Any:
    """The confusion matrix of W&B, made of counts rather than of all examples."""
    import wandb

    columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
    names = labels[:_MOST_CLASSES]
    counts = confusion.counts.tolist()
    rows = [
        [label, other, counts[i][j]]
        for i, label in enumerate(names)
        for j, other in enumerate(names)
    ]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=rows),
        fields={str(column): column for column in columns},
        string_fields={"title": title},
    )


def _table(title: str, rows: list[list[str | float]], confusion: Confusion) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column(_COLUMNS[0])
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right")
    for label, *scores, support in rows:
        table.add_row(Text(str(label)), *(f"{score:.4f}" for score in scores), f"{support:,}")
    table.add_section()
    total = int(confusion.counts.sum())
    table.add_row("accuracy", "", "", f"{confusion.accuracy:.4f}", f"{total:,}")
    table.add_row("macro", "", "", f"{confusion.macro_f1:.4f}", f"{total:,}")
    return table
