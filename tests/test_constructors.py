"""Every class that YAML can name refuses numbers that mean nothing, in one line with their name."""

import inspect
import math
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import UnionType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from tx_lightning import commands
from tx_lightning.data.classification import ClassificationData
from tx_lightning.data.denoising import DenoisingData, Noise, TextInfilling
from tx_lightning.data.grammar import Grammar
from tx_lightning.data.labelled_sources import GrammarPolarity, LabelledCSV, LabelledTSV
from tx_lightning.data.language_modeling import LanguageModelingData
from tx_lightning.data.masked_language_modeling import MaskedLanguageModelingData
from tx_lightning.data.masking import Masking
from tx_lightning.data.module import TextData
from tx_lightning.data.sources import TSV, Source
from tx_lightning.data.tagged_sources import CoNLL, GrammarTags
from tx_lightning.data.tagging import TaggingData
from tx_lightning.data.text_sources import GrammarText, TextFiles
from tx_lightning.data.tokenizers import Characters, TokenizerTrainer
from tx_lightning.data.translation import TranslationData
from tx_lightning.decoding import Decoding, Filter
from tx_lightning.models.classifier import Classifier, Tagger
from tx_lightning.models.encoder_decoder import EncoderDecoder
from tx_lightning.models.language_model import LanguageModel
from tx_lightning.models.masked_language_model import MaskedLanguageModel
from tx_lightning.models.text_encoder import TextEncoder
from tx_lightning.nn.feed_forward import ReLUFeedForward
from tx_lightning.nn.positions import NoPositions
from tx_lightning.tasks.classification import Classification
from tx_lightning.tasks.language_modeling import LanguageModeling
from tx_lightning.tasks.masked_language_modeling import MaskedLanguageModeling
from tx_lightning.tasks.tagging import Tagging

SEAMS = (
    Callback,
    Decoding,
    Filter,
    LRScheduler,
    LightningDataModule,
    LightningModule,
    Logger,
    Masking,
    Noise,
    Source,
    Strategy,
    TokenizerTrainer,
    nn.Module,
)
VALUES = [0, -1, math.nan, math.inf, -math.inf, 10**18, 1e300, -1e300]

WIDTHS: dict[str, Any] = {"d_model": 8, "n_heads": 2, "d_ff": 8}
SMALL = partial(TextEncoder, **WIDTHS, n_layers=1, max_length=16)
TWO_STACKS = partial(EncoderDecoder, **WIDTHS, n_encoder_layers=1, n_decoder_layers=1)
# Values of arguments by name: those that a class requires, and small ones for what is large.
ARGUMENTS: dict[str, Any] = {
    **WIDTHS,
    "at_least": 0.5,
    "batch_tokens": 512,
    "bidirectional": True,
    "context_length": 16,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "encoder": SMALL,
    "feed_forward": ReLUFeedForward,
    "in_features": 4,
    "length": 2,
    "max_length": 16,
    "metric": "val/loss",
    "n_classes": 2,
    "n_decoder_layers": 1,
    "n_encoder_layers": 1,
    "n_layers": 1,
    "n_tags": 2,
    "network": TWO_STACKS,
    "norm": nn.LayerNorm,
    "out_features": 4,
    "p": 0.1,
    "positions": NoPositions,
    "pre_norm": True,
    "size": 2,
    "vocab_size": 600,
}
# Where the name alone does not say it.
SPECIAL: dict[type, dict[str, Any]] = {
    Classification: {"network": partial(Classifier, encoder=SMALL)},
    Tagging: {"network": partial(Tagger, encoder=SMALL)},
    MaskedLanguageModeling: {"network": partial(MaskedLanguageModel, encoder=SMALL)},
    LanguageModeling: {"network": partial(LanguageModel, **WIDTHS, n_layers=1, context_length=16)},
    TranslationData: {"source": Grammar()},
    ClassificationData: {"source": GrammarPolarity()},
    TaggingData: {"source": GrammarTags()},
    TextFiles: {"train": "a.txt"},
    TSV: {"train": "a.tsv"},
    LabelledTSV: {"train": "a.tsv"},
    LabelledCSV: {"train": "a.csv"},
    CoNLL: {"train": "a.conll"},
}
# They are made by the package, with what only a run or another class has.
NOT_NAMED = {
    "Embedding",
    "GracefulStop",
    "LabelScores",
    "LabelTask",
    "MetricsFile",
    "Reconstruction",
    "Task",
}


