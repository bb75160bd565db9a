"""Every shipped YAML file parses, builds and runs, shrunk to a size that takes seconds."""

from pathlib import Path

import pytest
import yaml

from tx_lightning.__main__ import main

ROOT = Path(__file__).resolve().parents[1] / "experiments"
EXPERIMENTS = sorted(
    path for folder in ("quickstart", "translation") for path in (ROOT / folder).glob("*.yaml")
)
OVERLAYS = sorted((ROOT / "trainer").glob("*.yaml"))

SHRUNK = """
data:
  init_args:
    source:
      class_path: tx_lightning.data.Grammar
      init_args: {n_train: 60, n_val: 6, n_test: 6}
    tokenizer: {class_path: tx_lightning.data.ByteLevelBPE}
    test_split: test
    vocab_size: 300
    batch_tokens: 256
    eval_batch_tokens: 256
    num_workers: 0
model:
  init_args:
    network:
      init_args: {d_model: 8, n_heads: 2, n_encoder_layers: 1, n_decoder_layers: 1, d_ff: 16}
    decoding: {class_path: tx_lightning.decoding.Greedy, init_args: {max_length_offset: 1}}
trainer:
  max_epochs: null
  max_steps: 3
  check_val_every_n_epoch: null
  val_check_interval: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


def shrink(folder: Path) -> str:
    overlay = folder / "shrunk.yaml"
    overlay.write_text(SHRUNK)
    return str(overlay)


def test_there_are_experiments_and_overlays() -> None:
    assert [path.name for path in EXPERIMENTS] == [
        "translation.yaml",
        "multi30k_en_de.yaml",
        "wmt14_en_de_base.yaml",
    ]
    assert {path.name for path in OVERLAYS} >= {
        "cpu.yaml",
        "ddp.yaml",
        "debug.yaml",
        "gpu.yaml",
        "multi_node.yaml",
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_runs(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(experiment), "--config", shrink(tmp_path), "--name", "x"]
    words += ["--trainer.accelerator", "cpu", "--test_after", "false"]
    assert main(words) == 0
    (run,) = (tmp_path / "runs/x").iterdir()
    names = {line for path in run.glob("metrics.jsonl") for line in path.read_text().splitlines()}
    assert any("val/bleu" in name for name in names)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_opens_with_its_result(experiment: Path) -> None:
    header = experiment.read_text(encoding="utf-8").split("\nseed_everything")[0]
    assert header.startswith("# ")
    assert "# Result" in header
    assert "# Command" in header


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_merges_and_runs(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(EXPERIMENTS[0]), "--config", str(overlay)]
    words += ["--config", shrink(tmp_path), "--name", "x", "--test_after", "false"]
    # What this machine has not got is taken back; the rest of the overlay stays.
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    words += ["--trainer.strategy", "auto"]
    assert main(words) == 0
    (run,) = (tmp_path / "runs/x").iterdir()
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    asked = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    for key in ("precision", "overfit_batches"):
        if key in asked["trainer"]:
            assert resolved["trainer"][key] == asked["trainer"][key]
