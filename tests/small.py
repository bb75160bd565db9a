"""Every task with data so small that a training takes a fraction of a second."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import SGD

from tx_lightning import data as sources
from tx_lightning import tasks
from tx_lightning.data.module import TextData
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    Tagger,
    TextEncoder,
)
from tx_lightning.tasks.task import Task

VOCABULARY = 400
SIZES: dict[str, Any] = {"n_train": 60, "n_val": 6, "n_test": 6}
STACK: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_ff": 16, "dropout": 0.0}

encoder = partial(TextEncoder, n_layers=1, max_length=64, **STACK)
sequences = partial(EncoderDecoder, n_encoder_layers=1, n_decoder_layers=1, **STACK)
decoder = partial(LanguageModel, n_layers=1, context_length=16, **STACK)


def sgd(parameters: Any) -> SGD:
    """Plain gradient descent, whose steps are the gradients."""
    return SGD(parameters, lr=0.1)


def _data(kind: Callable[..., Any], source: Any, *numbers: int, **options: Any) -> Any:
    common = {"tokenizer": sources.Words(), "batch_tokens": 128, "seed": 3}
    return kind(source, VOCABULARY, *numbers, **common, **options)


def _texts() -> sources.GrammarText:
    return sources.GrammarText(**SIZES)


def translation(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    task = tasks.Translation(VOCABULARY, **{"network": sequences, **options})
    return task, _data(sources.TranslationData, sources.Grammar(**SIZES))


def language_modeling(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    task = tasks.LanguageModeling(VOCABULARY, **{"network": decoder, **options})
    blocks = {"block_length": 16, "sliding_stride": 8}
    return task, _data(sources.LanguageModelingData, _texts(), **blocks)


def classification(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    network = partial(Classifier, encoder=encoder, dropout=0.0)
    task = tasks.Classification(VOCABULARY, 2, **{"network": network, **options})
    return task, _data(
        sources.ClassificationData, sources.GrammarPolarity(**SIZES), 2, max_length=64
    )


def tagging(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    network = partial(Tagger, encoder=encoder, dropout=0.0)
    task = tasks.Tagging(VOCABULARY, 5, **{"network": network, **options})
    return task, _data(sources.TaggingData, sources.GrammarTags(**SIZES), 5, max_length=64)


def masked_language_modeling(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    network = partial(MaskedLanguageModel, encoder=encoder)
    task = tasks.MaskedLanguageModeling(VOCABULARY, **{"network": network, **options})
    return task, _data(sources.MaskedLanguageModelingData, _texts(), max_length=64)


def denoising(**options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    task = tasks.Denoising(VOCABULARY, **{"network": sequences, **options})
    noise = sources.TextInfilling()
    return task, _data(sources.DenoisingData, _texts(), noise=noise, max_length=64)


MAKERS: dict[str, Callable[..., tuple[Task[Any], TextData[Any, Any]]]] = {
    "Translation": translation,
    "LanguageModeling": language_modeling,
    "Classification": classification,
    "Tagging": tagging,
    "MaskedLanguageModeling": masked_language_modeling,
    "Denoising": denoising,
}


def make(name: str, **options: Any) -> tuple[Task[Any], TextData[Any, Any]]:
    """A task with its data, the same weights each time.

    Args:
        name: The class of the task.
        options: Arguments of the task.
    """
    torch.manual_seed(1)
    return MAKERS[name](**options)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer of a few steps on the CPU that writes into a folder and says nothing."""
    quiet: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    return Trainer(**(quiet | options))


class Rows(DummyLogger):
    """Keeps what is logged, as (step, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def steps(self, name: str) -> list[int | None]:
        return [step for step, metrics in self.rows if any(n.startswith(name) for n in metrics)]
