import math
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from torch import Tensor

from tests.small import make, make_trainer
from tx_lightning.callbacks import AttentionLogger, attention_logging
from tx_lightning.callbacks.attention_logging import entropy
from tx_lightning.callbacks.attention_pictures import LARGEST, _layout, _pages, draw
from tx_lightning.callbacks.pictures import save, visible, visible_token
from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.data.translation import TranslationData
from tx_lightning.nn import MultiHeadAttention
from tx_lightning.tasks import Translation
from tx_lightning.tasks.task import without_padding

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
    found = {"cross": attention_logging._Maps([1], [0], [one, two], labels, [[], []])}
    monkeypatch.setattr(AttentionLogger, "_record", lambda *_: found)
    AttentionLogger([4, 5])._log(trainer(logger=recorder), task)
    assert recorder.rows == [
        (0, {"attention/cross/layer1/head0/entropy": pytest.approx(0.75 * math.log(4))})
    ]


# Pictures ----------------------------------------------------------------------------------------


def texts(parent: Any) -> list[str]:
    return [text.get_text() for text in parent.texts]


def test_a_picture_has_labels_axes_and_a_colour_bar() -> None:
    weights = torch.rand(2, 3, 2, 4)
    labels = (["▁the", "$x$"], ["▁ein", ".", "</s>", "a" * 50])
    [figure] = draw(weights, labels, layers=[0, 5], heads=[1, 2, 7], title="cross, step 3")
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in maps[:3]] == [f"layer 0, head {h}" for h in (1, 2, 7)]
    for i, axes in enumerate(maps):
        drawn = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(drawn, weights[i // 3, i % 3].numpy())
        assert axes.images[0].get_clim() == (0, 1)
    assert texts(maps[0]) == ["▁the", "$x$"]
    assert texts(maps[4]) == ["▁ein", '"."', "</s>", "a" * 15 + "…"]
    assert [text.get_position()[0] for text in maps[4].texts] == [0, 1, 2, 3]
    assert {"query", "key", "weight", "cross, step 3"} <= set(texts(figure))
    [bar] = [axes for axes in figure.axes if not axes.get_title()]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.0", "0.5", "1.0"]


def test_a_row_of_a_decoder_says_what_it_has_read() -> None:
    [figure] = draw(torch.rand(1, 1, 2, 2), (["<s>", "."], ["a", "b"]), [0], [0], "", reads=True)
    assert texts(figure.axes[0])[:2] == ["having read <s>", 'having read "."']


ODD = [
    "$\\frac$",
    "漢字",
    "\n",
    "_^{",
    "\x00",
    "é",
    "😀",
    "a" * 50,
    "漢" * 20,
    "▁",
    " ",
    ".",
    "'",
    '"',
    "``",
]


def test_awkward_tokens_are_drawn_without_a_warning_and_none_is_cut(tmp_path: Path) -> None:
    """Nothing is cut off, and no label runs into the next."""
    weights = torch.rand(1, 1, len(ODD), len(ODD))
    [figure] = draw(weights, (ODD, ODD), [0], [0], "$ a title", reads=True)
    save(figure, tmp_path / "map.png")
    height, width = imread(tmp_path / "map.png").shape[:2]
    boxes = [t.get_window_extent() for axes in (figure, figure.axes[0]) for t in axes.texts]
    for box in boxes:
        assert 0 <= box.x0 <= box.x1 <= width
        assert 0 <= box.y0 <= box.y1 <= height
    rows, columns = (
        [t.get_window_extent() for t in part]
        for part in (figure.axes[0].texts[: len(ODD)], figure.axes[0].texts[len(ODD) :])
    )
    inside = figure.axes[0].get_window_extent()
    assert max(box.x1 for box in rows) < inside.x0
    assert max(box.y1 for box in columns) < inside.y0
    assert all(low.y1 <= high.y0 + 2 for high, low in pairwise(rows))
    assert all(left.x1 <= right.x0 + 2 for left, right in pairwise(columns))


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (".", '"."'),
        ("▁,", '"▁,"'),
        ('"', "'\"'"),
        ("▁", '"▁"'),
        ("\n", '"\\n"'),
        ("a\tb", "a\\tb"),
        ("\u200b", '"\\u200b"'),
        ("\xa0", '"\\xa0"'),
        ("<s>", "<s>"),
        ("▁the", "▁the"),
        ("$x$", "$x$"),
        ("a" * 17, "a" * 15 + "…"),
        ("a" * 16, "a" * 16),
    ],
)
def test_every_token_can_be_read(token: str, shown: str) -> None:
    assert visible_token(token) == shown


def test_what_no_font_has_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tx_lightning.callbacks.pictures._font_with", lambda c: "DejaVu Sans" if c < "一" else ""
    )
    assert visible("漢a") == "\\u6f22a"
    assert visible("漢") != visible("字")


tokens = st.lists(st.sampled_from([*ODD, "the", "▁doctors", "x"]), min_size=1, max_size=100)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tokens, tokens, st.integers(1, 12), st.integers(1, 16))
def test_pictures_are_at_most_as_large_as_they_may_be(
    rows: list[str], columns: list[str], n_layers: int, n_heads: int
) -> None:
    """And every map is in one of them."""
    rows, columns = ([visible_token(token) for token in side] for side in (rows, columns))
    layout = _layout([f"having read {row}" for row in rows], columns)
    shown: list[tuple[int, int]] = []
    for page in _pages(layout, n_layers, n_heads):
        assert len(page[0]) == max(map(len, page))
        assert max(layout.size(len(page), len(page[0]))) <= LARGEST
        shown += [place for row in page for place in row]
    assert shown == [(i, j) for i in range(n_layers) for j in range(n_heads)]


