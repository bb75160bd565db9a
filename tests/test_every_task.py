"""What no task has a line for works for each: callbacks, averaging, resuming, one checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_experiments import ENCODER, ENCODER_DECODER, LABELS, PAIRS, SIZES, STACK, TEXTS
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import load_task, read_checkpoint
from tx_lightning.loggers import read_metrics

DROPOUT = {"dropout": 0.1}
TAGS = {"class_path": "tx_lightning.data.GrammarTags", "init_args": SIZES}
DECODER = {**STACK, "n_layers": 1, "context_length": 16, **DROPOUT}
WITH_ENCODER = {"encoder": {"init_args": {**ENCODER, **DROPOUT}}}

# The data section, the network's arguments, and the kinds of attention of each task.
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "Translation": (
        "TranslationData",
        {"source": PAIRS},
        {**ENCODER_DECODER, **DROPOUT},
        {"encoder_self", "decoder_self", "cross"},
    ),
    "LanguageModeling": (
        "LanguageModelingData",
        {"source": TEXTS, "block_length": 16, "sliding_stride": 8},
        DECODER,
        {"self"},
    ),
    "Classification": (
        "ClassificationData",
        {"source": LABELS, "n_classes": 2, "max_length": 64},
        WITH_ENCODER,
        {"encoder_self"},
    ),
    "Tagging": (
        "TaggingData",
        {"source": TAGS, "n_tags": 5, "max_length": 64},
        WITH_ENCODER,
        {"encoder_self"},
    ),
    "MaskedLanguageModeling": (
        "MaskedLanguageModelingData",
        {"source": TEXTS, "max_length": 64},
        WITH_ENCODER,
        {"encoder_self"},
    ),
    "Denoising": (
        "DenoisingData",
        {
            "source": TEXTS,
            "max_length": 64,
            "noise": {"class_path": "tx_lightning.data.TextInfilling"},
        },
        {**ENCODER_DECODER, **DROPOUT},
        {"encoder_self", "decoder_self", "cross"},
    ),
}
CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "tx_lightning.callbacks.LRWarmup", "init_args": {"warmup_steps": 4}},
    {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "every_n_train_steps": 1,
            "monitor": "step",
            "mode": "max",
            "save_top_k": 2,
            "save_last": True,
        },
    },
    {"class_path": "tx_lightning.callbacks.AttentionLogger", "init_args": {"examples": [0]}},
    {"class_path": "tx_lightning.callbacks.SampleLogger", "init_args": {"n": 2}},
    {"class_path": "tx_lightning.callbacks.Throughput"},
    {"class_path": "tx_lightning.callbacks.LongestBatch"},
    {"class_path": "tx_lightning.callbacks.CheckpointAveraging", "init_args": {"n": 2}},
]


def configuration(task: str) -> dict[str, Any]:
    data, arguments, network, _ = TASKS[task]
    common = {
        "tokenizer": {"class_path": "tx_lightning.data.Words"},
        "vocab_size": 400,
        "batch_tokens": 128,
    }
    scheduler = {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": 9},
    }
    return {
        "seed_everything": 1,
        "data": {"class_path": f"tx_lightning.data.{data}", "init_args": {**common, **arguments}},
        "model": {
            "class_path": f"tx_lightning.tasks.{task}",
            "init_args": {"network": {"init_args": network}, "scheduler": scheduler},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": [
                {"class_path": "tx_lightning.loggers.WandB", "init_args": {"mode": "disabled"}}
            ],
            "callbacks": CALLBACKS,
        },
    }


def fit(task: str, name: str, *words: str) -> Path:
    Path("task.yaml").write_text(yaml.safe_dump(configuration(task)))
    assert main(["fit", "--config", "task.yaml", "--name", name, *words]) == 0
    (run,) = Path("runs", name).iterdir()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("network.")}


def test_all_tasks_are_here() -> None:
    import tx_lightning.tasks

    assert TASKS.keys() == set(tx_lightning.tasks.__all__) - {"Task"}


@pytest.mark.parametrize("task", TASKS)
def test_callbacks_averaging_and_resuming(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = fit(task, "whole")
    rows = read_metrics(whole / "metrics.jsonl")
    assert set().union(*rows) >= {
        "train/loss", "train/grad_norm", "train/tokens_per_second", "train/padding_share",
        "train/step_time", "val/loss", "val/nll",
    }  # fmt: skip
    drawn = {path.name.partition("-")[0] for path in (whole / "attention").iterdir()}
    assert drawn == TASKS[task][3]
    samples = (whole / "samples" / "val.jsonl").read_text().splitlines()
    assert len(samples) == 4  # two after each of two validations
    averaged = load_task(whole / "checkpoints" / "averaged.ckpt")
    assert type(averaged).__name__ == task

    # Stopped after three steps and resumed: the same to the last bit.
    half = fit(task, "half", "--trainer.max_steps", "3")
    assert main(["fit", "--resume", str(half), "--trainer.max_steps", "6"]) == 0
    one, other = weights(whole), weights(half)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    losses = [
        [(row["step"], row["train/loss"]) for row in read_metrics(run / "metrics.jsonl")
         if "train/loss" in row]
        for run in (whole, half)
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6

    # Test, and its own scores, from the checkpoint alone.
    words = ["--config", str(whole / "config.yaml"), "--name", "tested"]
    checkpoint = str(whole / "checkpoints" / "averaged.ckpt")
    assert main(["test", *words, "--ckpt_path", checkpoint, "--trainer.callbacks", "null"]) == 0
    (tested,) = Path("runs", "tested").iterdir()
    assert any("test/loss" in row for row in read_metrics(tested / "metrics.jsonl"))