def classes() -> Iterator[type]:
    commands.import_classes()
    for name, module in sorted(sys.modules.items()):
        if name.startswith("tx_lightning."):
            for value in list(vars(module).values()):
                if (
                    isinstance(value, type)
                    and value.__module__ == name
                    and issubclass(value, SEAMS)
                    and not inspect.isabstract(value)
                    and not value.__name__.startswith("_")
                    and value.__name__ not in NOT_NAMED
                ):
                    yield value


def numeric(cls: type) -> list[str]:
    """The arguments of a class that are numbers."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    names = []
    for name in inspect.signature(cls).parameters:
        hint = hints.get(name)
        union = typing.get_origin(hint) in (typing.Union, UnionType)
        if {int, float} & set(typing.get_args(hint) if union else (hint,)):
            names.append(name)
    return names


def maker(cls: type) -> Callable[..., Any]:
    """The class with all that it needs but for what is varied."""
    needed: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name == "optimizer" and issubclass(cls, LRScheduler):
            needed[name] = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        elif name == "source" and issubclass(cls, LightningDataModule):
            needed[name] = SPECIAL.get(cls, {"source": GrammarText()})["source"]
        elif name in SPECIAL.get(cls, {}):
            needed[name] = SPECIAL[cls][name]
        elif name in ARGUMENTS:
            needed[name] = ARGUMENTS[name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            pytest.fail(f"{cls.__name__}: what is {name}? Give it a value in ARGUMENTS")
    return partial(cls, **needed)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CASES = [(cls, name) for cls in classes() for name in numeric(cls)]


@pytest.mark.parametrize(
    ("cls", "name"), CASES, ids=[f"{cls.__name__}-{name}" for cls, name in CASES]
)
def test_a_number_is_taken_or_refused_by_name(cls: type, name: str) -> None:
    hint = typing.get_type_hints(cls.__init__)[name]  # type: ignore[misc]
    whole = float not in (hint, *typing.get_args(hint))
    for value in VALUES:
        refusal = ""
        try:
            with within(5):
                maker(cls)(**{name: value})
        except ValueError as error:
            refusal = str(error)
        except Exception as error:
            pytest.fail(f"{value}: {type(error).__name__}: {error}")
        if refusal:
            assert name in refusal, value
            assert "\n" not in refusal, value
        else:
            assert math.isfinite(value), f"{value} was taken"
            assert isinstance(value, int) or not whole, f"{value} was taken for an integer"


def test_the_enumeration_finds_classes_of_every_kind() -> None:
    found = set(classes())
    for seam in SEAMS:
        assert any(issubclass(cls, seam) for cls in found), seam
    assert len(CASES) > 150


SENTENCES: dict[str, Any] = {"n_train": 30, "n_val": 5, "n_test": 5}
DATA: dict[type[TextData[Any, Any]], dict[str, Any]] = {
    TranslationData: {"source": Grammar(**SENTENCES)},
    LanguageModelingData: {"source": GrammarText(**SENTENCES), "block_length": 16},
    ClassificationData: {"source": GrammarPolarity(**SENTENCES), "n_classes": 2},
    TaggingData: {"source": GrammarTags(**SENTENCES), "n_tags": 5},
    MaskedLanguageModelingData: {"source": GrammarText(**SENTENCES)},
    DenoisingData: {"source": GrammarText(**SENTENCES), "noise": TextInfilling()},
}


@pytest.mark.parametrize("cls", DATA)
def test_a_budget_without_bounds_is_one_batch(cls: type[TextData[Any, Any]]) -> None:
    data = cls(
        vocab_size=100,
        tokenizer=Characters(),
        batch_tokens=10**18,
        eval_batch_tokens=10**18,
        seed=10**18,
        **DATA[cls],
    )
    data.prepare_data()
    data.setup()
    assert len(list(data.train_dataloader())) == len(list(data.val_dataloader())) == 1


def test_every_data_module_is_tried() -> None:
    assert {cls for cls in classes() if issubclass(cls, TextData)} == set(DATA)


@pytest.mark.parametrize(
    "cls", [cls for cls in classes() if issubclass(cls, TokenizerTrainer)], ids=lambda c: c.__name__
)
def test_a_vocabulary_has_a_size_that_memory_can_hold(cls: type[TokenizerTrainer]) -> None:
    """The library reserves memory for all entries, and ends the process where it cannot."""
    for size in [*VALUES, 2**40, True]:
        with pytest.raises(ValueError, match="vocab_size is"), within(5):
            cls().train(["a b"], size)  # type: ignore[arg-type]