def test_many_maps_are_split(tmp_path: Path) -> None:
    names = [f"token{i}" for i in range(70)]
    figures = draw(torch.rand(2, 3, 70, 70), (names, names), [0, 1], [0, 1, 2], "self")
    assert len(figures) == 6
    titles = [axes.get_title() for figure in figures for axes in figure.axes if axes.get_title()]
    assert titles == [f"layer {i}, head {j}" for i in range(2) for j in range(3)]
    assert [texts(figure)[0] for figure in figures] == [f"self ({i} of 6)" for i in range(1, 7)]
    save(figures[0], tmp_path / "0.png")
    assert max(imread(tmp_path / "0.png").shape) <= LARGEST


def test_heads_that_do_not_fit_in_a_row_go_to_the_next() -> None:
    names = [f"token{i}" for i in range(28)]
    [figure] = draw(torch.rand(1, 8, 28, 28), (names, names), [3], range(8), "self")
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in maps] == [f"layer 3, head {j}" for j in range(8)]
    rows = sorted({round(axes.get_position().y0, 3) for axes in maps}, reverse=True)
    assert [sum(round(axes.get_position().y0, 3) == y for axes in maps) for y in rows] == [3, 3, 2]
    labelled = [len(texts(axes)) for axes in maps]
    assert labelled == [28, 0, 0, 28, 0, 28, 56, 28]  # each row at its left, each column below


def test_a_long_sentence_is_cut_in_the_picture_which_says_so() -> None:
    names = [str(i) for i in range(300)]
    [figure] = draw(torch.rand(1, 1, 300, 300), (names, names), [0], [0], "self")
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (100, 100)
    assert texts(figure)[0] == "self, the first 100 of 300 tokens"


def test_weights_across_documents_are_marked() -> None:
    names = ["</s>", "a", "b", "</s>", "c", "</s>"]
    weights = torch.rand(1, 2, 6, 6)
    [figure] = draw(weights, (names, names), [0], [0, 1], "self", ends=[0, 3, 5])
    for axes in figure.axes[:2]:  # after the last token there is no other document
        corners = [np.asarray(line.get_xydata()).tolist()[1] for line in axes.lines]
        assert corners == [[0.5, 0.5], [3.5, 3.5]]
    assert any("end of a document" in text for text in texts(figure))
    [plain] = draw(weights, (names, names), [0], [0, 1], "self")
    assert not any("document" in text for text in texts(plain))
    assert not any(axes.lines for axes in plain.axes[:2])


# Other tasks and networks ------------------------------------------------------------------------


def recorded(name: str, start: Callable[[Tokenizers], Tokenizers] | None = None) -> dict[str, Any]:
    """The maps of the first validation example of a task, with other tokenizers where asked."""
    task, data = make(name)
    data.prepare_data()
    if start is not None:
        data.given_tokenizers = start(data.tokenizers)
        data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    fit = make_trainer(Path())
    fit.datamodule = data  # type: ignore[attr-defined]
    return AttentionLogger([0])._record(fit, task)


def test_a_language_model_shows_where_documents_end() -> None:
    found = recorded("LanguageModeling")
    maps = found["self"]
    rows, _ = maps.labels[0]
    ends = [place for place, token in enumerate(rows) if token == "</s>"]
    assert maps.ends == [ends]
    assert 0 in ends  # the stream begins after an end


def padding_is_the_start(own: Tokenizers) -> Tokenizers:
    """As Marian's: a decoder begins with the padding token."""
    pad, eos, unk = own.source.pad_id, own.source.eos_id, own.source.unk_id
    names = {pad: "<pad>", eos: "</s>", unk: "<unk>"}
    special = SpecialIds(pad, pad, eos, unk)
    return Tokenizers.one(Tokenizer.foreign(own.source.to_json(), special, names))


@pytest.mark.parametrize("name", ["Translation", "Denoising"])
def test_a_start_token_that_is_padding_has_its_label(name: str) -> None:
    found = recorded(name, padding_is_the_start)
    for kind, maps in found.items():
        (rows, columns), weights = maps.labels[0], maps.weights[0]
        assert weights.shape[2:] == (len(rows), len(columns)), kind
        assert (rows[0] == "<pad>") is (kind != "encoder_self")


@given(st.lists(st.integers(0, 3), max_size=8))
def test_only_padding_at_the_end_is_padding(ids: list[int]) -> None:
    real = list(without_padding(ids, 0))
    assert ids == real + [0] * (len(ids) - len(real))
    assert len(real) >= min(1, len(ids))
    assert len(real) < 2 or real[-1] != 0


class OwnAttention(MultiHeadAttention):
    """Computes something else than softmax attention."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q @ (k.transpose(-2, -1) @ v)


@pytest.mark.parametrize("own", ["kernel linear_attention", "forward, that of OwnAttention"])
def test_maps_of_attention_of_one_s_own_are_refused_before_training(
    own: str, task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    layer: Any = task.network.decoder.layers[1]
    if own.startswith("kernel"):
        layer.cross_attention.kernel = linear_attention
    else:
        layer.cross_attention = OwnAttention(16, 2)
    message = (
        r"weights of decoder\.layers\.1\.cross_attention cannot be recorded: .* own "
        rf"{own}.*; set its kernel to fused_attention, or do not record or log attention"
    )
    with pytest.raises(ValueError, match=message):
        trainer(AttentionLogger()).fit(task, data)
    assert task.trainer.global_step == 0


def test_a_network_without_attention_is_refused(
    task: Translation, data: TranslationData, trainer: MakeTrainer
) -> None:
    class Nothing(torch.nn.Module):
        """No attention at all."""

    logger = AttentionLogger()
    fit = ready(trainer(), task, data)
    task.network = Nothing()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="finds no layers with attention in a Nothing: remove it"):
        logger.setup(fit, task, "fit")


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
