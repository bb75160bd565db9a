"""The language model's task: exact loss, exact scores, exact resume, all it logs."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from tests.tasks.test_translation import Gradients, SaveAt, make_trainer
from tx_lightning.checkpoints import load_task
from tx_lightning.data.language_modeling import LanguageModelingData
from tx_lightning.data.text_sources import GrammarText, TextSource
from tx_lightning.data.tokenizers import EOS, Words
from tx_lightning.decoding import Greedy
from tx_lightning.models import LanguageModel
from tx_lightning.tasks import LanguageModeling

BLOCK = 8


class Counting(TextSource):
    """Rhymes to learn by heart."""

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def texts(self, split: str) -> Iterator[str]:
        for i in range(60 if split == "train" else 9):
            yield " ".join("one two three four five six".split()[: 1 + (5 * i) % 6])

    def fingerprint(self, split: str) -> str:
        return f"rhymes-{split}"


def tiny_network(vocab_size: int) -> LanguageModel:
    return LanguageModel(
        vocab_size, d_model=16, n_heads=2, n_layers=2, context_length=BLOCK, dropout=0.1
    )


def make_task(**changed: Any) -> LanguageModeling:
    torch.manual_seed(3)
    return LanguageModeling(16, changed.pop("network", tiny_network), **changed)


def make_data(source: TextSource | None = None, **changed: Any) -> LanguageModelingData:
    arguments: dict[str, Any] = {"tokenizer": Words(), "block_length": BLOCK, "batch_tokens": 40}
    arguments["seed"] = 5
    size = 16 if source is None else 400
    return LanguageModelingData(source or Counting(), size, **(arguments | changed))


def no_dropout(vocab_size: int) -> LanguageModel:
    return LanguageModel(
        vocab_size, d_model=16, n_heads=2, n_layers=1, context_length=BLOCK, dropout=0.0
    )


def ready(task: LanguageModeling, data: LanguageModelingData) -> LanguageModelingData:
    data.prepare_data()
    data.setup()
    task.attach(data.tokenizers)
    return data


def test_loss_is_cross_entropy_over_predicted_tokens() -> None:
    task = make_task().eval()
    data = ready(task, make_data(sliding_stride=3))
    for batch in [*data.train_dataloader(), *data.test_dataloader()]:
        logits = task.network(batch.ids).flatten(0, 1)
        expected = F.cross_entropy(
            logits, batch.targets.flatten(), ignore_index=-1, reduction="sum"
        )
        sums = task(batch)
        torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums.nll, expected, rtol=1e-5, atol=1e-4)
        assert batch.predicted == int((batch.targets >= 0).sum())


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_give_the_update_of_the_whole_step(parts: int, tmp_path: Path) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        trainer = make_trainer(
            tmp_path, max_steps=5, accumulate_grad_batches=accumulate, callbacks=[recorded]
        )
        trainer.fit(make_task(network=no_dropout), make_data())
        return recorded.steps

    whole, split = gradients(1), gradients(parts)
    assert len(whole) == len(split) == 5
    first = torch.cat([g.flatten() for g in whole[0]])
    other = torch.cat([g.flatten() for g in split[0]])
    assert float((first - other).norm() / first.norm()) < 1e-6


@pytest.mark.parametrize("steps", [3, 7, 9])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    task, data = make_task(), make_data()
    make_trainer(tmp_path, max_steps=16).fit(task, data)
    assert len(data.train_dataloader()) == 7  # within, at the end of, and after the first epoch
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_steps=steps + 2, callbacks=[saving]).fit(make_task(), make_data())
    resumed = make_task()
    make_trainer(tmp_path, max_steps=16).fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def by_hand(task: LanguageModeling, stream: list[int], context: int) -> float:
    """The mean loss of a stream, each token predicted from up to `context` tokens before it."""
    task.eval()
    whole, total = [EOS, *stream], 0.0
    with torch.no_grad():
        for i, target in enumerate(stream):
            ids = torch.tensor([whole[max(0, i + 1 - context) : i + 1]])
            total -= float(task.network(ids)[0, -1].log_softmax(-1)[target])
    return total / len(stream)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_scores_are_those_of_every_token_once(tmp_path: Path) -> None:
    task, data = make_task(), make_data()
    trainer = make_trainer(tmp_path, max_steps=40, limit_val_batches=1.0)
    trainer.fit(task, data)
    trainer.validate(task, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    stream = data.val_store.stream("text").tolist()
    with torch.no_grad():
        blocks = [stream[i : i + BLOCK] for i in range(0, len(stream), BLOCK)]
        before = [EOS, *stream]
        total = 0.0
        for i, block in enumerate(blocks):
            ids = torch.tensor([before[i * BLOCK : i * BLOCK + len(block)]])
            loss = F.cross_entropy(
                task.eval().network(ids)[0], torch.tensor(block), reduction="sum"
            )
            total += float(loss)
    assert scores["val/loss"] == pytest.approx(total / len(stream), rel=1e-5)
    assert scores["val/perplexity"] == pytest.approx(math.exp(scores["val/loss"]), rel=1e-5)
    text = sum(len(text) for text in Counting().texts("val"))
    assert scores["val/bits_per_byte"] == pytest.approx(total / math.log(2) / text, rel=1e-5)
    assert "val/excess_nats" not in scores
    trainer.test(task, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    stream = data.test_store.stream("text").tolist()
    assert scores["test/sliding_loss"] == pytest.approx(by_hand(task, stream, BLOCK), rel=1e-5)
    assert scores["test/sliding_loss"] < scores["test/loss"]
    assert [row["prompt"] for row in task.sample_rows(1)]
    assert "test/sliding_bits_per_byte" in scores


def test_fit_may_follow_a_validation_and_samples_a_test_alone(tmp_path: Path) -> None:
    task = make_task()
    make_trainer(tmp_path, limit_val_batches=1.0).validate(task, make_data(), verbose=False)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(task, make_data())
    assert "val/loss" in trainer.callback_metrics
    other = make_task()
    make_trainer(tmp_path).test(other, make_data(), verbose=False)  # opens no validation split
    assert other.sample_rows(2)


def test_excess_is_what_lies_above_the_optimum(tmp_path: Path) -> None:
    source = GrammarText(n_train=30, n_val=9, n_test=9)
    data = make_data(source, sliding_stride=None)
    torch.manual_seed(0)
    task = LanguageModeling(400, tiny_network)
    trainer = make_trainer(tmp_path)
    trainer.test(task, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    optimum = source.optimum_log_loss("test")
    assert optimum is not None
    tokens = data.test_store.tokens["text"]
    assert scores["test/excess_nats"] == pytest.approx(scores["test/loss"] - optimum / tokens)
    assert scores["test/excess_nats"] > 0
    assert not any(name.startswith("test/sliding") for name in scores)


def test_learns_and_continues(tmp_path: Path) -> None:
    task = make_task(
        network=no_dropout,
        decoding=Greedy(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    trainer = make_trainer(tmp_path, max_epochs=30, limit_val_batches=1.0)
    trainer.fit(task, make_data())
    assert float(trainer.callback_metrics["val/loss"]) < 1.2
    rows = task.sample_rows(3)
    assert [list(row) for row in rows] == [["prompt", "continuation", "reference"]] * 3
    assert all(row["prompt"] and row["continuation"] for row in rows)


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    task = make_task()
    network = {"d_model": 16, "n_heads": 2, "n_layers": 2, "context_length": BLOCK}
    task.settings = {
        "class_path": "tx_lightning.tasks.LanguageModeling",
        "init_args": {
            "vocab_size": 16,
            "network": {"class_path": "tx_lightning.models.LanguageModel", "init_args": network},
        },
    }
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    loaded = load_task(tmp_path / "task.ckpt")
    assert isinstance(loaded, LanguageModeling)
    ids = torch.randint(4, 10, (2, BLOCK))
    torch.testing.assert_close(loaded.network(ids), task.eval().network(ids), rtol=0, atol=0)
    assert loaded.tokenizer.sha256 == task.tokenizer.sha256


def test_blocks_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="block_length is 9, but the network's context_length is 8"
    ):
        make_trainer(tmp_path, max_steps=1).fit(make_task(), make_data(block_length=9))


def test_attention_inputs_label_every_token() -> None:
    task = make_task()
    data = ready(task, make_data())
    (ids,), [labels] = task.attention_inputs(data.example(0))
    rows, columns = labels["self"]
    assert rows == columns
    assert rows[0] == "</s>"
    assert len(rows) == ids.shape[1]


def test_two_processes_see_what_one_sees() -> None:
    """Shards of the evaluation add up to the same sums."""
    task = make_task().eval()
    data = ready(task, make_data())

    class Place:
        world_size, accumulate_grad_batches, overfit_batches = 2, 1, 0
        strategy = Trainer(accelerator="cpu", logger=False).strategy

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    with torch.no_grad():
        whole = sum(float(task(batch).nll) for batch in data.val_dataloader())
        shards = []
        for rank in range(2):
            data.trainer = Place(rank)  # type: ignore[assignment]
            shards += [float(task(batch).nll) for batch in data.val_dataloader()]
    assert sum(shards) == pytest.approx(whole, rel=1e-6)
    assert len(shards) > 1
