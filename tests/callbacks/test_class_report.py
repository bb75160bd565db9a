"""The report of a classifier: files, table, picture, and what Weights & Biases receives."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from tests.tasks.test_classification import make_data, make_task
from tests.tasks.test_tagging import make_data as tagging_data
from tests.tasks.test_tagging import make_task as tagging_task
from tx_lightning.callbacks import ClassReport
from tx_lightning.callbacks.class_report import draw_confusion
from tx_lightning.callbacks.pictures import save
from tx_lightning.metrics import Confusion
from tx_lightning.tasks import Translation

MakeTrainer = Callable[..., Trainer]
COUNTS = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
LABELS = ["[bold]a[/bold]", "$b$", "c" * 30]


class Stand(LightningModule):
    """A task that has counted something."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] | None = LABELS
        self.confusion: dict[str, Confusion] = {"test": Confusion(COUNTS)}


class Told(WandbLogger):
    """The W&B logger up to where it would call wandb."""

    def __init__(self) -> None:
        super().__init__(offline=True)
        self.told: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.told[key] = images

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None) -> None:  # type: ignore[no-untyped-def]
        self.told[key] = (columns, data)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told |= metrics


def test_a_report_in_files_on_the_console_and_in_wandb(
    trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Told()
    ClassReport().on_test_end(trainer(logger=wandb), Stand())
    report = json.loads((tmp_path / "reports" / "test.json").read_text(encoding="utf-8"))
    assert report["confusion"] == COUNTS.tolist()
    assert report["accuracy"] == pytest.approx(11 / 14)
    assert report["macro_f1"] == pytest.approx((16 / 19 + 6 / 9) / 2)
    first, second, third = report["classes"]
    assert first == {
        "label": LABELS[0],
        "precision": pytest.approx(8 / 9),
        "recall": 0.8,
        "f1": pytest.approx(16 / 19),
        "support": 10,
    }
    assert (second["precision"], second["recall"], second["support"]) == (0.6, 0.75, 4)
    assert (third["precision"], third["recall"], third["f1"], third["support"]) == (0, 0, 0, 0)
    printed = capsys.readouterr().out
    for shown in ("test at step 0", "[bold]a[/bold]", "0.8889", "0.8421", "accuracy", "0.7857"):
        assert shown in printed
    picture = tmp_path / "confusion" / "test.png"
    assert picture.stat().st_size > 1000
    assert wandb.told["test/confusion"] == [str(picture)]
    columns, rows = wandb.told["test/report"]
    assert [dict(zip(columns, row, strict=True)) for row in rows] == report["classes"]
    table = wandb.told["test/confusion_matrix"].table
    assert table.columns == ["Actual", "Predicted", "nPredictions"]
    assert [row[2] for row in table.data] == COUNTS.flatten().tolist()
    assert table.data[1] == [LABELS[0], LABELS[1], 2]


def test_nothing_is_reported_of_nothing(trainer: MakeTrainer, tmp_path: Path) -> None:
    task = Stand()
    ClassReport().on_train_end(trainer(), task)  # no validation was run
    task.confusion["val"] = Confusion(torch.zeros(3, 3, dtype=torch.int64))
    ClassReport().on_train_end(trainer(), task)
    assert not list(tmp_path.iterdir())


def test_after_the_last_validation_and_after_a_test(
    trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, data = make_task(), make_data()
    fit = trainer(
        ClassReport(console=False), max_steps=4, val_check_interval=2, limit_val_batches=1.0
    )
    fit.fit(task, data)
    report = json.loads((tmp_path / "reports" / "val.json").read_text())
    assert report["step"] == 4
    assert report["accuracy"] == pytest.approx(float(fit.callback_metrics["val/accuracy"]))
    assert sum(row["support"] for row in report["classes"]) == len(data.val_store)
    assert not (tmp_path / "reports" / "test.json").exists()
    fit.test(task, data, verbose=False)
    assert (tmp_path / "reports" / "test.json").exists()
    assert {path.name for path in (tmp_path / "confusion").iterdir()} == {"val.png", "test.png"}
    assert "precision" not in capsys.readouterr().out


def test_after_validating_alone_of_a_tagger(trainer: MakeTrainer, tmp_path: Path) -> None:
    task = tagging_task()
    trainer(ClassReport(), limit_val_batches=1.0).validate(task, tagging_data(), verbose=False)
    report = json.loads((tmp_path / "reports" / "val.json").read_text())
    assert [row["label"] for row in report["classes"]] == ["first", "other", "same"]


def test_the_picture_shows_shares_and_counts() -> None:
    figure = draw_confusion(Confusion(COUNTS), LABELS, "test")
    (axes,) = figure.axes
    drawn = np.asarray(axes.images[0].get_array())
    expected = np.array([[0.8, 0.2, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    texts = [text.get_text() for text in axes.texts]
    assert texts.count(LABELS[0]) == 2  # its row and its column
    assert texts.count("c" * 15 + "…") == 2
    assert texts.count("8") == 1
    many = Confusion(torch.eye(150, dtype=torch.int64))
    (axes,) = draw_confusion(many, [str(i) for i in range(150)], "").axes
    assert np.asarray(axes.images[0].get_array()).shape == (100, 100)
    assert len(axes.texts) == 200  # labels without numbers


def test_pyplot_is_not_touched(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    ClassReport(console=False).on_test_end(trainer(), Stand())
    assert (tmp_path / "confusion" / "test.png").exists()


def test_a_task_without_labels_is_refused(trainer: MakeTrainer, task: Translation) -> None:
    with pytest.raises(ValueError, match="ClassReport has nothing to report of a Translation"):
        ClassReport().setup(trainer(), task, "fit")


def test_odd_labels_stay_as_they_are(tmp_path: Path) -> None:
    names = ["$x$", "_private", "\\alpha", "{", ".", "a\nb", "<b>"]
    figure = draw_confusion(Confusion(torch.eye(7, dtype=torch.int64)), names, "accuracy $1$")
    shown = [text.get_text() for text in figure.axes[0].texts]
    for name in names:
        assert shown.count(name.replace("\n", "\\n")) == 2  # its row and its column
    save(figure, tmp_path / "odd.png")
    extents = [text.get_window_extent() for text in (*figure.texts, *figure.axes[0].texts)]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(0 <= box.x0 <= box.x1 <= width for box in extents)
    assert all(0 <= box.y0 <= box.y1 <= height for box in extents)
