"""Hypotheses of `predict`, in the order of the input, merged from all processes."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from tx_lightning.strict_json import to_json


class Scored(Protocol):
    """A hypothesis as text, with its score."""

    @property
    def text(self) -> str: ...

    @property
    def score(self) -> float: ...


@runtime_checkable
class NamesPredictions(Protocol):
    """A task whose predictions are no hypotheses of a text, and lie in a file of another name."""

    prediction_file: str


class PredictionWriter(Callback):
    """Writes `predictions/hypotheses.txt`, and `n_best.tsv` where there is more than one each.

    `predict_step` has to return, for each example of the batch, its position in the input and its
    hypotheses, the best first. Line i of `hypotheses.txt`, or of the file that the task names,
    belongs to input i. A line of `n_best.tsv` is the number of the input (from 1), the score and
    the text. Each process appends to a file of its own; the first merges them.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "predictions"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[tuple[int, Sequence[Scored]]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as file:
            for index, hypotheses in outputs:
                row: list[Any] = [index, [[h.score, one_line_of(h.text)] for h in hypotheses]]
                file.write(to_json(row) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        rows = sorted(row for part in parts for row in _rows(part))
        best, n_best = self.folder / _name(pl_module), self.folder / "n_best.tsv"
        best.write_text("".join(f"{h[0][1]}\n" for _, h in rows), encoding="utf-8")
        if any(len(hypotheses) > 1 for _, hypotheses in rows):
            with n_best.open("w", encoding="utf-8") as file:
                for index, hypotheses in rows:
                    for score, text in hypotheses:
                        file.write(f"{index + 1}\t{score:.4f}\t{text}\n")
        for part in parts:
            part.unlink()
        print(f"{len(rows)} {best.stem}: {best}", flush=True)

    def _part(self, rank: int) -> Path:
        return self.folder / f"part-{rank}.jsonl"


def one_line_of(text: str) -> str:
    """A hypothesis on one line, whatever the model made of it."""
    return " ".join(text.splitlines())


def _name(task: object) -> str:
    return task.prediction_file if isinstance(task, NamesPredictions) else "hypotheses.txt"


def _rows(part: Path) -> Iterator[tuple[int, list[tuple[float, str]]]]:
    with part.open(encoding="utf-8") as file:
        for line in file:
            index, hypotheses = json.loads(line)
            # A score that is not finite was written as null.
            scored = [(math.nan if score is None else score, text) for score, text in hypotheses]
            yield index, scored
