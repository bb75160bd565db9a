"""The task of denoising against sums by hand: loss, scores, resume, samples, a start for others."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.data.test_denoising import NOISES, V
from tests.data.test_masked_language_modeling_data import Documents, counting, documents
from tests.data.test_masking import word_pieces
from tests.tasks.test_translation import (
    Gradients,
    SaveAt,
    make_trainer,
    short_network,
    tiny_network,
)
from tx_lightning.data.denoising import DenoisingData, Noise
from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import PAD, Tokenizers, Words
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import LearnedPositions
from tx_lightning.nn.dropout import Dropout
from tx_lightning.tasks import Denoising, Translation

T5 = NOISES[0]


def make_task(**changes: Any) -> Denoising:
    torch.manual_seed(3)
    return Denoising(V, tiny_network, **changes)


def make_data(noise: Noise = T5, **changes: Any) -> DenoisingData:
    arguments = {"batch_tokens": 200, "max_length": 12, "seed": 5, **changes}
    return DenoisingData(documents(), V, tokenizer=Words(), noise=noise, **arguments)


def ready(data: DenoisingData) -> DenoisingData:
    data.prepare_data()
    data.setup()
    return data


def test_loss_is_cross_entropy_over_the_target() -> None:
    data, task = ready(make_data()), make_task().eval()
    batch = next(iter(data.train_dataloader()))
    logits = task.network(batch.source, batch.target[:, :-1]).flatten(0, 1)
    labels = batch.target[:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, ignore_index=PAD, reduction="sum")
    sums = task(batch)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.nll, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_give_the_update_of_the_whole_step(
    parts: int, noise: Noise, tmp_path: Path
) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        task = make_task()
        for module in task.modules():
            if isinstance(module, Dropout):
                module.p = 0.0
        trainer = make_trainer(
            tmp_path, max_steps=3, accumulate_grad_batches=accumulate, callbacks=[recorded]
        )
        trainer.fit(task, make_data(noise))
        return recorded.steps

    whole, split = gradients(1), gradients(parts)
    assert len(whole) == len(split) == 3
    first = torch.cat([g.flatten() for g in whole[0]])
    other = torch.cat([g.flatten() for g in split[0]])
    assert float((first - other).norm() / first.norm()) < 1e-6


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("steps", [5, 14])
def test_resume_is_bitwise(steps: int, noise: Noise, tmp_path: Path) -> None:
    task = make_task()
    make_trainer(tmp_path, max_steps=18).fit(task, make_data(noise))
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    trainer = make_trainer(tmp_path, max_steps=steps + 2, callbacks=[saving])
    trainer.fit(make_task(), make_data(noise))
    resumed = make_task()
    trainer = make_trainer(tmp_path, max_steps=18)
    trainer.fit(resumed, make_data(noise), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", ["val", "test"])
def test_scores_are_those_of_all_target_tokens(split: str, tmp_path: Path) -> None:
    data, task = make_data(eval_batch_tokens=60), make_task()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    evaluate = trainer.validate if split == "val" else trainer.test
    [metrics] = evaluate(task, data, verbose=False)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    nll, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader:
            labels = batch.target[:, 1:]
            logits = task.eval().network(batch.source, batch.target[:, :-1])[labels != PAD]
            labels = labels[labels != PAD]
            nll += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    assert len(loader) >= 2
    assert metrics.keys() == {f"{split}/{n}" for n in ("loss", "nll", "perplexity", "accuracy")}
    assert metrics[f"{split}/loss"] == metrics[f"{split}/nll"] == pytest.approx(nll / count)
    assert metrics[f"{split}/accuracy"] == pytest.approx(right / count, abs=1e-12)
    perplexity = torch.tensor(nll / count).exp().item()
    assert metrics[f"{split}/perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert len(task.sample_rows(2)) == 2


@pytest.mark.parametrize("noise", NOISES)
def test_learns(noise: Noise, tmp_path: Path) -> None:
    source = Documents(train=counting(0, 400), val=counting(400, 440))
    data = DenoisingData(source, V, tokenizer=Words(), noise=noise, batch_tokens=500, max_length=12)
    task = make_task(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    trainer = make_trainer(
        tmp_path, max_epochs=20, limit_val_batches=1.0, check_val_every_n_epoch=20
    )
    trainer.fit(task, data)
    nll, accuracy = (float(trainer.callback_metrics[f"val/{n}"]) for n in ("nll", "accuracy"))
    assert nll < 0.8  # before training about ln 34, which is 3.5
    assert accuracy > 0.75


def test_samples_show_sentinels(tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    make_trainer(tmp_path, limit_val_batches=1.0).validate(task, data, verbose=False)
    task.train()
    rows = task.sample_rows(4)
    assert task.network.training
    assert len(rows) == 4
    for index, row in enumerate(rows):
        assert list(row) == ["corrupted", "output", "reference"]
        parts = {}
        for part in f" {row['reference']}".split(" <")[1:]:
            number, _, text = part.partition(">")
            parts[f"<{number}>"] = text.strip()
        words = " ".join(parts.get(word, word) for word in str(row["corrupted"]).split())
        segment = data.segments(data.val_store)[index].tolist()
        assert [words] == data.tokenizers.source.decode_batch([segment])
        assert parts[f"<{len(parts) - 1}>"] == ""


def test_samples_are_no_longer_than_the_positions(tmp_path: Path) -> None:
    def short(vocab_size: int) -> EncoderDecoder:
        positions = partial(LearnedPositions, max_length=13)
        return EncoderDecoder(
            vocab_size,
            d_model=16,
            n_heads=2,
            n_encoder_layers=1,
            n_decoder_layers=1,
            d_ff=32,
            positions=positions,
        )

    torch.manual_seed(3)
    task = Denoising(V, short)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=None, val_check_interval=1)
    trainer.fit(task, datamodule=make_data())
    rows = task.sample_rows(4)
    assert len(rows) == 4
    assert all(set(row) == {"corrupted", "output", "reference"} for row in rows)


def test_attention_inputs_label_every_real_token() -> None:
    data, task = ready(make_data()), make_task()
    task.attach(data.tokenizers)
    batch = next(iter(data.val_dataloader()))
    (source, target), labels = task.attention_inputs(batch)
    assert source.shape[0] == target.shape[0] == len(labels) == batch.rows
    for row, label in enumerate(labels):
        queries, keys = label["cross"]
        assert label["encoder.self"] == (keys, keys)
        assert label["decoder.self"] == (queries, queries)
        assert len(keys) == int((source[row] != PAD).sum())
        assert len(queries) == int((target[row] != PAD).sum())
        assert queries[0] == "<s>"
        assert "<0>" in queries


def test_a_translation_can_start_from_it() -> None:
    task = make_task()
    translation = Translation(V, tiny_network)
    assert list(translation.state_dict()) == list(task.state_dict())
    translation.load_state_dict(task.state_dict())
    for one, other in zip(translation.parameters(), task.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_tokenizer_that_pads_with_another_id_is_refused() -> None:
    task = make_task()
    task.network.pad_id = 1
    with pytest.raises(ValueError, match="pad_id is 1, but the tokenizer pads with 0"):
        task.attach(Tokenizers.one(word_pieces()))


@pytest.mark.parametrize("noise", NOISES)
def test_rows_beyond_the_positions_are_refused_before_anything_runs(
    noise: Noise, tmp_path: Path
) -> None:
    data = ready(make_data(noise))
    whole = np.arange(1, 12 - 2 + 1)
    longest = {
        "encoder": int(noise.source_lengths(whole).max()),
        "decoder": int(noise.target_lengths(whole).max()),
    }
    for side, tokens in longest.items():
        trainer = make_trainer(tmp_path, max_steps=1)
        with pytest.raises(DataError, match=f"data.max_length is 12, .*{tokens} tokens, more than"):
            trainer.fit(Denoising(V, short_network(**{side: tokens})), datamodule=data)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(Denoising(V, short_network(**{side: tokens + 1})), datamodule=data)
