"""Tasks that were built and trained in Python: their checkpoints, and tasks that come from one."""

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import tx_lightning.tasks
from tests.tasks.test_translation import Counting
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import CheckpointError, load_task, read_checkpoint
from tx_lightning.data import TranslationData, Words
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.decoding import Beam, Greedy
from tx_lightning.decoding.filters import MinLength
from tx_lightning.described import CannotDescribe, Described, description_of
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    Tagger,
    TextEncoder,
)
from tx_lightning.nn import GELUFeedForward, LearnedPositions, RotaryPositions
from tx_lightning.nn.dropout import Dropout
from tx_lightning.tasks import (
    Classification,
    Denoising,
    LanguageModeling,
    MaskedLanguageModeling,
    Tagging,
    Task,
    Translation,
)
from tx_lightning.tasks.labels import LabelTask

STACK: dict[str, Any] = {"d_model": 8, "n_heads": 2}
PAIR: dict[str, Any] = {**STACK, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 16}
DECODER: dict[str, Any] = {**STACK, "n_layers": 1, "context_length": 8}
ENCODER: dict[str, Any] = {**STACK, "n_layers": 1, "max_length": 8}
TEXTS = [text for pair in Counting().pairs("train") for text in pair]
TOKENIZERS = Tokenizers.one(Words().train(TEXTS, 32))


def encoder(vocab_size: int) -> TextEncoder:
    return TextEncoder(vocab_size, **ENCODER)


partial = functools.partial
# Each task, built in the ways that a network can be given: partial, lambda, both inside each other.
TASKS: dict[str, list[Callable[[], Task[Any]]]] = {
    "Translation": [
        lambda: Translation(32, partial(EncoderDecoder, **PAIR)),
        lambda: Translation(32, lambda v: EncoderDecoder(v, **PAIR)),
        lambda: Translation(32, lambda rows: EncoderDecoder(vocab_size=rows, **PAIR)),
    ],
    "Denoising": [
        lambda: Denoising(32, partial(EncoderDecoder, **PAIR)),
        lambda: Denoising(vocab_size=32, network=lambda v: EncoderDecoder(v, **PAIR)),
    ],
    "LanguageModeling": [
        lambda: LanguageModeling(32, partial(LanguageModel, **DECODER)),
        lambda: LanguageModeling(32, lambda v: LanguageModel(v, **DECODER)),
    ],
    "Classification": [
        lambda: Classification(32, 2, partial(Classifier, encoder=partial(TextEncoder, **ENCODER))),
        lambda: Classification(32, 2, lambda v, c: Classifier(v, c, encoder=encoder)),
        lambda: Classification(
            32, 2, partial(Classifier, encoder=lambda v: TextEncoder(v, **ENCODER))
        ),
        lambda: Classification(
            32, 2, lambda v, c: Classifier(v, c, encoder=partial(TextEncoder, **ENCODER))
        ),
    ],
    "Tagging": [
        lambda: Tagging(32, 2, partial(Tagger, encoder=partial(TextEncoder, **ENCODER))),
        lambda: Tagging(32, n_tags=2, network=lambda v, c: Tagger(v, c, encoder=encoder)),
    ],
    "MaskedLanguageModeling": [
        lambda: MaskedLanguageModeling(
            32, partial(MaskedLanguageModel, encoder=partial(TextEncoder, **ENCODER))
        ),
        lambda: MaskedLanguageModeling(32, lambda v: MaskedLanguageModel(v, encoder=encoder)),
    ],
}


def make_trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def save(task: Task[Any], path: str | Path) -> dict[str, Any]:
    """Write the checkpoint of a task that was not trained; return its record."""
    task.attach(TOKENIZERS)
    if isinstance(task, LabelTask):
        task.attach_labels(["no", "yes"], 1)
    trainer = make_trainer()
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    record = read_checkpoint(path)["tx_lightning"]
    assert isinstance(record, dict)
    return record


