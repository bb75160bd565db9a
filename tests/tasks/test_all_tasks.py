"""What holds for every task there is, whoever builds the trainer."""

import inspect
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, lr_scheduler

import tx_lightning.tasks
from tests import small
from tests.small import MAKERS, Rows, make, make_trainer, sgd
from tx_lightning.callbacks import AttentionLogger, SampleLogger
from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.errors import ConfigurationError
from tx_lightning.models import Classifier, MaskedLanguageModel, Tagger
from tx_lightning.tasks import Translation
from tx_lightning.tasks.task import Task, fused_adamw

VALIDATED: dict[str, Any] = {
    "limit_val_batches": 1,
    "val_check_interval": 3,
    "check_val_every_n_epoch": None,
}


def concrete(kind: type) -> bool:
    """Whether a class has a body for each of its methods; LightningModule is no ABC."""
    methods = (inspect.getattr_static(kind, name) for name in dir(kind))
    return not any(vars(m).get("__isabstractmethod__") for m in methods if inspect.isfunction(m))


def test_every_task_is_made_here() -> None:
    found: set[str] = set()
    waiting: list[type] = [Task]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("tx_lightning.") and concrete(kind):
            found.add(kind.__name__)
    assert found == MAKERS.keys()
    assert found == set(tx_lightning.tasks.__all__) - {"Task"}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_precision_trains_and_validates(name: str, precision: str, tmp_path: Path) -> None:
    task, data = make(name, optimizer=sgd)
    trainer = make_trainer(tmp_path, precision=precision, **VALIDATED)
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 3
    losses = {name: trainer.callback_metrics[name] for name in ("train/loss", "val/loss")}
    assert all(loss.isfinite() for loss in losses.values()), losses
    kinds = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    assert {p.dtype for p in task.network.parameters()} == {kinds.get(precision, torch.float32)}


@pytest.mark.parametrize("name", ["Translation", "Classification", "Tagging"])
def test_predictions_are_returned(name: str, tmp_path: Path) -> None:
    task, data = make(name)
    found = make_trainer(tmp_path).predict(task, datamodule=data)
    assert found is not None
    answers = dict(answer for batch in found for answer in batch)
    assert sorted(answers) == list(range(small.SIZES["n_test"]))
    assert all(isinstance(best.text, str) for best, *_ in answers.values())


# An optimizer step


class Gradients(Callback):
    """Keeps the gradient of each optimizer step, before clipping."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        """Lightning zeroes gradients after the forward pass of the next step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            found = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.steps.append(torch.cat(found).clone())


