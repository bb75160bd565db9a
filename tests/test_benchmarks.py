"""The parts of benchmarks/ that make a number, and the configurations of the baselines."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD

from benchmarks import throughput
from benchmarks.bare_loop import BareLoop, batches
from benchmarks.fit_overhead import interval, overhead
from benchmarks.tokenized_bleu import moses, tokenized_bleu
from tx_lightning.data import TextPairs, TranslationBatch, TranslationData, Words
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks import Translation


@pytest.mark.parametrize("language", ["de", "en"])
def test_moses_makes_the_published_reference_of_the_raw_text(
    language: str, real_data: Path
) -> None:
    folder = real_data / "multi30k"
    raw = gzip.decompress((folder / f"test_2016_flickr.{language}.gz").read_bytes()).decode()
    published = (folder / f"test_2016_flickr.lc.norm.tok.{language}").read_text("utf-8")
    assert moses(raw.splitlines(), language) == published.splitlines()


def test_tokenized_bleu_ignores_case_but_not_words() -> None:
    reference = ["ein mann schläft heute in einem grünen raum ."]
    cased = ["Ein Mann schläft heute in einem grünen Raum."]
    score, signature = tokenized_bleu(cased, reference, "de")
    assert score == pytest.approx(100)
    assert "tok:none" in signature
    assert tokenized_bleu(["Ein Hund schläft heute in einem Raum."], reference, "de")[0] < 60


def test_overhead_is_that_of_the_summed_time_and_lies_in_its_interval() -> None:
    fit, bare = [1.1, 2.0, 3.2], [1.0, 2.0, 3.0]
    assert overhead(fit, bare) == pytest.approx(0.05)
    low, high = interval(fit, bare)
    assert 0 <= low <= 0.05 <= high < 0.1001


def tiny_data(folder: Path) -> TranslationData:
    words = ["one", "two", "three", "four", "five"]
    lines = [" ".join(words[: 1 + i % 5]) for i in range(60)]
    (folder / "text").write_text("\n".join(lines) + "\n")
    sides = (str(folder / "text"), str(folder / "text"))
    source = TextPairs(train=sides, val=sides, test=sides)
    return TranslationData(source, 32, tokenizer=Words(), batch_tokens=24)


class Recorder(Callback):
    """Keeps which sentences each training batch of fit held."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TranslationBatch, batch_idx: int
    ) -> None:
        self.indices.append(batch.indices)


def test_the_bare_loop_takes_turns_with_fit_over_the_same_batches(tmp_path: Path) -> None:
    data, recorder = tiny_data(tmp_path), Recorder()
    bare = BareLoop(turn=2, results=str(tmp_path / "turns.json"))
    task = Translation(
        32,
        lambda size: EncoderDecoder(
            size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8
        ),
        optimizer=lambda parameters: SGD(parameters, lr=0.1),
    )
    trainer = Trainer(
        max_steps=9,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[bare, recorder],
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=data)

    results = json.loads((tmp_path / "turns.json").read_text())
    assert len(results["fit"]) == len(results["bare"]) == 3  # four, without the first
    assert all(seconds > 0 for seconds in results["fit"] + results["bare"])
    assert len(recorder.indices) == 9
    again = tiny_data(tmp_path)
    again.prepare_data()
    again.setup("fit")
    assert [batch.indices for batch in islice(batches(again), 9)] == recorder.indices


LOGS = {
    "joeynmt": "Epoch   1, Step:        4, Batch Loss:     7.801753, Batch Acc: 0.033535, "
    "Tokens per Sec:      753, Lr: 0.000010\n",
    "eole": "Step  4/   12; acc: 0.0; ppl: 10075.78; xent: 9.22; lr: 3.95e-06; sents:    1271; "
    "bsz: 3548/3745/318; 832/753 tok/s;     17 sec;\n",
}


@pytest.fixture
def job(tmp_path: Path) -> throughput.Job:
    folder = tmp_path / "job"
    (folder / "run").mkdir(parents=True)
    return throughput.Job("python", tmp_path, folder, steps=40, window=10, device="cpu")


def test_the_figures_are_the_target_tokens_of_each_log(job: throughput.Job) -> None:
    (job.folder / "run" / "train.log").write_text(LOGS["joeynmt"] * 2)
    assert throughput.joeynmt_figures(job, "") == [753, 753]
    assert throughput.eole_figures(job, LOGS["eole"] * 2) == [753, 753]
    rows = [{"step": 10, "train/loss": 1.0}, {"step": 10, "train/tokens_per_second": 753}]
    metrics = job.folder / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert throughput.tx_lightning_figures(job, "") == [753]


@pytest.mark.parametrize("toolkit", ["joeynmt", "eole"])
def test_nothing_in_a_baselines_configuration_stays_open(toolkit: str, job: throughput.Job) -> None:
    throughput.TOOLKITS[toolkit].command(job)

    def leaves(tree: Any) -> list[Any]:
        if not isinstance(tree, dict):
            return [tree]
        return [leaf for value in tree.values() for leaf in leaves(value)]

    config = yaml.safe_load((job.folder / "config.yaml").read_text())
    assert None not in leaves(config)
    assert {40, 10} <= {leaf for leaf in leaves(config) if isinstance(leaf, int)}
