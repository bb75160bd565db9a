import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from torch import Tensor

from tx_lightning.callbacks import AttentionLogger, attention_logging
from tx_lightning.callbacks.attention_logging import draw, entropy
from tx_lightning.data.translation import TranslationData
from tx_lightning.tasks import Translation

MakeTrainer = Callable[..., Trainer]
KINDS = ["encoder_self", "decoder_self", "cross"]


def ready(trainer: Trainer, task: Translation, data: TranslationData) -> Trainer:
    """Bring a trainer to where its callbacks can be driven by hand."""
    data.prepare_data()
    data.setup("fit")
    trainer.datamodule = data  # type: ignore[attr-defined]
    task.attach(data.tokenizers)
    return trainer


def words(tokens: list[str]) -> list[str]:
    return [token.strip("▁") for token in tokens]


def test_pictures_and_entropies_of_the_chosen(
    task: Translation, data: TranslationData, trainer: MakeTrainer, tmp_path: Path, recorder: Any
) -> None:
    callback = AttentionLogger(examples=[15, 3], layers=[-1, 0], heads=[1], every_n_steps=2)
    trainer(callback, logger=recorder, max_steps=5).fit(task, data)
    names = {path.name for path in (tmp_path / "attention").iterdir()}
    assert names == {
        f"{kind}-example{example}-step{step}.png"
        for kind in KINDS
        for example in (3, 15)
        for step in (2, 4)
    }
    image = imread(tmp_path / "attention" / "cross-example3-step2.png")
    assert image.std() > 0.1  # not blank
    rows = recorder.named("attention/")
    assert [step for step, _ in rows] == [2, 4]
    for _, row in rows:
        assert row.keys() == {
            f"attention/{kind}/layer{layer}/head1/entropy" for kind in KINDS for layer in (1, 0)
        }
        assert all(0 < value < math.log(9) for value in row.values())


def test_all_layers_and_heads_after_each_validation_but_not_the_sanity_check(
    task: Translation, data: TranslationData, trainer: MakeTrainer, recorder: Any
) -> None:
    fit = trainer(
        AttentionLogger([0], layers="all"),
        logger=recorder,
        limit_val_batches=1,
        val_check_interval=3,
        max_steps=3,
    )
    fit.fit(task, data)
    [(step, row)] = recorder.named("attention/")
    assert step == 3
    assert len(row) == len(KINDS) * 2 * 2


