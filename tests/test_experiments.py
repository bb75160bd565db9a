"""Every shipped YAML file parses, builds and runs, shrunk to a size that takes seconds."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tx_lightning.__main__ import main
from tx_lightning.settings import check_run
from tx_lightning.trust import NO_TRUST

ROOT = Path(__file__).resolve().parents[1] / "experiments"
OVERLAYS = sorted((ROOT / "trainer").glob("*.yaml"))
FILES = sorted(path for path in ROOT.rglob("*.yaml") if path not in OVERLAYS)


def read(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


# An experiment stands for itself; what lacks a seed is laid over one.
EXPERIMENTS = [path for path in FILES if "seed_everything" in read(path)]
VARIANTS = [path for path in FILES if "seed_everything" not in read(path)]
TRANSLATION = ROOT / "quickstart" / "translation.yaml"
LANGUAGE_MODELING = ROOT / "quickstart" / "language_modeling.yaml"

SIZES = {"n_train": 60, "n_val": 6, "n_test": 6}
TEXTS = {"class_path": "tx_lightning.data.GrammarText", "init_args": SIZES}
PAIRS = {"class_path": "tx_lightning.data.Grammar", "init_args": SIZES}
LABELS = {"class_path": "tx_lightning.data.GrammarPolarity", "init_args": SIZES}
STACK = {"d_model": 8, "n_heads": 2}
ENCODER_DECODER = {**STACK, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 16}
ENCODER = {**STACK, "n_layers": 1, "d_ff": 16, "max_length": 64}
GREEDY = {"class_path": "tx_lightning.decoding.Greedy", "init_args": {"max_length_offset": 1}}

# For each task the data and model sections that make it small, and what it must have logged.
SHRUNK: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Translation": (
        {"source": PAIRS, "test_split": "test"},
        {"network": {"init_args": ENCODER_DECODER}, "decoding": GREEDY},
        "val/bleu",
    ),
    "LanguageModeling": (
        {"source": TEXTS, "test_split": "test", "block_length": 8, "sliding_stride": 4},
        {"network": {"init_args": {**STACK, "n_layers": 1, "context_length": 8}}},
        "val/bits_per_byte",
    ),
    "Classification": (
        {"source": LABELS, "max_length": 64},
        {"network": {"init_args": {"encoder": {"init_args": ENCODER}}}},
        "val/macro_f1",
    ),
    "MaskedLanguageModeling": (
        {"source": TEXTS, "test_split": "test", "max_length": 64},
        {"network": {"init_args": {"encoder": {"init_args": ENCODER}}}},
        "val/accuracy",
    ),
    "Denoising": (
        {"source": TEXTS, "test_split": "test", "noise": {"init_args": {"n_sentinels": 20}}},
        {"network": {"init_args": ENCODER_DECODER}},
        "val/accuracy",
    ),
}


def task_of(experiment: Path) -> str:
    return str(read(experiment)["model"]["class_path"].rpartition(".")[2])


def shrink(folder: Path, experiment: Path = TRANSLATION) -> str:
    """Write an overlay that makes an experiment small; return its path."""
    data, model, _ = SHRUNK[task_of(experiment)]
    common = {
        "tokenizer": {"class_path": "tx_lightning.data.ByteLevelBPE"},
        "vocab_size": 300,
        "batch_tokens": 256,
        "eval_batch_tokens": 256,
        "num_workers": 0,
    }
    trainer = {
        "max_epochs": None,
        "max_steps": 3,
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    overlay = folder / "shrunk.yaml"
    sections = {
        "data": {"init_args": {**common, **data}},
        "model": {"init_args": model},
        "trainer": trainer,
    }
    overlay.write_text(yaml.safe_dump(sections))
    return str(overlay)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def test_there_are_experiments_and_overlays() -> None:
    assert {name_of(path) for path in EXPERIMENTS} == {
        "classification/sst2",
        "language_modeling/gpt2",
        "language_modeling/tinyshakespeare_char",
        "pretraining/bert_base",
        "pretraining/multi30k_denoising",
        "pretraining/sst2_mlm",
        "quickstart/classification",
        "quickstart/language_modeling",
        "quickstart/translation",
        "translation/multi30k_en_de",
        "translation/wmt14_en_de_base",
    }
    assert {name_of(path) for path in VARIANTS} == {
        "classification/sst2_pretrained",
        "language_modeling/sizes/gpt2",
        "language_modeling/sizes/gpt2_large",
        "language_modeling/sizes/gpt2_medium",
        "language_modeling/sizes/gpt2_xl",
        "language_modeling/sizes/nano",
        "language_modeling/tinyshakespeare_char_gpu",
    }
    assert {path.name for path in OVERLAYS} >= {
        "cpu.yaml",
        "ddp.yaml",
        "fsdp.yaml",
        "debug.yaml",
        "gpu.yaml",
        "multi_node.yaml",
    }


def run(folder: Path, experiment: Path, *words: str, overlays: tuple[Path, ...] = ()) -> Path:
    """Run fit on a shrunk experiment and return the run's folder."""
    command = ["fit", "--config", str(experiment)]
    for overlay in overlays:
        command += ["--config", str(overlay)]
    command += ["--config", shrink(folder, experiment), "--name", "x", "--test_after", "false"]
    assert main([*command, "--trainer.accelerator", "cpu", *words]) == 0
    (made,) = (folder / "runs/x").iterdir()
    check_run(made / "config.yaml", NO_TRUST)  # what is shipped needs nobody's consent
    return made


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)
def test_experiment_runs(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = run(tmp_path, experiment) / "metrics.jsonl"
    assert SHRUNK[task_of(experiment)][2] in metrics.read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)
def test_experiment_opens_with_its_result(experiment: Path) -> None:
    header = experiment.read_text(encoding="utf-8").split("\nseed_everything")[0]
    assert header.startswith("# ")
    assert "# Result" in header
    assert "# Command" in header


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_variant_merges_over_its_experiment(
    variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bases = {
        "sizes": "language_modeling/gpt2.yaml",
        "language_modeling": "language_modeling/tinyshakespeare_char.yaml",
        "classification": "classification/sst2.yaml",
    }
    made = run(
        tmp_path, ROOT / bases[variant.parent.name], "--pretrained", "null", overlays=(variant,)
    )
    assert (made / "checkpoints").is_dir()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_merges_and_runs(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # What this machine has not got is taken back; the rest of the overlay stays.
    words = ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto"]
    experiment = TRANSLATION if overlay.stem == "debug" else LANGUAGE_MODELING  # the quickest
    made = run(tmp_path, experiment, *words, overlays=(overlay,))
    resolved = yaml.safe_load((made / "config.yaml").read_text(encoding="utf-8"))
    asked = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    for key in ("precision", "overfit_batches"):
        if key in asked["trainer"]:
            assert resolved["trainer"][key] == asked["trainer"][key]