def mean_gradient(task: Task[Any], batches: list[Any]) -> Tensor:
    """The gradient of the loss per label over some micro-batches, by its definition."""
    task.zero_grad()
    labels = sum(batch.loss_tokens for batch in batches)
    loss = torch.stack([task(batch).loss for batch in batches]).sum() / labels
    loss.backward()
    found = [p.grad.flatten() for p in task.parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("limits", [{"limit_train_batches": 6}, {"overfit_batches": 1}])
@pytest.mark.parametrize("name", MAKERS)
def test_what_was_seen_divides(name: str, limits: dict[str, Any], tmp_path: Path) -> None:
    rate = 1e-9  # so small that the weights stay where they are
    task, data = make(name, optimizer=lambda parameters: SGD(parameters, lr=rate))
    seen = Gradients()
    trainer = make_trainer(
        tmp_path, max_steps=2, accumulate_grad_batches=4, callbacks=[seen], **limits
    )
    trainer.fit(task, datamodule=data)
    per_epoch = limits.get("limit_train_batches", 1)
    epochs = [list(data.train_dataloader()) for _ in range(2)]
    batches = epochs[0][:per_epoch]
    expected = [batches[:4], batches[4:]] if per_epoch == 6 else [batches, epochs[1][:1]]
    for gradient, micro_batches in zip(seen.steps, expected, strict=True):
        assert torch.allclose(gradient, mean_gradient(task, micro_batches), rtol=1e-4, atol=1e-6)


# Special ids


def shifted(tokenizer: Tokenizer, by: int) -> Tokenizers:
    """A tokenizer as it may come with weights from elsewhere: special ids are not 0 to 3."""
    text = json.loads(tokenizer.to_json())
    vocabulary = text["model"]["vocab"]
    size = len(vocabulary)
    text["model"]["vocab"] = {entry: (i + by) % size for entry, i in vocabulary.items()}
    pad, bos, eos, unk = ((i + by) % size for i in range(4))
    names = {pad: "<pad>", bos: "<s>", eos: "</s>", unk: "<unk>"}
    return Tokenizers.one(
        Tokenizer.foreign(json.dumps(text), SpecialIds(pad, bos, eos, unk), names)
    )


def network_with(name: str, pad_id: int) -> Any:
    """The network of a task that is told what padding is."""
    if name in ("Translation", "Denoising"):
        return partial(small.sequences, pad_id=pad_id)
    heads: dict[str, Any] = {
        "Classification": partial(Classifier, dropout=0.0),
        "Tagging": partial(Tagger, dropout=0.0),
        "MaskedLanguageModeling": MaskedLanguageModel,
    }
    return partial(heads[name], encoder=partial(small.encoder, pad_id=pad_id))


SHIFTED = 7
PADDED = sorted(MAKERS.keys() - {"LanguageModeling"})  # a stream of blocks has no padding


@pytest.mark.parametrize("name", PADDED)
def test_another_pad_id_than_the_tokenizer_s_is_refused(name: str, tmp_path: Path) -> None:
    task, data = make(name, network=network_with(name, 1))
    with pytest.raises(ValueError, match=r"network\.(encoder\.)?pad_id is 1, but .* pads with 0"):
        make_trainer(tmp_path).fit(task, datamodule=data)


@pytest.mark.parametrize("name", PADDED)
def test_padding_follows_the_tokenizer(name: str, tmp_path: Path) -> None:
    """Renumbering the whole vocabulary changes nothing but the numbers."""
    task, data = make(name)
    data.prepare_data()
    own, weights = data.tokenizers.source, token_table(task).weight.detach().clone()
    losses = []
    for by in (0, SHIFTED):
        task, data = make(name, optimizer=sgd)
        data.given_tokenizers = shifted(own, by)
        task.attach(data.given_tokenizers)
        table = token_table(task)
        assert table.padding_idx == by
        assert not table.weight[by].any()
        with torch.no_grad():
            table.weight[: own.vocab_size] = weights[: own.vocab_size].roll(by, 0)
        trainer = make_trainer(tmp_path, **VALIDATED)
        trainer.fit(task, datamodule=data)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    if name != "MaskedLanguageModeling":  # which draws random tokens, by number
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def token_table(task: Task[Any]) -> nn.Embedding:
    tables = {m for m in task.network.modules() if isinstance(m, nn.Embedding)}
    (table,) = {table for table in tables if table.padding_idx is not None}
    return table


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("role", ["pad", "bos", "eos", "unk", "mask"])
def test_a_special_id_beyond_the_table_is_refused(name: str, role: str) -> None:
    task, data = make(name)
    data.prepare_data()
    text = json.loads(data.tokenizers.source.to_json())
    ids: dict[str, Any] = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, role: small.VOCABULARY}
    strange = Tokenizer.foreign(json.dumps(text), SpecialIds(**ids), {})
    with pytest.raises(ValueError, match=rf"{role}_id is 400, but vocab_size is 400"):
        task.attach(Tokenizers.one(strange))


def test_padding_that_ends_texts_or_differs_between_sides_is_refused() -> None:
    task, data = make("Translation")
    data.prepare_data()
    text = data.tokenizers.source.to_json()
    ending = Tokenizer.foreign(text, SpecialIds(pad=2, bos=1, eos=2, unk=3), {})
    with pytest.raises(ValueError, match="pads with 2, which also ends its texts"):
        task.attach(Tokenizers.one(ending))
    other = Tokenizer.foreign(text, SpecialIds(pad=9, bos=1, eos=2, unk=3), {})
    separate = Translation(small.VOCABULARY, partial(small.sequences, share_embeddings=False))
    with pytest.raises(ValueError, match="source tokenizer pads with 0 and the target .* 9"):
        separate.attach(Tokenizers(data.tokenizers.source, other))


# Lightning's own features


@pytest.mark.parametrize("name", MAKERS)
def test_the_batch_size_finder_reports_what_it_tried(name: str, tmp_path: Path) -> None:
    task, data = make(name)
    finder = BatchSizeFinder("power", steps_per_trial=1, init_val=64, max_trials=3,
                             batch_arg_name="batch_tokens")  # fmt: skip
    tried: list[int] = []
    planned = type(data).train_sampler

    def watched(self: Any) -> Any:
        tried.append(self.batch_tokens)
        return planned(self)

    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[finder])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data), "train_sampler", watched)
        trainer.fit(task, datamodule=data)
    # Lightning tries its first size with the loader that is there, of 128.
    assert finder.optimal_batch_size == data.batch_tokens == max(tried) == 256


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("name", MAKERS)
def test_what_looks_for_validation_lives_without_it(name: str, tmp_path: Path) -> None:
    task, data = make(name)
    data.val_split = "nothing"
    callbacks = [
        LearningRateFinder(1e-5, 1, num_training_steps=5),
        *(kind() for kind in (AttentionLogger, SampleLogger)),
    ]
    make_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(task, datamodule=data)
    assert not (tmp_path / "attention").exists()
    assert list(data.val_dataloader()) == []
    with pytest.raises(ValueError, match="examples of validation, which is not there"):
        make_trainer(tmp_path, callbacks=[AttentionLogger(every_n_steps=1)]).fit(task, data)


