"""The classification task against hand-made sums: exact loss, exact resume, labels, files."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from tests.stand_ins import free_port
from tests.tasks.test_translation import Gradients, SaveAt, make_trainer
from tests.tasks.test_translation import make_data as translation_data
from tx_lightning.callbacks.predictions import PredictionWriter
from tx_lightning.checkpoints import load_task, read_checkpoint
from tx_lightning.data.classification import ClassificationData
from tx_lightning.data.labelled_sources import LabelledSource, LabelledText
from tx_lightning.data.sampler import Share
from tx_lightning.data.tokenizers import PAD, Words
from tx_lightning.models import Classifier, TextEncoder
from tx_lightning.nn.dropout import Dropout
from tx_lightning.tasks import Classification
from tx_lightning.tasks.classification import balanced_weights

DIGITS = "zero one two three four five six seven eight nine".split()
ENCODER = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "max_length": 24}


class Threes(LabelledSource):
    """Digits of numbers: is there a three, a five, both or neither? Ragged and unbalanced.

    Args:
        pairs: Ask for the one in the first text and for the other in the second.
        neither: What the label of neither is called.
    """

    def __init__(self, pairs: bool = False, neither: str = "neither") -> None:
        self._pairs = pairs
        self.neither = neither

    @property
    def pairs(self) -> bool:
        return self._pairs

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def examples(self, split: str) -> Iterator[LabelledText]:
        numbers = {"train": range(0, 3000, 7), "val": range(1, 300, 5), "test": range(2, 300, 5)}
        for number in numbers[split]:
            words = [DIGITS[int(digit)] for digit in str(number * 37)]
            half = len(words) // 2 if self.pairs else len(words)
            first, second = words[:half], words[half:] if self.pairs else words
            has = ("three" in first, "five" in second)
            label = {(True, True): "both", (False, False): self.neither}.get(has, "one")
            texts = " ".join(first), " ".join(second) if self.pairs else None
            yield LabelledText(*texts, label, f"{split}, line {number}")

    def fingerprint(self, split: str) -> str:
        return f"threes-{self.pairs}-{self.neither}-{split}"


def tiny_network(vocab_size: int, n_classes: int) -> Classifier:
    def encoder(vocab_size: int) -> TextEncoder:
        return TextEncoder(vocab_size, **ENCODER, dropout=0.1, pre_norm=True)  # type: ignore[arg-type]

    return Classifier(vocab_size, n_classes, encoder=encoder, pooling="mean")


def make_task(**changes: Any) -> Classification:
    torch.manual_seed(3)
    return Classification(32, 3, tiny_network, **changes)


def make_data(source: LabelledSource | None = None, **changes: Any) -> ClassificationData:
    arguments = {"tokenizer": Words(), "batch_tokens": 200, "max_length": 24, "seed": 5, **changes}
    return ClassificationData(source or Threes(), 32, 3, **arguments)


def ready(data: ClassificationData, task: Classification) -> ClassificationData:
    data.prepare_data()
    data.setup()
    task.attach(data.tokenizers)
    task.attach_labels(data.labels, len(data.texts))
    return data


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-2)


def without_dropout(task: Classification) -> Classification:
    for module in task.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return task


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_weighted_cross_entropy(weights: list[float] | None, smoothing: float) -> None:
    task = make_task(class_weights=weights, label_smoothing=smoothing).eval()
    data = ready(make_data(), task)
    batch = next(iter(data.train_dataloader()))
    sums = task(batch)
    log_p = task.network(batch.ids).log_softmax(-1)
    loss = nll = torch.zeros(())
    for row, label in zip(log_p, batch.labels.tolist(), strict=True):
        weight = torch.ones(3) if weights is None else torch.tensor(weights)
        loss = loss - (1 - smoothing) * weight[label] * row[label]
        loss = loss - smoothing / 3 * (weight * row).sum()
        nll = nll - row[label]
    torch.testing.assert_close(sums.loss, loss)
    torch.testing.assert_close(sums.nll, nll)
    assert not sums.nll.requires_grad


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_give_the_update_of_the_whole_step(parts: int, tmp_path: Path) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        task = without_dropout(make_task(class_weights=[3.0, 0.2, 1.0], label_smoothing=0.1))
        trainer = make_trainer(
            tmp_path, max_steps=5, accumulate_grad_batches=accumulate, callbacks=[recorded]
        )
        trainer.fit(task, make_data())
        return recorded.steps

    whole, split = gradients(1), gradients(parts)
    assert len(whole) == len(split) >= 4
    first = torch.cat([g.flatten() for g in whole[0]])
    other = torch.cat([g.flatten() for g in split[0]])
    assert float((first - other).norm() / first.norm()) < 1e-6


def test_a_share_that_is_not_real_has_no_loss_and_a_gradient_of_zero() -> None:
    task = make_task(class_weights="balanced")
    data = ready(make_data(), task)
    share = Share(np.array([1]), step_tokens=4, parts=8, real=False)
    sums = task(data.train_batches().__getitems__(share))
    assert float(sums.loss.detach()) == 0
    sums.loss.backward()
    for parameter in task.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_learns_and_scores_what_torchmetrics_scores(tmp_path: Path) -> None:
    task = make_task(optimizer=adam)
    trainer = make_trainer(
        tmp_path, max_epochs=25, limit_val_batches=1.0, check_val_every_n_epoch=25
    )
    data = make_data()
    trainer.fit(task, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/accuracy"] > 0.9
    examples = list(Threes().examples("val"))
    found = task.classify([example.text for example in examples])
    given = torch.tensor([data.labels.index(labels[0][0]) for labels in found])
    labels = torch.tensor([data.labels.index(example.label) for example in examples])
    accuracy = multiclass_accuracy(given, labels, 3, average="micro")
    assert metrics["val/accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    f1 = multiclass_f1_score(given, labels, 3, average="macro")
    assert metrics["val/macro_f1"] == pytest.approx(float(f1), abs=1e-6)
    log_p = torch.tensor([[dict(row)[label] for label in data.labels] for row in found]).log()
    assert metrics["val/nll"] == pytest.approx(float(F.nll_loss(log_p, labels)), rel=1e-4)
    assert task.confusion["val"].counts.sum() == len(examples)
    trainer.test(task, data, verbose=False)
    assert float(trainer.callback_metrics["test/accuracy"]) > 0.9
    assert set(task.confusion) == {"val", "test"}


def test_mistakes_are_shown_first_and_few_are_kept(tmp_path: Path) -> None:
    task = make_task()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(task, make_data(eval_batch_tokens=60), verbose=False)
    rows = task.sample_rows(1000)
    n_val = len(list(Threes().examples("val")))
    assert len(rows) == n_val < 100
    assert list(rows[0]) == ["text", "label", "predicted", "probability"]
    right = [row["label"] == row["predicted"] for row in rows]
    assert right == sorted(right)
    wrong = [row["probability"] for row in rows if row["label"] != row["predicted"]]
    assert wrong == sorted(wrong, reverse=True)
    assert 0 < len(wrong) < n_val
    texts = [example.text for example in Threes().examples("val")]
    places = [texts.index(str(row["text"])) for row in rows[len(wrong) :]]
    assert places == sorted(places)
    label, probability = task.classify([str(rows[0]["text"])])[0][0]
    assert label == rows[0]["predicted"]
    assert probability == pytest.approx(rows[0]["probability"], abs=1e-4)
    assert task.sample_rows(2) == rows[:2]
    pairs = make_task()
    trainer.validate(pairs, make_data(Threes(pairs=True)), verbose=False)
    assert list(pairs.sample_rows(1)[0])[:2] == ["text", "second"]


def test_no_more_than_a_hundred_examples_are_held() -> None:
    task = make_task()
    data = ready(make_data(), task)
    for batch in data.evaluation_loader(data.train_store):
        task.validation_step(batch, 0)
        assert len(task.judged) <= 100
    assert len(task.judged) == 100


@pytest.mark.parametrize("pairs", [False, True])
def test_a_label_does_not_depend_on_its_batch(pairs: bool) -> None:
    task = make_task()
    ready(make_data(Threes(pairs=pairs)), task)
    examples = list(Threes(pairs=pairs).examples("val"))
    texts = [example.text for example in examples]
    seconds = [example.second or "" for example in examples] if pairs else None
    task.train()
    together = task.classify(texts, seconds)
    assert task.training
    crowded = task.classify(texts, seconds, batch_tokens=30)
    alone = [
        task.classify([text], None if seconds is None else [seconds[i]])[0]
        for i, text in enumerate(texts)
    ]
    for other in (crowded, alone):
        for one, two in zip(together, other, strict=True):
            assert [label for label, _ in one] == [label for label, _ in two]
            assert [p for _, p in one] == pytest.approx([p for _, p in two], rel=1e-5)
    for row in together:
        assert sum(p for _, p in row) == pytest.approx(1)
        assert sorted(row, key=lambda found: -found[1]) == row
        assert sorted(label for label, _ in row) == ["both", "neither", "one"]


def test_padding_moves_nothing() -> None:
    task = make_task().eval()
    data = ready(make_data(Threes(pairs=True)), task)
    batch = next(iter(data.val_dataloader()))
    wider = F.pad(batch.ids, (0, 5), value=PAD), F.pad(batch.segments, (0, 5))
    torch.testing.assert_close(
        task.network(*wider), task.network(batch.ids, batch.segments), rtol=1e-5, atol=1e-6
    )


def test_segments_tell_the_texts_of_a_pair_apart() -> None:
    task = make_task().eval()
    data = ready(make_data(Threes(pairs=True)), task)
    batch = data.example(4)
    inputs, [labels] = task.attention_inputs(batch)
    assert [tensor.tolist() for tensor in inputs] == [batch.ids.tolist(), batch.segments.tolist()]
    tokens, columns = labels["encoder.self"]
    assert tokens == columns
    assert tokens.count("</s>") == 2
    assert len(tokens) == batch.ids.shape[1]
    assert "".join(tokens[1:-1]).replace("▁", " ").split("</s>") == [
        f" {text}" for text in batch.texts[0]
    ]
    single = make_task()
    example = ready(make_data(), single).example(4)
    inputs, _ = single.attention_inputs(example)
    assert len(inputs) == 1
    batches = next(iter(data.val_dataloader()))
    shown = [len(row["encoder.self"][0]) for row in task.attention_inputs(batches)[1]]
    assert shown == (batches.ids != PAD).sum(1).tolist()


def test_a_text_longer_than_the_network_is_cut_and_told() -> None:
    task = make_task()
    ready(make_data(), task)
    cut: list[tuple[int, int]] = []
    texts = ["one two", " ".join(["three"] * 30), "four"]
    found = task.classify(texts, on_cut=lambda index, tokens: cut.append((index, tokens)))
    assert cut == [(1, 32)]
    assert found[1] == task.classify([" ".join(["three"] * 22)])[0]
    assert task.classify([]) == []


def test_texts_are_single_or_pairs_as_in_training() -> None:
    task = make_task()
    ready(make_data(), task)
    with pytest.raises(ValueError, match="trained on single texts: leave out seconds"):
        task.classify(["one"], ["two"])
    pairs = make_task()
    ready(make_data(Threes(pairs=True)), pairs)
    with pytest.raises(ValueError, match="trained on pairs: give seconds"):
        pairs.classify(["one"])
    with pytest.raises(ValueError, match="one has single texts and the other has pairs"):
        pairs.attach_labels(task.require_labels(), 1)


@pytest.mark.parametrize("steps", [4, 6])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    task, data = make_task(class_weights="balanced"), make_data(batch_tokens=600)
    make_trainer(tmp_path, max_steps=12).fit(task, data)
    assert len(data.train_dataloader()) == 6  # within and at the end of the first epoch
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_steps=steps + 1, callbacks=[saving]).fit(
        make_task(class_weights="balanced"), make_data(batch_tokens=600)
    )
    resumed = make_task(class_weights="balanced")
    make_trainer(tmp_path, max_steps=12).fit(
        resumed, make_data(batch_tokens=600), ckpt_path=tmp_path / "half.ckpt"
    )
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def settings(**changes: Any) -> dict[str, Any]:
    network = {
        "class_path": "tx_lightning.models.Classifier",
        "init_args": {
            "pooling": "mean",
            "encoder": {
                "class_path": "tx_lightning.models.TextEncoder",
                "init_args": {**ENCODER, "pre_norm": True},
            },
        },
    }
    arguments = {"vocab_size": 32, "n_classes": 3, "network": network, **changes}
    return {"class_path": "tx_lightning.tasks.Classification", "init_args": arguments}


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    task = make_task(class_weights="balanced")
    task.settings = settings(class_weights="balanced")
    trainer = make_trainer(tmp_path, max_steps=2)
    data = make_data()
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    assert read_checkpoint(tmp_path / "task.ckpt")["tx_lightning"]["labels"] == data.labels
    loaded = load_task(tmp_path / "task.ckpt")
    assert isinstance(loaded, Classification)
    assert loaded.labels == data.labels == ["both", "neither", "one"]
    texts = [example.text for example in Threes().examples("test")][:5]
    assert loaded.classify(texts) == task.classify(texts)
    # Balanced weights need no training split.
    counts = data.label_counts()
    assert loaded.class_weights is not None
    assert loaded.class_weights.tolist() == pytest.approx([sum(counts) / (3 * n) for n in counts])
    with pytest.raises(ValueError, match="differ from those of the checkpoint, 'both'.*'none'"):
        make_trainer(tmp_path, max_steps=3).fit(
            make_task(class_weights="balanced"),
            make_data(Threes(neither="none")),
            ckpt_path=tmp_path / "task.ckpt",
        )


def test_balanced_weights_average_to_one_over_the_examples() -> None:
    counts = [10, 70, 20]
    weights = balanced_weights(counts)
    assert float((weights * torch.tensor(counts)).sum()) == pytest.approx(sum(counts))
    assert weights.tolist() == pytest.approx([100 / 30, 100 / 210, 100 / 60])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 numbers, but there are 3 classes"),
        ({"class_weights": [1.0, -2.0, 1.0]}, r"class_weights=\[1.0, -2.0, 1.0\] must be numbers"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "not all of them 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must be"),
    ],
)
def test_refused_arguments(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_task(**changes)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="data.max_length is 25, but the network's max_length is 24"
    ):
        make_trainer(tmp_path).validate(make_task(), make_data(max_length=25))
    task = make_task()
    with pytest.raises(ValueError, match="the network has 3 classes, but there are 2 labels"):
        task.attach_labels(["a", "b"], 1)
    with pytest.raises(ValueError, match="has no labels yet"):
        task.classify(["one"])


def test_predictions_are_a_table_in_input_order(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    lines = ["three five", "one", "", "five five six seven eight nine"]
    file.write_text("".join(f"{line}\n" for line in lines))
    task, data = make_task(), make_data(predict_file=str(file), eval_batch_tokens=8)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter(tmp_path)])
    trainer.predict(task, data, return_predictions=False)
    found = [labels[0] for labels in task.classify(lines)]
    written = (tmp_path / "predictions" / "labels.tsv").read_text()
    assert written == "".join(f"{label}\t{p:.4f}\n" for label, p in found)
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["labels.tsv"]


def test_scores_are_the_same_to_the_digit_on_two_processes(tmp_path: Path) -> None:
    task = make_task()
    with patch.dict(os.environ, MASTER_PORT=str(free_port())):
        trainer = make_trainer(tmp_path, devices=2, strategy="ddp_spawn")
        trainer.test(task, make_data(eval_batch_tokens=64), verbose=False)
    two = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer = make_trainer(tmp_path)
    trainer.test(make_task(), make_data(eval_batch_tokens=64), verbose=False)
    one = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert (one["test/accuracy"], one["test/macro_f1"]) == (
        two["test/accuracy"],
        two["test/macro_f1"],
    )
    assert one["test/nll"] == pytest.approx(two["test/nll"], rel=1e-6)


def test_data_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="Classification needs ClassificationData, not Translation"
    ):
        make_trainer(tmp_path).validate(make_task(), translation_data())


class Buffers(Callback):
    """Whether the processes would send each other the buffers before a step."""

    sent: bool | None = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)
        assert list(wrapped.buffers())
        self.sent = wrapped.will_sync_module_buffers()


def test_buffers_are_not_sent_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = Buffers()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch sets one with the group
    # Lightning tells its other processes who they are, and so all others.
    with patch.dict(os.environ, MASTER_PORT=str(free_port())):
        trainer = make_trainer(
            tmp_path, max_steps=1, devices=1, strategy="ddp", callbacks=[buffers]
        )
        try:
            trainer.fit(make_task(class_weights=[3.0, 0.2, 1.0]), make_data())
        finally:
            torch.distributed.destroy_process_group()
    assert buffers.sent is False
