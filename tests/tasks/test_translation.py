"""The translation task against hand-made sums: exact loss, exact resume, files."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tx_lightning.checkpoints import load_task
from tx_lightning.data.errors import DataError
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.tokenizers import PAD, Words
from tx_lightning.data.translation import TranslationData
from tx_lightning.decoding import Beam, Greedy, Sampling
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import LearnedPositions, NoPositions
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.positions import Positions
from tx_lightning.tasks import Translation
from tx_lightning.tasks.translation import Sample, TextTooLong

NUMBERS = "null eins zwei drei vier fünf sechs sieben acht neun".split()
DIGITS = "zero one two three four five six seven eight nine".split()


class Counting(ParallelSource):
    """Digits of a number, in German and in English: ragged, small, learnable."""

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        numbers = {"train": range(0, 3000, 7), "val": range(1, 300, 9), "test": range(2, 300, 9)}
        for number in numbers[split]:
            digits = [int(digit) for digit in str(number * 37)]
            yield " ".join(NUMBERS[d] for d in digits), " ".join(DIGITS[d] for d in digits)

    def fingerprint(self, split: str) -> str:
        return f"counting-{split}"


def tiny_network(vocab_size: int) -> EncoderDecoder:
    return EncoderDecoder(
        vocab_size,
        d_model=16,
        n_heads=2,
        n_encoder_layers=1,
        n_decoder_layers=1,
        d_ff=32,
        dropout=0.1,
    )


def make_task(network: object = tiny_network, **changes: object) -> Translation:
    torch.manual_seed(3)
    return Translation(32, network, **changes)  # type: ignore[arg-type]


def make_data(batch_tokens: int = 200) -> TranslationData:
    return TranslationData(Counting(), 32, tokenizer=Words(), batch_tokens=batch_tokens, seed=5)


def make_trainer(folder: Path, **changes: object) -> Trainer:
    settings: dict[str, object] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**(settings | changes))  # type: ignore[arg-type]


class Gradients(Callback):
    """Keeps the gradients of each optimizer step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            grads = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
            self.steps.append(grads)