@pytest.mark.parametrize("name", MAKERS)
def test_the_batch_size_finder_is_told_the_name(name: str, tmp_path: Path) -> None:
    task, data = make(name)
    with pytest.raises(ConfigurationError, match="set its batch_arg_name to batch_tokens"):
        make_trainer(tmp_path, callbacks=[BatchSizeFinder()]).fit(task, datamodule=data)


class FirstSteps(Callback):
    """Keeps the rates of all steps, and the weights before the first."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.rates:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("factor", [None, 0.5])
def test_the_learning_rate_finder_sets_the_rate_that_is_used(
    factor: float | None, tmp_path: Path
) -> None:
    def falling(optimizer: Any) -> Any:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    task, data = make("Classification", scheduler=falling if factor else None)
    before = [p.detach().clone() for p in task.parameters()]
    finder, first = LearningRateFinder(1e-5, 1, num_training_steps=20), FirstSteps()
    make_trainer(tmp_path, callbacks=[finder, first]).fit(task, datamodule=data)
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert found is not None
    assert first.rates == pytest.approx([found * (factor or 1) ** step for step in range(3)])
    assert all(map(torch.equal, before, first.weights))


def test_the_learning_rate_finder_needs_one_rate(tmp_path: Path) -> None:
    task, data = make("Classification", layer_decay=0.5)
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1, num_training_steps=20)
    with pytest.raises(ConfigurationError, match="sets one rate for all layers"):
        make_trainer(tmp_path, callbacks=[finder]).fit(task, datamodule=data)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_averaged_weights_are_scored_saved_and_resumed(tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None) -> tuple[Task[Any], Any]:
        task, data = make("Translation")
        keeper = ModelCheckpoint(tmp_path / f"{steps}-{checkpoint is None}", save_last=True)
        trainer = make_trainer(
            tmp_path,
            max_steps=steps,
            limit_val_batches=1.0,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            callbacks=[EMAWeightAveraging(decay=0.5), keeper],
            enable_checkpointing=True,
        )
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        return task, trainer.callback_metrics["val/loss"]

    fit(3, None)
    one, score = fit(6, None)
    saved = torch.load(tmp_path / "6-True/last.ckpt", weights_only=True)
    for name, weight in one.state_dict().items():  # training ends with the average
        assert torch.equal(weight, saved["state_dict"][name])
    other, again = fit(6, tmp_path / "3-True/last.ckpt")
    assert score == again
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    name = "network.output.weight"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])


@pytest.mark.parametrize("name", MAKERS)
def test_a_source_without_validation_split_trains_without_validations(
    name: str, tmp_path: Path
) -> None:
    task, data = make(name)
    data.val_split = "nothing"
    with pytest.raises(DataError, match=r"no split 'nothing'.*trainer.limit_val_batches to 0"):
        make_trainer(tmp_path, limit_val_batches=1).fit(task, datamodule=data)
    task, data = make(name)
    data.val_split = "nothing"
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 3


# 16-mixed, whose scaler works on CPUs as well


def half(clip: float | None, optimizer: Any, tmp_path: Path, scale: float) -> tuple[Any, Rows]:
    task, data = make("Classification", optimizer=optimizer)
    rows = Rows()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(tmp_path, logger=rows, plugins=[plugin], gradient_clip_val=clip)
    trainer.fit(task, datamodule=data)
    return task, rows


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_float16_scaling_changes_neither_norms_nor_steps(
    clip: float | None, fused: bool, tmp_path: Path
) -> None:
    def plain(parameters: Any) -> SGD:
        return SGD(parameters, lr=0.1, fused=fused)

    one, unscaled = half(clip, plain, tmp_path, scale=1.0)
    other, scaled = half(clip, plain, tmp_path, scale=1024.0)
    norms = [[row["train/grad_norm"] for _, row in r.rows] for r in (unscaled, scaled)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    start, _ = make("Classification")
    before, a, b = (parameters_to_vector(t.parameters()).detach() for t in (start, one, other))
    assert float((a - b).norm()) < 0.02 * float((a - before).norm())


def test_a_scale_that_overflows_is_no_divergence(tmp_path: Path) -> None:
    task, rows = half(1.0, fused_adamw, tmp_path, scale=2.0**40)
    before, _ = make("Classification")
    assert not math.isfinite(rows.rows[0][1]["train/grad_norm"])
    for one, other in zip(task.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)  # all three steps were skipped


# Going on


@pytest.mark.parametrize("limit", [1.0, 3, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_saved_after_training_goes_on_bit_by_bit(
    name: str, limit: float, tmp_path: Path
) -> None:
    def fit(steps: int, start: Path | None) -> Task[Any]:
        task, data = make(name)
        trainer = make_trainer(tmp_path, max_steps=steps, limit_train_batches=limit)
        trainer.fit(task, datamodule=data, ckpt_path=start)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return task

    whole = fit(8, None)
    fit(3, None)
    fit(5, tmp_path / "saved.ckpt")
    task = fit(8, tmp_path / "saved.ckpt")
    for (key, weight), other in zip(
        whole.state_dict().items(), task.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), key