def test_all_tasks_are_here() -> None:
    assert TASKS.keys() == set(tx_lightning.tasks.__all__) - {"Task"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_rebuilt_from_what_it_was_built_with(name: str, tmp_path: Path) -> None:
    settings = []
    for build in TASKS[name]:
        task = build()
        record = save(task, tmp_path / "a.ckpt")
        assert "undescribed" not in record
        settings.append(record["task"])
    loaded = load_task(tmp_path / "a.ckpt")
    assert type(loaded) is type(task)
    for one, other in zip(task.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(each == settings[0] for each in settings)
    assert settings[0]["class_path"] == f"tx_lightning.tasks.{name}"
    # As the command line has it, with all defaults.
    assert settings[0]["init_args"].keys() >= {"vocab_size", "network", "optimizer", "freeze"}
    assert settings[0]["init_args"]["network"]["init_args"]


def test_everything_that_a_part_was_built_with_is_kept(tmp_path: Path) -> None:
    network = partial(
        EncoderDecoder,
        positions=lambda d, heads, both: LearnedPositions(d, heads, both, max_length=9),
        feed_forward=partial(GELUFeedForward, approximate="tanh"),
        norm=nn.RMSNorm,
        **PAIR,
    )
    task = Translation(
        32,
        network,
        optimizer=partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.9)),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        freeze=("encoder.*",),
        decoding=Beam(beam_size=3, filters=[MinLength(2)]),
    )
    arguments = save(task, tmp_path / "a.ckpt")["task"]["init_args"]
    inner = arguments["network"]["init_args"]
    assert inner["positions"]["class_path"] == "tx_lightning.nn.LearnedPositions"
    assert inner["positions"]["init_args"] == {"max_length": 9}
    assert inner["feed_forward"]["init_args"]["approximate"] == "tanh"
    assert inner["norm"]["class_path"] == "torch.nn.RMSNorm"
    assert arguments["optimizer"]["init_args"]["betas"] == [0.8, 0.9]
    assert arguments["scheduler"]["init_args"]["step_size"] == 3
    assert arguments["freeze"] == ["encoder.*"]
    assert arguments["decoding"]["init_args"]["filters"] == [
        {"class_path": "tx_lightning.decoding.MinLength", "init_args": {"length": 2}}
    ]
    loaded = load_task(tmp_path / "a.ckpt")
    assert isinstance(loaded, Translation)
    assert isinstance(loaded.decoding, Beam)
    assert loaded.decoding.beam_size == 3
    optimizer = loaded.optimizer(loaded.parameters())
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    save(loaded, tmp_path / "b.ckpt")
    again = read_checkpoint(tmp_path / "b.ckpt")["tx_lightning"]["task"]
    assert again["init_args"] == arguments


def test_an_optimizer_that_cannot_be_written_down_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = Translation(
        32, partial(EncoderDecoder, **PAIR), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    record = save(task, "a.ckpt")
    assert record["undescribed"] == {"optimizer": "a function (<lambda>)"}
    assert record["task"]["init_args"]["optimizer"] == "tx_lightning.tasks.translation.fused_adam"
    assert isinstance(load_task("a.ckpt"), Translation)
    sections = {"data": DATA, "trainer": QUIET}
    Path("data.yaml").write_text(yaml.safe_dump(sections))
    words = ["--config", "data.yaml", "--ckpt_path", "a.ckpt"]
    assert main(["fit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.ckpt: optimizer is a function (<lambda>), which a file cannot hold" in line


def norm(width: int) -> nn.Module:
    return nn.LayerNorm(width)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda v: EncoderDecoder(v, norm=norm, **PAIR), "network.norm is a function .norm."),
        (partial(EncoderDecoder, norm=norm, **PAIR), "network.norm is a function .norm."),
        (lambda v: EncoderDecoder(v + 1, **PAIR), "network.vocab_size is the factory calls"),
    ],
)
def test_a_network_that_cannot_be_written_down_is_refused(
    network: Any, says: str, tmp_path: Path
) -> None:
    save(Translation(32, network), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=says) as caught:
        load_task(tmp_path / "a.ckpt")
    assert "functools.partial of them, as functools.partial(EncoderDecoder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_inside_of_a_function_cannot_be_written_down(tmp_path: Path) -> None:
    class Inside(EncoderDecoder):
        pass

    save(Translation(32, partial(Inside, **PAIR)), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="Inside, which is defined inside of a function"):
        load_task(tmp_path / "a.ckpt")


# Training in Python, and what the verbs make of it.

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
DATA = {
    "class_path": "tx_lightning.data.TranslationData",
    "init_args": {
        "source": {
            "class_path": "tx_lightning.data.Grammar",
            "init_args": {"n_train": 40, "n_val": 4, "n_test": 4},
        },
        "tokenizer": {"class_path": "tx_lightning.data.Words"},
        "vocab_size": 400,
        "batch_tokens": 128,
    },
}