def test_maps_have_a_label_for_each_row_and_column(
    task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    fit = ready(trainer(), task, data)
    store = data.val_store
    examples = [int(store.source_lengths.argmin()), int(store.source_lengths.argmax())]
    found = AttentionLogger(examples, layers="all")._record(fit, task)
    for i, example in enumerate(examples):
        for kind in KINDS:
            maps = found[kind]
            rows, columns = maps.labels[i]
            assert maps.layers == maps.heads == [0, 1]
            assert maps.weights[i].shape == (2, 2, len(rows), len(columns))
            torch.testing.assert_close(maps.weights[i].sum(-1), torch.ones(2, 2, len(rows)))
        rows, columns = found["cross"].labels[i]
        assert (
            words(columns[:-1]) == store.source_text(example).split()
        )  # then the end of the sentence
        assert words(rows[1:]) == store.target_text(example).split()  # after the beginning
        decoder = found["decoder_self"].weights[i]
        assert torch.equal(decoder, decoder.tril())


def test_chosen_layers_and_heads_are_those_of_all(
    task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    fit = ready(trainer(), task, data)
    every = AttentionLogger([5], layers="all")._record(fit, task)["cross"]
    chosen = AttentionLogger([5], layers=[-1], heads=[1])._record(fit, task)["cross"]
    assert (chosen.layers, chosen.heads) == ([1], [1])
    assert torch.equal(chosen.weights[0], every.weights[0][1:, 1:])
    assert not torch.equal(every.weights[0][0], every.weights[0][1])


class Bystander(Callback):
    """Compares what training goes on from before and after another callback logs."""

    def __init__(self, callback: AttentionLogger) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Translation)
        pl_module.network.encoder.eval()  # a mode that differs from the rest
        before = self.state(pl_module)
        self.callback.on_train_batch_end(trainer, pl_module)
        torch.testing.assert_close(self.state(pl_module), before, rtol=0, atol=0)
        pl_module.network.encoder.train()

    def state(self, task: Translation) -> list[Any]:
        return [
            [p.detach().clone() for p in task.parameters()],
            [None if p.grad is None else p.grad.clone() for p in task.parameters()],
            torch.get_rng_state(),
            [child.training for child in task.modules()],
            torch.is_grad_enabled(),
        ]


def test_training_does_not_notice(
    task: Translation, data: TranslationData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    bystander = Bystander(AttentionLogger([0], every_n_steps=2))
    trainer(bystander, max_steps=4, accumulate_grad_batches=2).fit(task, data)
    steps = {path.stem.rpartition("step")[2] for path in (tmp_path / "attention").iterdir()}
    assert steps == {"2", "4"}


def test_between_log_points_nothing_runs(
    task: Translation,
    data: TranslationData,
    trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def record(self: AttentionLogger, trainer: Trainer, task: Translation) -> dict[str, Any]:
        calls.append(trainer.global_step)
        return {}

    monkeypatch.setattr(AttentionLogger, "_record", record)
    callback = AttentionLogger([0], every_n_steps=3)
    trainer(callback, max_steps=7, accumulate_grad_batches=2).fit(task, data)
    assert calls == [3, 6]


def test_entropy_is_in_nats() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    expected = torch.tensor([0.0, math.log(4), math.log(2)])
    torch.testing.assert_close(entropy(weights), expected)


def test_the_logged_entropy_is_the_mean_over_tokens_of_all_examples(
    task: Translation,
    data: TranslationData,
    trainer: MakeTrainer,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = torch.tensor([[[[1.0, 0.0]]]])  # a row of entropy 0
    two = torch.full((1, 1, 3, 4), 0.25)  # three of log 4
    labels = [(["a"], ["x", "y"]), (["a", "b", "c"], ["w", "x", "y", "z"])]
    found = {"cross": attention_logging._Maps([1], [0], [one, two], labels)}
    monkeypatch.setattr(AttentionLogger, "_record", lambda *_: found)
    AttentionLogger([4, 5])._log(trainer(logger=recorder), task)
    assert recorder.rows == [
        (0, {"attention/cross/layer1/head0/entropy": pytest.approx(0.75 * math.log(4))})
    ]


def test_axes_carry_the_tokens() -> None:
    weights = torch.rand(2, 3, 2, 4)
    labels = (["▁the", "$x$"], ["▁ein", "漢字", "</s>", "a" * 50])
    figure = draw(weights, labels, layers=[0, 5], heads=[1, 2, 7], title="cross")
    grid = figure.axes
    assert [axis.get_title() for axis in grid[:3]] == [f"layer 0, head {h}" for h in (1, 2, 7)]
    for i, axis in enumerate(grid):
        drawn = np.asarray(axis.images[0].get_array())
        np.testing.assert_array_equal(drawn, weights[i // 3, i % 3].numpy())
    assert [text.get_text() for text in grid[0].texts] == ["▁the", "$x$"]
    assert [text.get_text() for text in grid[4].texts] == ["▁ein", "漢字", "</s>", "a" * 15 + "…"]
    assert [text.get_position()[0] for text in grid[4].texts] == [0, 1, 2, 3]


def test_awkward_tokens_are_drawn_without_a_warning(tmp_path: Path) -> None:
    labels = (["$\\frac$", "漢", "\n"], ["_^{", "\x00", "é"])
    figure = draw(torch.rand(1, 1, 3, 3), labels, [0], [0], "$")
    attention_logging._save(figure, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_long_sentence_is_cut_in_the_picture() -> None:
    tokens = [str(i) for i in range(300)]
    figure = draw(torch.rand(1, 1, 300, 300), (tokens, tokens), [0], [0], "")
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (100, 100)


def test_pyplot_is_not_touched(
    task: Translation,
    data: TranslationData,
    trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    AttentionLogger([0])._log(ready(trainer(), task, data), task)
    assert len(list((tmp_path / "attention").glob("*.png"))) == 3


class Images(WandbLogger):
    """The W&B logger up to where it would call wandb."""

    def __init__(self) -> None:
        super().__init__(offline=True)
        self.images: dict[str, list[Any]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.images[key] = images

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


def test_images_go_to_wandb_and_tensorboard(
    task: Translation, data: TranslationData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb, tensorboard = Images(), TensorBoardLogger(tmp_path, name="board")
    fit = ready(trainer(logger=[wandb, tensorboard]), task, data)
    AttentionLogger([0, 7])._log(fit, task)
    folder = tmp_path / "attention"
    assert wandb.images == {
        f"attention/{kind}": [str(folder / f"{kind}-example{e}-step0.png") for e in (0, 7)]
        for kind in KINDS
    }
    tensorboard.finalize("success")
    events = EventAccumulator(tensorboard.log_dir).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {f"attention/{k}/example{e}" for k in KINDS for e in (0, 7)}
    assert "attention/cross/layer1/head0/entropy" in tags["scalars"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"examples": [0, 20]},
            "examples=[0, 20] of AttentionLogger: there is no 20, only 0 to 19",
        ),
        ({"layers": [2]}, "layers=[2] of AttentionLogger: there is no 2, only -2 to 1"),
        ({"heads": [-1]}, "heads=[-1] of AttentionLogger: there is no -1, only 0 to 1"),
    ],
)
def test_what_does_not_exist_is_refused_before_training(
    choice: dict[str, Any],
    message: str,
    task: Translation,
    data: TranslationData,
    trainer: MakeTrainer,
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(AttentionLogger(**choice)).fit(task, data)


def test_a_step_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 of AttentionLogger"):
        AttentionLogger(every_n_steps=0)


def test_what_is_drawn_computes_what_training_computes(
    task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    fit = ready(trainer(), task, data)
    calls: list[tuple[tuple[Tensor, Tensor], Tensor]] = []
    hook = task.network.register_forward_hook(lambda _, args, y: calls.append((args, y)))
    AttentionLogger([0, 9])._record(fit, task)
    hook.remove()
    assert len(calls) == 2
    for inputs, naive in calls:
        assert not naive.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(naive, task.network.eval()(*inputs))
