"""The task of masked language modelling against sums by hand: loss, scores, resume, samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.data.test_masked_language_modeling_data import NAMES, Documents, V, documents
from tests.data.test_masking import word_pieces
from tests.tasks.test_translation import Gradients, SaveAt, make_trainer
from tx_lightning.checkpoints import load_task
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.masked_language_modeling import MaskedLanguageModelingData
from tx_lightning.data.masking import Masking
from tx_lightning.data.tokenizers import PAD, Tokenizers, Words
from tx_lightning.models import MaskedLanguageModel, TextEncoder
from tx_lightning.nn.dropout import Dropout
from tx_lightning.tasks import MaskedLanguageModeling
from tx_lightning.tasks.guesses import best_tokens, marked_text

MAX = 12


def tiny_encoder(vocab_size: int) -> TextEncoder:
    return TextEncoder(vocab_size, d_model=16, n_heads=2, n_layers=1, d_ff=32, max_length=MAX)


def tiny_network(vocab_size: int) -> MaskedLanguageModel:
    return MaskedLanguageModel(vocab_size, encoder=tiny_encoder)


def make_task(**changes: Any) -> MaskedLanguageModeling:
    torch.manual_seed(3)
    return MaskedLanguageModeling(V, tiny_network, **changes)


def make_data(masking: Masking | None = None, **changes: Any) -> MaskedLanguageModelingData:
    arguments = {"batch_tokens": 200, "max_length": MAX, "seed": 5, **changes}
    return MaskedLanguageModelingData(
        documents(), V, tokenizer=Words(), masking=masking or Masking(rate=0.3), **arguments
    )


def ready(data: MaskedLanguageModelingData) -> MaskedLanguageModelingData:
    data.prepare_data()
    data.setup()
    return data


def without_dropout(task: MaskedLanguageModeling) -> MaskedLanguageModeling:
    for module in task.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return task


def test_loss_is_cross_entropy_over_the_hidden_tokens() -> None:
    data, task = ready(make_data()), make_task().eval()
    batch = next(iter(data.train_dataloader()))
    torch.nn.init.normal_(task.network.output_bias)
    logits = task.network(batch.ids).flatten(0, 1)
    expected = F.cross_entropy(
        logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    sums = task(batch)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.nll, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_give_the_update_of_the_whole_step(
    parts: int, whole_words: bool, tmp_path: Path
) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        trainer = make_trainer(
            tmp_path, max_steps=3, accumulate_grad_batches=accumulate, callbacks=[recorded]
        )
        masking = Masking(rate=0.3, whole_words=whole_words)
        trainer.fit(without_dropout(make_task()), make_data(masking))
        return recorded.steps

    whole, split = gradients(1), gradients(parts)
    assert len(whole) == len(split) == 3
    first = torch.cat([g.flatten() for g in whole[0]])
    other = torch.cat([g.flatten() for g in split[0]])
    assert float((first - other).norm() / first.norm()) < 1e-6


@pytest.mark.parametrize("steps", [5, 11, 14])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    task, data = make_task(), make_data()
    make_trainer(tmp_path, max_steps=18).fit(task, data)
    assert len(data.train_dataloader()) == 11  # within, at the end of, and after the first epoch
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_steps=steps + 2, callbacks=[saving]).fit(make_task(), make_data())
    resumed = make_task()
    make_trainer(tmp_path, max_steps=18).fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", ["val", "test"])
def test_scores_are_those_of_all_hidden_tokens(split: str, tmp_path: Path) -> None:
    data, task = make_data(eval_batch_tokens=60), make_task()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    evaluate = trainer.validate if split == "val" else trainer.test
    [metrics] = evaluate(task, data, verbose=False)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    nll, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader:
            real = batch.targets != IGNORED
            logits, targets = task.eval().network(batch.ids)[real], batch.targets[real]
            nll += float(F.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits[:, : V - 1].argmax(-1) == targets).sum())
            count += len(targets)
    assert len(loader) >= 2
    assert metrics.keys() == {f"{split}/{n}" for n in ("loss", "nll", "perplexity", "accuracy")}
    assert metrics[f"{split}/loss"] == metrics[f"{split}/nll"] == pytest.approx(nll / count)
    assert metrics[f"{split}/accuracy"] == pytest.approx(right / count, abs=1e-12)
    perplexity = torch.tensor(nll / count).exp().item()
    assert metrics[f"{split}/perplexity"] == pytest.approx(perplexity, rel=1e-5)
    rows = task.sample_rows(3)
    store = data.val_store if split == "val" else data.test_store
    first = data.segments(store)[0].tolist()
    assert rows[0]["reference"] == data.tokenizers.source.decode_batch([first])[0]


def repeating(first: int, last: int) -> list[str]:
    """Texts of one word each, again and again."""
    return [" ".join([NAMES[i % 10]] * (5 + i % 4)) for i in range(first, last)]


def test_learns(tmp_path: Path) -> None:
    source = Documents(train=repeating(0, 400), val=repeating(400, 440))
    data = MaskedLanguageModelingData(
        source, V, tokenizer=Words(), masking=Masking(0.3), batch_tokens=250, max_length=MAX
    )
    task = without_dropout(
        make_task(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
    )
    trainer = make_trainer(
        tmp_path, max_epochs=20, limit_val_batches=1.0, check_val_every_n_epoch=20
    )
    trainer.fit(task, data)
    nll, accuracy = (float(trainer.callback_metrics[f"val/{n}"]) for n in ("nll", "accuracy"))
    assert nll < 0.8  # before training ln 15, which is 2.7
    assert accuracy > 0.7


def test_samples_show_what_was_hidden_and_guessed(tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    make_trainer(tmp_path, limit_val_batches=1.0).validate(task, data, verbose=False)
    task.train()
    rows = task.sample_rows(4)
    assert task.network.training
    assert len(rows) == 4
    tokenizer = data.tokenizers.source
    for index, row in enumerate(rows):
        reference = str(row["reference"]).split()
        assert list(row) == ["masked", "guesses", "reference"]
        segment = data.segments(data.val_store)[index].tolist()
        assert tokenizer.encode_batch([str(row["reference"])]) == [segment]
        targets = data.example(index).targets[0, 1:-1].tolist()
        masked, guesses = str(row["masked"]).split(), str(row["guesses"]).split()
        for word, mask, guess, target in zip(reference, masked, guesses, targets, strict=True):
            assert mask == (word if target == IGNORED else "<mask>")
            assert guess == word or (target != IGNORED and guess[0] + guess[-1] == "[]")
    assert len(task.sample_rows(1000)) == data.n_examples


def test_marks_keep_the_spaces_of_the_text() -> None:
    tokenizer = word_pieces()
    [ids] = tokenizer.encode_batch(["unable boats!"])
    assert marked_text(tokenizer, ids, {}) == "unable boats !"
    assert marked_text(tokenizer, ids, {1: "<mask>", 2: "<mask>"}) == "un<mask> <mask>s !"
    words = ready(make_data()).tokenizers.source
    [ids] = words.encode_batch(["one two three"])
    assert marked_text(words, ids, {0: "<mask>"}) == "<mask> two three"
    assert marked_text(words, [*ids, 99], {3: "<0>"}) == "one two three <0>"


def test_the_best_tokens_do_not_depend_on_how_many_logits_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, bias = torch.randn(50, 8), torch.randn(30, 8), torch.randn(30)
    expected = (hidden @ weight.T + bias).argmax(-1)
    assert torch.equal(best_tokens(hidden, weight, bias), expected)
    monkeypatch.setattr("tx_lightning.tasks.guesses._LOGITS", 90)
    assert torch.equal(best_tokens(hidden, weight, bias), expected)
    assert best_tokens(hidden[:0], weight, None).shape == (0,)


def test_attention_inputs_label_every_real_token() -> None:
    data, task = ready(make_data(Masking(mask_share=1.0, random_share=0.0))), make_task()
    task.attach(data.tokenizers)
    batch = next(iter(data.val_dataloader()))
    (ids,), labels = task.attention_inputs(batch)
    assert len(labels) == batch.rows == len(ids)
    for row, label in zip(ids, labels, strict=True):
        tokens, columns = label["encoder.self"]
        assert tokens == columns
        assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
        assert len(tokens) == int((row != PAD).sum())
        assert tokens.count("<mask>") == int((row == V - 1).sum()) >= 1


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    task = make_task()
    task.settings = {
        "class_path": "tx_lightning.tasks.MaskedLanguageModeling",
        "init_args": {
            "vocab_size": V,
            "network": {
                "class_path": "tx_lightning.models.MaskedLanguageModel",
                "init_args": {
                    "encoder": {
                        "class_path": "tx_lightning.models.TextEncoder",
                        "init_args": {
                            "d_model": 16,
                            "n_heads": 2,
                            "n_layers": 1,
                            "d_ff": 32,
                            "max_length": MAX,
                        },
                    }
                },
            },
        },
    }
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    loaded = load_task(tmp_path / "task.ckpt")
    batch = next(iter(ready(make_data()).val_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded(batch).loss, task.eval()(batch).loss)


def test_rows_longer_than_the_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.max_length is 13, but the encoder's max_length is"):
        make_trainer(tmp_path, max_steps=1).fit(make_task(), make_data(max_length=MAX + 1))


def test_a_tokenizer_that_pads_with_another_id_is_refused() -> None:
    task = make_task()
    task.network.encoder.pad_id = 1
    with pytest.raises(ValueError, match="pad_id is 1, but the tokenizer pads with 0"):
        task.attach(Tokenizers.one(word_pieces()))
