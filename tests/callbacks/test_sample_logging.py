import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sacrebleu
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from tx_lightning.callbacks import SampleLogger
from tx_lightning.data.translation import TranslationData
from tx_lightning.tasks import Translation
from tx_lightning.tasks.translation import Sample


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Table(WandbLogger):
    """The W&B logger up to where it would call wandb."""

    def __init__(self) -> None:
        super().__init__(offline=True)
        self.tables: list[tuple[str, list[str], list[list[object]], int | None]] = []

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None) -> None:  # type: ignore[no-untyped-def]
        self.tables.append((key, columns, data, step))

    def log_metrics(self, metrics: object, step: int | None = None) -> None:
        pass

    @property
    def experiment(self) -> None:
        """No run: a trainer asks every logger for one when it starts."""


def test_the_same_sentences_after_each_validation(
    task: Translation,
    data: TranslationData,
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table()
    fit = trainer(
        SampleLogger(3), logger=table, limit_val_batches=1.0, val_check_interval=2, max_steps=4
    )
    fit.fit(task, data)
    rows = lines(tmp_path / "samples" / "val.jsonl")
    store = data.val_store
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]  # none of the sanity check
    assert [row["source"] for row in rows] == [store.source_text(i) for i in (0, 1, 2)] * 2
    assert [row["reference"] for row in rows] == [store.target_text(i) for i in (0, 1, 2)] * 2
    columns = ["source", "reference", "hypothesis", "bleu"]
    assert table.tables == [
        ("val/samples", columns, [[row[c] for c in columns] for row in rows[:3]], 2),
        ("val/samples", columns, [[row[c] for c in columns] for row in rows[3:]], 4),
    ]
    printed = capsys.readouterr().out
    assert "val samples at step 4" in printed
    assert str(rows[0]["reference"]) in printed


def test_after_a_test_too_and_quietly(
    task: Translation,
    data: TranslationData,
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(SampleLogger(1, console=False), limit_test_batches=1).test(task, data, verbose=False)
    assert len(lines(tmp_path / "samples" / "test.jsonl")) == 1
    assert "samples at step" not in capsys.readouterr().out


def test_markup_brackets_and_scores(
    task: Translation,
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    references = ["a [bold]house[/bold] is a house", "größer als zwei Häuser am Fluss", "x"]
    hypotheses = ["a [bold]house[/bold] is a house", "größer als zwei Bäume am Fluss", ""]
    task.samples = [
        Sample("[/]", reference, hypothesis, i)
        for i, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True))
    ]
    callback = SampleLogger(5)
    callback.on_validation_end(trainer(), task)
    printed = capsys.readouterr().out
    assert printed.count("a [bold]house[/bold] is a house") == 2
    rows = lines(tmp_path / "samples" / "val.jsonl")
    for row, reference, hypothesis in zip(rows, references, hypotheses, strict=True):
        expected = sacrebleu.sentence_bleu(hypothesis, [reference]).score
        assert row["bleu"] == pytest.approx(expected, abs=0.005)
        assert row["reference"] == reference
    assert rows[0]["bleu"] == 100.0


def test_refusals(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="n=0 of SampleLogger"):
        SampleLogger(0)
    with pytest.raises(ValueError, match="cannot show samples of a LightningModule"):
        SampleLogger().setup(trainer(), LightningModule(), "fit")
