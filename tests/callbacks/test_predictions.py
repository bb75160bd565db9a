"""Hypotheses on disk: in the order of the input, one a line, from any number of processes."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tx_lightning.callbacks.predictions import PredictionWriter


@dataclass(frozen=True)
class Found:
    text: str
    score: float = -1.0


class Barrier:
    def barrier(self, name: str) -> None:
        """One process after the other: nobody to wait for."""


def predict(folder: Path, *shares: list[tuple[int, list[Found]]]) -> None:
    """Drive the hooks as a trainer does, for processes with a share each, the first ending last."""
    writer = PredictionWriter(folder)
    module: Any = None
    processes: list[Any] = [
        SimpleNamespace(
            global_rank=rank, world_size=len(shares), is_global_zero=rank == 0, strategy=Barrier()
        )
        for rank in range(len(shares))
    ]
    for process in processes:
        writer.on_predict_start(process, module)
    for process, share in zip(processes, shares, strict=True):
        for number, example in enumerate(share):
            writer.on_predict_batch_end(process, module, [example], None, number)
    for process in reversed(processes):
        writer.on_predict_end(process, module)


def test_lines_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    predict(
        tmp_path,
        [(2, [Found("c")]), (0, [Found("a\nb")])],
        [(3, [Found("")]), (1, [Found("ü")])],
    )
    folder = tmp_path / "predictions"
    assert (folder / "hypotheses.txt").read_text("utf-8") == "a b\nü\nc\n\n"
    assert [path.name for path in folder.iterdir()] == ["hypotheses.txt"]


def test_several_hypotheses_have_a_table(tmp_path: Path) -> None:
    predict(tmp_path, [(1, [Found("x", -0.5), Found("y", -2.0)]), (0, [Found("z")])])
    folder = tmp_path / "predictions"
    assert (folder / "hypotheses.txt").read_text("utf-8") == "z\nx\n"
    rows = (folder / "n_best.tsv").read_text("utf-8").splitlines()
    assert rows == ["1\t-1.0000\tz", "2\t-0.5000\tx", "2\t-2.0000\ty"]


def test_predicting_again_starts_afresh(tmp_path: Path) -> None:
    predict(tmp_path, [(0, [Found("old")]), (1, [Found("older")])])
    predict(tmp_path, [(0, [Found("new")])])
    assert (tmp_path / "predictions" / "hypotheses.txt").read_text("utf-8") == "new\n"