class SaveAt(Callback):
    """Saves a checkpoint in the middle of a run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_loss_is_cross_entropy_over_real_tokens(tmp_path: Path) -> None:
    data, task = make_data(), make_task(label_smoothing=0.1).eval()
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    logits = task.network(batch.source, batch.target[:, :-1]).flatten(0, 1)
    labels = batch.target[:, 1:].flatten()
    options = {"ignore_index": PAD, "reduction": "sum"}
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, **options)  # type: ignore[arg-type]
    nll = F.cross_entropy(logits, labels, **options)  # type: ignore[arg-type]
    sums = task(batch)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.nll, nll, rtol=1e-5, atol=1e-4)
    assert batch.target_tokens == int((labels != PAD).sum())


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_give_the_update_of_the_whole_step(parts: int, tmp_path: Path) -> None:
    def gradients(accumulate: int) -> list[list[Tensor]]:
        recorded = Gradients()
        task = make_task()
        for module in task.modules():
            if isinstance(module, Dropout):
                module.p = 0.0
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


def test_learns_and_scores_like_sacrebleu(tmp_path: Path) -> None:
    task = make_task(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2), label_smoothing=0.0
    )
    trainer = make_trainer(
        tmp_path, max_epochs=30, limit_val_batches=1.0, check_val_every_n_epoch=30
    )
    data = make_data()
    trainer.fit(task, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/bleu"] > 60
    assert [sample.index for sample in task.samples] == list(range(len(data.val_store)))
    hypotheses = [sample.hypothesis for sample in task.samples]
    references = [target for _, target in Counting().pairs("val")]
    assert [sample.reference for sample in task.samples] == references
    expected = sacrebleu.corpus_bleu(hypotheses, [references], force=True).score
    assert metrics["val/bleu"] == pytest.approx(expected, abs=1e-4)
    expected = sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert metrics["val/chrf"] == pytest.approx(expected, abs=1e-4)
    assert metrics["val/perplexity"] == pytest.approx(
        torch.tensor(metrics["val/nll"]).exp().item(), rel=1e-5
    )
    with torch.no_grad():
        task.eval()
        sums = [(task(b), b.target_tokens) for b in data.val_dataloader()]
    nll = sum(float(s.nll) for s, _ in sums) / sum(n for _, n in sums)
    assert metrics["val/nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("decoding", [Greedy(), Beam(beam_size=3), Sampling(seed=1)])
def test_a_translation_does_not_depend_on_its_batch(decoding: object, tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    texts = [source for source, _ in Counting().pairs("test")][:12]
    together = task.translate(texts, decoding)  # type: ignore[arg-type]
    crowded = task.translate(texts, decoding, batch_tokens=20)  # type: ignore[arg-type]
    assert [best[0].tokens for best in together] == [best[0].tokens for best in crowded]
    if not isinstance(decoding, Sampling):  # whose draws belong to a place in the input
        alone = [task.translate([text], decoding)[0] for text in texts]  # type: ignore[arg-type]
        backwards = task.translate(texts[::-1], decoding)[::-1]  # type: ignore[arg-type]
        for other in (alone, backwards):
            assert [best[0].tokens for best in together] == [best[0].tokens for best in other]


def test_what_is_sampled_does_not_depend_on_how_the_input_is_cut() -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    texts = [source for source, _ in Counting().pairs("test")][:6] * 2
    whole = task.translate(texts, Sampling(seed=1))
    assert whole[:6] != whole[6:]
    halves = task.translate(texts[:6], Sampling(seed=1))
    halves += task.translate(texts[6:], Sampling(seed=1), first_index=6)
    assert [best[0].tokens for best in whole] == [best[0].tokens for best in halves]


def test_translate_keeps_order_and_empty_lines(tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    task.train()
    results = task.translate(["eins", "", "zwei drei", "   "])
    assert [len(result) for result in results] == [1, 1, 1, 1]
    assert results[1][0].text == results[3][0].text == ""
    alone = task.translate(["eins"])[0]
    assert results[0][0].tokens == alone[0].tokens
    assert results[0][0].score == pytest.approx(alone[0].score, rel=1e-5)
    assert task.training


def test_dropout_is_a_function_of_the_place_in_the_run(tmp_path: Path) -> None:
    def weights(global_seed: int) -> list[Tensor]:
        task = make_task()
        torch.manual_seed(global_seed)
        make_trainer(tmp_path, max_steps=4).fit(task, make_data())
        return [p.detach().clone() for p in task.parameters()]

    for one, other in zip(weights(1), weights(2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [7, 16, 20])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    task, data = make_task(), make_data()
    make_trainer(tmp_path, max_steps=25).fit(task, data)
    assert len(data.train_dataloader()) == 16  # within, at the end of, and after the first epoch
    saving = SaveAt(steps, tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_steps=steps + 2, callbacks=[saving]).fit(make_task(), make_data())
    resumed = make_task()
    make_trainer(tmp_path, max_steps=25).fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(task.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    task = make_task()
    task.settings = {
        "class_path": "tx_lightning.tasks.Translation",
        "init_args": {
            "vocab_size": 32,
            "network": {
                "class_path": "tx_lightning.models.EncoderDecoder",
                "init_args": {
                    "d_model": 16,
                    "n_heads": 2,
                    "n_encoder_layers": 1,
                    "n_decoder_layers": 1,
                    "d_ff": 32,
                },
            },
        },
    }
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    loaded = load_task(tmp_path / "task.ckpt")
    assert isinstance(loaded, Translation)
    texts = [source for source, _ in Counting().pairs("test")][:5]
    assert loaded.translate(texts) == task.translate(texts)


def test_tokenizers_of_other_data_are_refused(tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    other = TranslationData(Counting(), 20, tokenizer=Words(), seed=5)
    other.prepare_data()
    other.setup("fit")
    with pytest.raises(ValueError, match="differ from those of the checkpoint"):
        task.attach(other.tokenizers)


def test_shared_embeddings_need_a_shared_vocabulary(tmp_path: Path) -> None:
    data = TranslationData(Counting(), 32, tokenizer=Words(), shared_vocabulary=False)
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="share_embeddings"):
        make_task().attach(data.tokenizers)


def test_gradient_norm_is_clipped_and_known(tmp_path: Path) -> None:
    recorded = Gradients()
    task = make_task()
    trainer = make_trainer(tmp_path, max_steps=3, gradient_clip_val=0.01, callbacks=[recorded])
    trainer.fit(task, make_data())
    norms = [float(torch.cat([g.flatten() for g in step]).norm()) for step in recorded.steps]
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    def loss(precision: str) -> float:
        task = make_task(label_smoothing=0.0)
        trainer = make_trainer(tmp_path, max_steps=8, precision=precision)
        trainer.fit(task, make_data())
        batch = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        with torch.no_grad():
            return float(task.eval()(batch).nll) / batch.target_tokens

    assert loss("bf16-mixed") == pytest.approx(loss("32-true"), rel=0.02)


def test_label_smoothing_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5 must be"):
        make_task(label_smoothing=1.5)


def test_attention_inputs_label_every_real_token(tmp_path: Path) -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(copy.deepcopy(data.tokenizers))
    batch = next(iter(data.val_dataloader()))
    (source, target), labels = task.attention_inputs(batch)
    assert source.shape[0] == target.shape[0] == len(labels) == batch.rows
    first = labels[0]
    rows, columns = first["cross"]
    assert columns[-1] == "</s>"
    assert rows[0] == "<s>"
    assert len(columns) == int((source[0] != PAD).sum())
    assert len(rows) == int((target[0] != PAD).sum())


def test_a_text_of_a_million_characters_is_refused_before_anything_is_decoded() -> None:
    data, task = make_data(), make_task()
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    with pytest.raises(TextTooLong, match=r"text 1 has 500,000 tokens"):
        task.translate(["eins", " ".join(["eins"] * 500_000)])


def test_a_translation_ends_where_the_positions_do() -> None:
    def network(vocab_size: int) -> EncoderDecoder:
        return EncoderDecoder(
            vocab_size,
            d_model=16,
            n_heads=2,
            n_encoder_layers=1,
            n_decoder_layers=1,
            d_ff=32,
            positions=lambda d, h, b: LearnedPositions(d, h, b, max_length=6),
        )

    data, task = make_data(), make_task(network=network)
    data.prepare_data()
    data.setup("fit")
    task.attach(data.tokenizers)
    for decoding in (Greedy(max_length_offset=50), Beam(beam_size=2, max_length_offset=50)):
        (best,) = task.translate(["eins zwei"], decoding)[0]
        assert len(best.tokens) <= 6


class Blanks(Counting):
    """The same with blank lines among the sentences of the test split."""

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for number, (source, target) in enumerate(super().pairs(split)):
            if split == "test" and number % 3 == 1:
                source, target = ("", "   ", "\u3000")[number % 9 // 3], ("", target)[number % 2]
            yield source, target


def test_a_blank_line_is_blank_in_every_verb(tmp_path: Path) -> None:
    task = make_task(decoding=Greedy(), test_decoding=Beam(beam_size=2))
    data = TranslationData(Blanks(), 32, tokenizer=Words(), batch_tokens=200, seed=5)
    data.val_split = "test"
    trainer = make_trainer(tmp_path, limit_val_batches=None)
    trainer.test(task, datamodule=data, verbose=False)
    bleu = float(trainer.callback_metrics["test/bleu"])
    sources, references = zip(*Blanks().pairs("test"), strict=True)
    blank = [i for i, source in enumerate(sources) if not source.strip()]
    assert len(blank) == 11
    translated = [best.text for best, *_ in task.translate(sources)]
    tested = {sample.index: sample.hypothesis for sample in task.samples}
    predictions = trainer.predict(task, datamodule=data)
    assert predictions is not None
    predicted = {index: found[0].text for batch in predictions for index, found in batch}
    assert [tested[i] for i in range(len(sources))] == translated
    assert [predicted[i] for i in range(len(sources))] == translated
    assert all(translated[i] == "" for i in blank)
    assert any(translated)
    score = sacrebleu.corpus_bleu(translated, [list(references)]).score
    assert bleu == pytest.approx(score)
    trainer.validate(task, datamodule=data, verbose=False)
    validated = {sample.index: sample.hypothesis for sample in task.samples}
    greedy = [best.text for best, *_ in task.translate(sources, Greedy())]
    assert [validated[i] for i in range(len(sources))] == greedy


def test_a_batch_of_blank_lines_is_blank(tmp_path: Path) -> None:
    task, data = make_task(), make_data()
    data.prepare_data()
    task.attach(data.tokenizers)
    assert [best.text for best, *_ in task.translate(["", " ", "\t"])] == ["", "", ""]
    assert task.translate([]) == []


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_row_of_samples_is_scored_as_the_corpus_is(lowercase: bool, tmp_path: Path) -> None:
    task = make_task(lowercase_scores=lowercase)
    task.samples = [Sample("q", "One Two Three Four", "one two three four", 0)]
    (row,) = task.sample_rows(1)
    task.val_scores.bleu.update(["one two three four"], ["One Two Three Four"])
    assert row["bleu"] == round(float(task.val_scores.bleu.compute()), 2)
    assert row["bleu"] == (100 if lowercase else 0)


def short_network(
    encoder: int | None = None, decoder: int | None = None
) -> Callable[[int], EncoderDecoder]:
    """A network whose positions end there."""

    def positions(d_model: int, n_heads: int, bidirectional: bool) -> Positions:
        reach = encoder if bidirectional else decoder
        if reach is None:
            return NoPositions(d_model, n_heads, bidirectional)
        return LearnedPositions(d_model, n_heads, bidirectional, max_length=reach)

    return lambda vocab_size: EncoderDecoder(
        vocab_size,
        d_model=16,
        n_heads=2,
        n_encoder_layers=1,
        n_decoder_layers=1,
        d_ff=32,
        positions=positions,
    )


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_sentences_beyond_the_positions_are_refused_before_anything_runs(
    stage: str, side: str, tmp_path: Path
) -> None:
    data = make_data()
    data.prepare_data()
    data.setup()
    split = {"fit": "train", "validate": "val"}.get(stage, "test")
    name = {"encoder": "source", "decoder": "target"}[side]
    lengths = data.stores[split].lengths(name)
    longest, place = int(lengths.max()), int(lengths.argmax())
    task = make_task(network=short_network(**{side: longest}))
    options = {"return_predictions": False} if stage == "predict" else {}
    with pytest.raises(DataError) as caught:
        getattr(make_trainer(tmp_path, max_steps=1), stage)(task, datamodule=data, **options)
    which = f"a {name} sentence" if split == "train" else f"{name} sentence {place + 1}"
    assert str(caught.value).startswith(
        f"split '{split}': {which} has {longest} tokens, more than the {longest - 1} that the "
        f"network's positions hold (max_length {longest}, with the end); "
    )
    fits = make_task(network=short_network(**{side: longest + 1}))
    getattr(make_trainer(tmp_path, max_steps=1), stage)(fits, datamodule=data, **options)


def test_a_text_beyond_the_positions_is_named() -> None:
    data, task = make_data(), make_task(network=short_network(encoder=4))
    data.prepare_data()
    data.setup()
    task.attach(data.tokenizers)
    assert len(task.translate(["eins zwei drei"])) == 1
    with pytest.raises(TextTooLong, match="text 1 has 4 tokens, more than the 3 that can") as error:
        task.translate(["eins", "eins zwei drei vier"])
    assert (error.value.index, error.value.tokens, error.value.most) == (1, 4, 3)
