"""The tagging task against hand-made sums: exact loss, exact resume, a tag for every word."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from tests.tasks.test_classification import ENCODER, adam
from tests.tasks.test_translation import Gradients, SaveAt, make_trainer
from tx_lightning.callbacks.predictions import PredictionWriter
from tx_lightning.checkpoints import load_task
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.tagged_sources import TaggedSentence, TaggedSource
from tx_lightning.data.tagging import TaggingData
from tx_lightning.data.tokenizers import PAD, Characters
from tx_lightning.models import Tagger, TextEncoder
from tx_lightning.nn.dropout import Dropout
from tx_lightning.tasks import Tagging


class Neighbours(TaggedSource):
    """Numbers: the tag of each says whether the one before it ends in the same digit."""

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        numbers = {"train": range(0, 3000, 9), "val": range(1, 300, 9), "test": range(2, 300, 9)}
        for number in numbers[split]:
            words = [
                str(1 + number * k % 17 % (3 + 20 * (k % 2))) for k in range(1, 3 + number % 5)
            ]
            ends = ["", *(word[-1] for word in words[:-1])]
            tags = [
                "first" if not end else "same" if word[-1] == end else "other"
                for word, end in zip(words, ends, strict=True)
            ]
            yield TaggedSentence(words, tags, f"{split}, line {number}")

    def fingerprint(self, split: str) -> str:
        return f"neighbours-{split}"


def tiny_network(vocab_size: int, n_tags: int) -> Tagger:
    def encoder(vocab_size: int) -> TextEncoder:
        return TextEncoder(vocab_size, **ENCODER, dropout=0.1, pre_norm=True)  # type: ignore[arg-type]

    return Tagger(vocab_size, n_tags, encoder=encoder)


def make_task(**changes: Any) -> Tagging:
    torch.manual_seed(3)
    return Tagging(20, 3, tiny_network, **changes)


def make_data(**changes: Any) -> TaggingData:
    arguments = {"tokenizer": Characters(), "batch_tokens": 150, "max_length": 24, "seed": 5}
    return TaggingData(Neighbours(), 20, 3, **(arguments | changes))  # type: ignore[arg-type]


def ready(data: TaggingData, task: Tagging) -> TaggingData:
    data.prepare_data()
    data.setup()
    task.attach(data.tokenizers)
    task.attach_labels(data.labels, 1)
    return data


def test_loss_is_cross_entropy_over_words() -> None:
    task = make_task(label_smoothing=0.1).eval()
    batch = next(iter(ready(make_data(), task).train_dataloader()))
    real = batch.labels != IGNORED
    logits, labels = task.network(batch.ids)[real], batch.labels[real]
    sums = task(batch)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(sums.nll, F.cross_entropy(logits, labels, reduction="sum"))
    assert batch.labelled == len(labels)


@pytest.mark.parametrize("parts", [2, 30])
def test_accumulated_parts_give_the_update_of_the_whole_step(parts: int, tmp_path: Path) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        task = make_task()
        for module in task.modules():
            if isinstance(module, Dropout):
                module.p = 0.0
        trainer = make_trainer(
            tmp_path, max_steps=4, accumulate_grad_batches=accumulate, callbacks=[recorded]
        )
        trainer.fit(task, make_data())
        return recorded.steps

    whole, split = gradients(1), gradients(parts)
    assert len(whole) == len(split) == 4
    first = torch.cat([g.flatten() for g in whole[0]])
    other = torch.cat([g.flatten() for g in split[0]])
    assert float((first - other).norm() / first.norm()) < 1e-6


def test_learns_and_scores_words(tmp_path: Path) -> None:
    task = make_task(optimizer=adam)
    trainer = make_trainer(
        tmp_path, max_epochs=12, limit_val_batches=1.0, check_val_every_n_epoch=12
    )
    data = make_data()
    trainer.fit(task, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/accuracy"] > 0.9
    sentences = list(Neighbours().sentences("val"))
    found = task.tag([sentence.words for sentence in sentences])
    given = torch.tensor([data.labels.index(tag) for tags in found for tag in tags])
    labels = torch.tensor([data.labels.index(tag) for s in sentences for tag in s.tags])
    assert metrics["val/accuracy"] == float((given == labels).double().mean())
    f1 = multiclass_f1_score(given, labels, 3, average="macro")
    assert metrics["val/macro_f1"] == pytest.approx(float(f1), abs=1e-6)
    assert int(task.confusion["val"].counts.sum()) == len(labels)
    rows = task.sample_rows(1000)
    wrong = [int(row["wrong"]) for row in rows]
    assert wrong == sorted(wrong, reverse=True)
    assert sum(wrong) == int((given != labels).sum())
    index = [" ".join(s.words) for s in sentences].index(str(rows[0]["text"]))
    assert rows[0]["tags"] == " ".join(sentences[index].tags)
    assert rows[0]["predicted"] == " ".join(found[index])


def test_tags_do_not_depend_on_the_batch() -> None:
    task = make_task()
    ready(make_data(), task)
    sentences = [sentence.words for sentence in Neighbours().sentences("val")]
    task.train()
    together = task.tag(sentences)
    assert task.training
    assert task.tag(sentences, batch_tokens=20) == together
    assert [task.tag([words])[0] for words in sentences] == together
    assert task.tag([[], ["1"], []]) == [[], task.tag([["1"]])[0], []]


def test_padding_moves_nothing() -> None:
    task = make_task().eval()
    batch = next(iter(ready(make_data(), task).val_dataloader()))
    wider = task.network(F.pad(batch.ids, (0, 3), value=PAD))[:, :-3]
    real = batch.ids != PAD
    torch.testing.assert_close(wider[real], task.network(batch.ids)[real], rtol=1e-5, atol=1e-6)


def test_a_long_sentence_is_tagged_in_parts_between_words() -> None:
    task = make_task()
    ready(make_data(), task)  # room for 22 tokens, one a character
    words = ["1" * 10, "2" * 10, "3" * 5, "4" * 30, "5"]
    long: list[tuple[int, int]] = []
    found = task.tag([["1"], words], on_long=lambda index, tokens: long.append((index, tokens)))
    assert long == [(1, 58)]
    parts = task.tag([words[:2], words[2:3], ["4" * 22], words[4:]])
    assert found[1] == [tag for tags in parts for tag in tags]
    assert len(found[1]) == len(words)


@pytest.mark.parametrize("steps", [2, 4])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    task, data = make_task(), make_data(batch_tokens=900)
    make_trainer(tmp_path, max_steps=8).fit(task, data)
    assert len(data.train_dataloader()) == 4
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_steps=steps + 1, callbacks=[saving]).fit(
        make_task(), make_data(batch_tokens=900)
    )
    resumed = make_task()
    make_trainer(tmp_path, max_steps=8).fit(
        resumed, make_data(batch_tokens=900), ckpt_path=tmp_path / "half.ckpt"
    )
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def settings() -> dict[str, Any]:
    encoder = {
        "class_path": "tx_lightning.models.TextEncoder",
        "init_args": {**ENCODER, "pre_norm": True},
    }
    network = {"class_path": "tx_lightning.models.Tagger", "init_args": {"encoder": encoder}}
    arguments = {"vocab_size": 20, "n_tags": 3, "network": network}
    return {"class_path": "tx_lightning.tasks.Tagging", "init_args": arguments}


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    task = make_task()
    task.settings = settings()
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    loaded = load_task(tmp_path / "task.ckpt")
    assert isinstance(loaded, Tagging)
    assert loaded.labels == ["first", "other", "same"]
    sentences = [sentence.words for sentence in Neighbours().sentences("test")]
    assert loaded.tag(sentences) == task.tag(sentences)


def test_predictions_have_a_tag_for_every_word_in_input_order(tmp_path: Path) -> None:
    lines = ["1 11 2", "", " ".join(["12"] * 30), "5"]
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"{line}\n" for line in lines))
    task, data = make_task(), make_data(predict_file=str(file))
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter(tmp_path)])
    trainer.predict(task, data, return_predictions=False)
    found = task.tag([line.split() for line in lines])
    assert [len(tags) for tags in found] == [3, 0, 30, 1]
    written = (tmp_path / "predictions" / "tags.tsv").read_text()
    assert written == "".join("\t".join(tags) + "\n" for tags in found)


def test_attention_inputs_label_every_real_token() -> None:
    task = make_task()
    batch = next(iter(ready(make_data(), task).val_dataloader()))
    (ids,), labels = task.attention_inputs(batch)
    assert ids is batch.ids
    for row, of_row in zip(ids, labels, strict=True):
        rows, columns = of_row["encoder.self"]
        assert rows == columns
        assert len(rows) == int((row != PAD).sum())
        assert (rows[0], rows[-1]) == ("<s>", "</s>")


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="data.max_length is 30, but the network's max_length is 24"
    ):
        make_trainer(tmp_path).validate(make_task(), make_data(max_length=30))
