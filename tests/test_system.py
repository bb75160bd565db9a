"""The quick start, shrunk, from the command line to its files, on one and two processes."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests import wandb_file
from tests.processes import Forked
from tests.test_experiments import TRANSLATION as QUICKSTART
from tests.test_experiments import shrink
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import load_task, read_checkpoint
from tx_lightning.loggers import read_metrics
from tx_lightning.tasks import Translation

ROOT = Path(__file__).resolve().parents[1]


STEPS = 200
DATA = ["--data.batch_tokens", "1024", "--data.source.n_train", "900"]


def run_words(folder: Path, verb: str, *words: str) -> list[str]:
    configs = ["--config", str(QUICKSTART), "--config", shrink(folder)]
    exact = ["--matmul_precision", "highest"]
    return [verb, *configs, *exact, "--trainer.accelerator", "cpu", "--name", verb, *words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned some words: its scores are not 0."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        words = run_words(folder, "fit", *DATA, "--test_after", "false")
        words += ["--trainer.max_steps", str(STEPS), "--trainer.max_epochs", "90"]
        words += ["--trainer.val_check_interval", "100", "--trainer.log_every_n_steps", "1"]
        assert main([*words, "--model.network.d_model", "32"]) == 0
    finally:
        os.chdir(before)
    (run,) = (folder / "runs/fit").iterdir()
    return run


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return trained / "checkpoints" / "last.ckpt"


def test_the_run_folder_has_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "attention", "samples", "wandb",
    }  # fmt: skip
    rows = read_metrics(trained / "metrics.jsonl")
    logged = set().union(*rows)
    assert logged >= {
        "train/loss", "train/grad_norm", "train/tokens_per_second", "train/step_time",
        "train/padding_share", "val/loss", "val/nll", "val/perplexity", "val/bleu", "val/chrf",
        "attention/cross/layer0/head1/entropy",
    }  # fmt: skip
    assert any(name.startswith("lr-") for name in logged)
    pictures = {path.name.partition("-")[0] for path in (trained / "attention").glob("*.png")}
    assert pictures == {"encoder_self", "decoder_self", "cross"}
    samples = (trained / "samples/val.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"source", "reference", "hypothesis", "bleu"} <= set(json.loads(samples[0]))


def test_wandb_has_configuration_metrics_samples_and_pictures(trained: Path) -> None:
    run = wandb_file.read(trained)
    network = run.config["model"]["init_args"]["network"]["init_args"]
    assert network["d_model"] == 32
    assert run.config["n_parameters"] == sum(
        tensor.numel()
        for name, tensor in read_checkpoint(trained / "checkpoints/last.ckpt")["state_dict"].items()
        if name != "network.output.weight" and "source_embedding" not in name  # tied: counted once
    )
    assert run.config["data_statistics"]
    assert "version:" in run.config["bleu_signature"]
    logged = set().union(*run.history)
    assert logged >= {"train/loss", "val/bleu", "val/samples", "trainer/global_step"}
    assert any(name.startswith("attention/cross") for name in logged)
    bleu = [row["val/bleu"] for row in run.history if "val/bleu" in row]
    assert run.summary["val/bleu"] == {"max": max(bleu)}
    assert run.metrics["val/bleu"].step_metric == "trainer/global_step"
    assert any(name.endswith(".png") for name in run.files)
    assert any(name.endswith(".table.json") for name in run.files)


def test_training_goes_on_from_the_run_folder(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint.parents[1]
    before = wandb_file.read(run).run_id
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", str(STEPS + 2)]) == 0
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, STEPS + 3))
    assert wandb_file.read(run).run_id == before


def test_translate_needs_nothing_but_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Die Hunde haben nicht gelogen.", "", "Die Mädchen haben getanzt."]
    text = SimpleNamespace(buffer=io.BytesIO("".join(f"{line}\n" for line in lines).encode()))
    monkeypatch.setattr(sys, "stdin", text)
    capsys.readouterr()
    assert main(["translate", str(checkpoint), "--beam_size", "2"]) == 0
    written = capsys.readouterr().out.split("\n")
    assert len(written) == 4
    assert written[1] == written[3] == ""
    task = load_task(checkpoint)
    assert isinstance(task, Translation)
    from tx_lightning.decoding import Beam

    expected = [found[0].text for found in task.translate(lines, Beam(beam_size=2))]
    assert written[:3] == [" ".join(line.splitlines()) for line in expected]


def test_predict_writes_hypotheses_in_input_order(checkpoint: Path, tmp_path: Path) -> None:
    lines = ["Die Hunde haben nicht gelogen, weil er tanzt.", "Er tanzt.", "Die Hunde tanzen."]
    (tmp_path / "input.de").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = run_words(tmp_path, "predict", *DATA, "--ckpt_path", str(checkpoint))
    words += ["--data.predict_file", "input.de", "--model.test_decoding.n_best", "3"]
    words += ["--model.network.d_model", "32", "--model_from", "config"]
    assert main(words) == 0
    (run,) = (tmp_path / "runs/predict").iterdir()
    written = (run / "predictions/hypotheses.txt").read_text(encoding="utf-8").split("\n")
    task = load_task(checkpoint)
    assert isinstance(task, Translation)
    expected = [found[0].text for found in task.translate(lines)]
    assert written == [*(" ".join(line.splitlines()) for line in expected), ""]
    n_best = (run / "predictions/n_best.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in n_best] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3


def two_processes(folder: Path, words: list[str]) -> dict[str, Any]:
    """Run a command on two processes and return its last value of each metric."""
    words = [*words, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--name", "two"]
    output = folder / "output.txt"
    forked = Forked(
        main,
        words,
        environment={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
        folder=folder,
        output=output,
        ranks=2,
    )
    try:
        assert forked.wait(timeout=600) == 0, output.read_text()[-3000:]
    finally:
        forked.kill()
    (run,) = (folder / "runs/two").iterdir()
    return last_values(run) | {"folder": run}


def last_values(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        values |= row
    return values


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_scores_are_the_same_to_the_digit_on_two_processes(
    checkpoint: Path, tmp_path: Path
) -> None:
    words = run_words(tmp_path, "test", *DATA, "--ckpt_path", str(checkpoint))
    words += ["--data.source.n_test", "61", "--model_from", "checkpoint"]
    words += ["--trainer.callbacks", "null"]  # no Goal
    assert main([*words, "--name", "one"]) == 0
    (run,) = (tmp_path / "runs/one").iterdir()
    one, two = last_values(run), two_processes(tmp_path, words)
    for metric in ("test/bleu", "test/chrf"):
        assert one[metric] == two[metric], metric
    assert one["test/bleu"] > 0
    for metric in ("test/loss", "test/nll"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-6)


def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = tmp_path / "quiet.yaml"
    # Not Adam: it turns the rounding of a gradient that is zero (keys' biases) into whole steps.
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    trainer = {"callbacks": None, "val_check_interval": 20}
    quiet.write_text(
        yaml.safe_dump({"trainer": trainer, "model": {"init_args": {"optimizer": sgd}}})
    )
    words = run_words(tmp_path, "fit", "--config", str(quiet), "--test_after", "false")
    words += ["--trainer.max_steps", "20", "--trainer.max_epochs", "9"]
    words += ["--model.network.dropout", "0.0"]
    assert main([*words, "--name", "one"]) == 0
    two = two_processes(tmp_path, words)["folder"]
    (one,) = (tmp_path / "runs/one").iterdir()
    states = []
    for run in (one, two):
        (path,) = (run / "checkpoints").glob("*.ckpt")
        states.append(read_checkpoint(path)["state_dict"])
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_configuration_of_a_run_serves_other_verbs(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--config", str(checkpoint.parents[1] / "config.yaml"), "--trainer.callbacks", "null"]
    assert main(["test", *words, "--ckpt_path", str(checkpoint), "--name", "again"]) == 0
    (run,) = (tmp_path / "runs/again").iterdir()
    assert "test/bleu" in last_values(run)
