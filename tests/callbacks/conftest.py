"""A translation task that trains within a second, for the callbacks that need a real one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger

from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.tokenizers import Words
from tx_lightning.data.translation import TranslationData
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks import Translation

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Spelling(ParallelSource):
    """Numbers and their digits in words, of 1 to 6 tokens a side."""

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        first = self.splits().index(split)
        for number in range(first, 300 if split == "train" else 60, 3):
            digits = str(number**2)
            yield " ".join(digits), " ".join(DIGITS[int(digit)] for digit in digits)

    def fingerprint(self, split: str) -> str:
        return split


def _network(vocab_size: int) -> EncoderDecoder:
    return EncoderDecoder(
        vocab_size,
        d_model=16,
        n_heads=2,
        n_encoder_layers=2,
        n_decoder_layers=2,
        d_ff=16,
        dropout=0.2,
    )


@pytest.fixture
def task() -> Translation:
    torch.manual_seed(1)
    return Translation(32, _network)


@pytest.fixture
def data() -> TranslationData:
    return TranslationData(Spelling(), 32, tokenizer=Words(), batch_tokens=160)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Make a trainer on the CPU in the folder of the test, with these callbacks and options."""

    def make(*callbacks: Callback, **options: Any) -> Trainer:
        settings: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
        }
        return Trainer(callbacks=list(callbacks), **(settings | options))

    return make


class Recorder(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        pass

    def named(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        """The rows with metrics of this prefix, and of each row only those."""
        rows = [
            (step, {name: value for name, value in row.items() if name.startswith(prefix)})
            for step, row in self.rows
        ]
        return [row for row in rows if row[1]]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