def data() -> TranslationData:
    from tx_lightning.data import Grammar

    source = Grammar(n_train=40, n_val=4, n_test=4)
    return TranslationData(source, 400, tokenizer=Words(), batch_tokens=128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Translation, Path]:
    """A task that was trained in Python, and its checkpoint."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    torch.manual_seed(1)
    task = Translation(400, partial(EncoderDecoder, dropout=0.5, **PAIR))
    trainer = make_trainer(max_steps=2, num_sanity_val_steps=0)
    trainer.fit(task, data())
    trainer.save_checkpoint(path)
    return task, path


SENTENCE = "Das Kind tanzt ."


def test_the_verbs_take_the_checkpoint_of_a_plain_training(
    trained: tuple[Translation, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    task, path = trained
    ((expected, *_),) = task.translate([SENTENCE])
    stream = SimpleNamespace(buffer=io.BytesIO(f"{SENTENCE}\n".encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    capsys.readouterr()
    assert main(["translate", str(path)]) == 0
    assert capsys.readouterr().out == f"{' '.join(expected.text.splitlines())}\n"
    Path("data.yaml").write_text(yaml.safe_dump({"data": DATA, "trainer": QUIET}))
    words = ["--config", "data.yaml", "--ckpt_path", str(path)]
    assert main(["test", *words]) == 0
    assert "model section: from checkpoint" in capsys.readouterr().out
    assert main(["fit", *words, "--trainer.max_steps", "3"]) == 0
    (last,) = Path("runs").rglob("checkpoints/*.ckpt")
    assert read_checkpoint(last)["global_step"] == 3
    assert main(["average", str(path), "--output", "averaged.ckpt"]) == 0


def test_an_optimizer_state_that_does_not_fit_is_refused_before_a_kernel_gets_it(
    trained: tuple[Translation, Path], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(trained[1])
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(2)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    task = Translation(400, partial(EncoderDecoder, **PAIR))
    trainer = make_trainer(max_steps=3, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"optimizer state exp_avg .* is \(2,\): it does not fit"):
        trainer.fit(task, data(), ckpt_path=tmp_path / "bad.ckpt")


class Modes(Callback):
    """Notes which modules train while a batch is trained on."""

    def __init__(self) -> None:
        self.training: dict[str, bool] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        self.training = {name: module.training for name, module in pl_module.named_modules()}


def modes_in_fit(task: LightningModule) -> dict[str, bool]:
    modes = Modes()
    make_trainer(max_steps=1, num_sanity_val_steps=0, callbacks=[modes]).fit(task, data())
    return modes.training


def test_a_task_that_was_loaded_trains_with_dropout(trained: tuple[Translation, Path]) -> None:
    """Without Lightning's warning about modules in evaluation mode, which would fail the test."""
    for loaded in (load_task(trained[1]), Translation.load_from_checkpoint(trained[1])):
        assert isinstance(loaded, Translation)
        assert not loaded.training
        loaded.translate([SENTENCE])
        assert all(modes_in_fit(loaded).values())


def test_modes_that_were_set_since_are_kept(trained: tuple[Translation, Path]) -> None:
    loaded = load_task(trained[1])
    assert isinstance(loaded, Translation)
    loaded.train()
    loaded.network.encoder.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        modes = modes_in_fit(loaded)
    assert modes["network.decoder"]
    assert not modes["network.encoder"]
    loaded = load_task(trained[1])
    loaded.train().eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        assert not any(modes_in_fit(loaded).values())


def test_a_task_of_ones_own_in_evaluation_mode_is_left_in_it() -> None:
    task = Translation(400, partial(EncoderDecoder, **PAIR)).eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        assert not any(modes_in_fit(task).values())


# load_from_checkpoint


def test_load_from_checkpoint_is_load_task_with_arguments(
    trained: tuple[Translation, Path],
) -> None:
    task, path = trained
    for kind in (Translation, Task):
        loaded: Any = kind.load_from_checkpoint(path)
        assert isinstance(loaded, Translation)
        assert loaded.translate([SENTENCE]) == task.translate([SENTENCE])
    changed = Translation.load_from_checkpoint(
        path,
        map_location="cpu",
        strict=True,
        label_smoothing=0.25,
        decoding=Beam(beam_size=2),
        network=partial(EncoderDecoder, dropout=0.0, **PAIR),
    )
    assert changed.label_smoothing == 0.25
    assert isinstance(changed.decoding, Beam)
    assert {m.p for m in changed.network.modules() if isinstance(m, Dropout)} == {0.0}
    assert changed.settings is not None
    arguments = changed.settings["init_args"]
    assert arguments["label_smoothing"] == 0.25
    assert arguments["decoding"]["init_args"]["beam_size"] == 2
    assert arguments["network"]["init_args"]["dropout"] == 0.0
    unwritten = Translation.load_from_checkpoint(path, optimizer=lambda p: torch.optim.SGD(p, 1.0))
    assert unwritten.settings is None


def test_what_load_from_checkpoint_refuses(trained: tuple[Translation, Path]) -> None:
    path = trained[1]
    refused: list[tuple[type[Task[Any]], dict[str, Any], str]] = [
        (Tagging, {}, "holds a tx_lightning.tasks.Translation, not a Tagging"),
        (
            Translation,
            {"label_smothing": 0.1},
            "no parameter 'label_smothing' .did you mean 'label_",
        ),
        (Translation, {"label_smoothing": 2.0}, "task cannot be built: label_smoothing=2.0 must"),
        (Translation, {"hparams_file": "a.yaml"}, "hparams_file: a checkpoint has all settings"),
        (Translation, {"weights_only": False}, "weights_only=False"),
        (Translation, {"checkpoint_path": io.BytesIO()}, "checkpoint_path: give the name of a"),
        (
            Translation,
            {"network": partial(EncoderDecoder, **{**PAIR, "n_encoder_layers": 2})},
            "do not fit .*: Missing key",
        ),
    ]
    for kind, options, says in refused:
        with pytest.raises(ValueError, match=says) as caught:
            kind.load_from_checkpoint(**{"checkpoint_path": path, **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        trained[0].load_from_checkpoint(path)


def test_load_from_checkpoint_need_not_be_strict(trained: tuple[Translation, Path]) -> None:
    deeper = partial(EncoderDecoder, **{**PAIR, "n_encoder_layers": 2})
    with pytest.warns(UserWarning, match="the file has no network.encoder.layers.1."):
        loaded = Translation.load_from_checkpoint(trained[1], strict=False, network=deeper)
    assert len(loaded.network.encoder.layers) == 2


# The mechanism


class Part(Described):
    def __init__(self, size: int, *rest: int, factory: Any = None, **more: Any) -> None:
        self.made = None if factory is None else factory(size)
        self.factory = factory


class Derived(Part):
    def __init__(self, name: str) -> None:
        super().__init__(3)
        self.name = name


def described(built: object) -> tuple[dict[str, Any], dict[str, str]]:
    description = description_of(built)
    assert description is not None
    return description.settings["init_args"], description.missing


def test_the_constructor_that_was_called_is_described() -> None:
    assert described(Derived("a")) == ({"name": "a"}, {})
    description = description_of(Derived("a"))
    assert description is not None
    assert description.settings["class_path"] == f"{__name__}.Derived"
    assert description_of(nn.Linear(1, 1)) is None


def test_a_factory_is_described_by_what_it_makes_and_left_in_place() -> None:
    def factory(size: int) -> Part:
        return Part(size, colour="red")

    part = Part(4, factory=factory)
    assert part.factory is factory
    assert described(part)[0]["factory"] == {
        "class_path": f"{__name__}.Part",
        "init_args": {"colour": "red"},
    }
    assert described(Part(4, factory=lambda size: Part(size - 1)))[1] == {
        "factory.size": "the factory calls its class with another size"
    }
    assert "factory" in described(Part(4, factory=lambda size: object()))[1]


def test_values_are_plain() -> None:
    size: Any = np.int64(4)
    found, missing = described(
        Part(size, a=np.float32(0.5), b=(1, [2, {"c": None}]), d=RotaryPositions, e={1, 2})
    )
    assert found == {
        "size": 4,
        "a": 0.5,
        "b": [1, [2, {"c": None}]],
        "d": {"class_path": "tx_lightning.nn.RotaryPositions", "init_args": {}},
        "e": [1, 2],
    }
    assert missing == {}
    assert described(Part(4, 5)) == ({"size": 4}, {"rest": "arguments without a name"})
    assert described(Part(4, a=object())) == ({"size": 4}, {"a": "a object"})
    partly = Part(4, a=partial(nn.LayerNorm, 3))
    assert described(partly)[1] == {"a": "functools.partial with an argument that has no name"}
    assert issubclass(CannotDescribe, ValueError)


def test_a_wrong_call_is_told_as_ever() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'vocab_size'"):
        EncoderDecoder()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beams'"):
        Greedy(beams=3)  # type: ignore[call-arg]
