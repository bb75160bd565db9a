"""Starting from the weights of another run: what is taken, what is not, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tasks.test_language_modeling import Counting
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import CheckpointError, load_task, read_checkpoint
from tx_lightning.data.tokenizers import Tokenizers, Words
from tx_lightning.models import LanguageModel
from tx_lightning.pretrained import Pretrained, initialize
from tx_lightning.tasks import LanguageModeling

TOKENIZERS = Tokenizers.one(Words().train(Counting().texts("train"), 16))


def task(vocab_size: int = 16, **changed: Any) -> LanguageModeling:
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 2, "context_length": 8, **changed}
    return LanguageModeling(vocab_size, lambda v: LanguageModel(v, **sizes))


def pretrained(of: LanguageModeling) -> Pretrained:
    weights = {name: value.clone() for name, value in of.network.state_dict().items()}
    return Pretrained(Path("other.ckpt"), weights, TOKENIZERS)


def test_everything_of_the_same_name_and_shape_is_taken() -> None:
    torch.manual_seed(1)
    other, ours = task(), task()
    report = initialize(ours, pretrained(other))
    for one, two in zip(other.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (report.new, report.unused, report.share) == ({}, [], 1.0)
    assert "tensors loaded, 100.0% of the parameters" in str(report)


def test_what_is_new_and_what_is_unused_is_said_with_the_reason() -> None:
    weights = pretrained(task())
    weights.weights["old_head.weight"] = torch.ones(3)
    del weights.weights["final_norm.bias"]
    weights.weights["final_norm.weight"] = torch.ones(3)
    ours = task()
    report = initialize(ours, weights)
    assert report.new == {
        "final_norm.weight": "as the checkpoint's has another shape, (3,)",
        "final_norm.bias": "as the checkpoint has none",
    }
    assert report.unused == ["old_head.weight"]
    assert 0.9 < report.share < 1
    assert "  new, as the checkpoint has none: final_norm.bias" in str(report)
    assert "  not used, as this network has no such part: old_head.weight" in str(report)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"d_model": 16}, "embedding.tokens.weight"),
        ({"context_length": 9}, "positions.table"),
        ({"d_ff": 5}, r"layers\.0\.feed_forward"),
    ],
)
def test_other_sizes_are_refused_with_both_shapes(changed: dict[str, Any], name: str) -> None:
    message = rf"other.ckpt does not fit: {name}.* is \(.*\) there and \(.*\) here"
    with pytest.raises(CheckpointError, match=message):
        initialize(task(**changed), pretrained(task()))


def test_a_checkpoint_of_nothing_alike_is_refused() -> None:
    weights = Pretrained(Path("other.ckpt"), {"x.weight": torch.ones(2)}, TOKENIZERS)
    with pytest.raises(CheckpointError, match="has nothing for a LanguageModel: .* x.weight"):
        initialize(task(), weights)


CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "data": {
        "class_path": "tx_lightning.data.LanguageModelingData",
        "init_args": {
            "source": {
                "class_path": "tx_lightning.data.GrammarText",
                "init_args": {"n_train": 60, "n_val": 8, "n_test": 8},
            },
            "tokenizer": {"class_path": "tx_lightning.data.Words"},
            "vocab_size": 300,
            "block_length": 8,
            "batch_tokens": 64,
        },
    },
    "model": {
        "class_path": "tx_lightning.tasks.LanguageModeling",
        "init_args": {
            "network": {
                "class_path": "tx_lightning.models.LanguageModel",
                "init_args": {"d_model": 8, "n_heads": 2, "n_layers": 1, "context_length": 8},
            },
        },
    },
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "logger": False,
    },
}


def fit(folder: Path, *words: str) -> tuple[int, Path]:
    """Run fit in a folder; return its status and its last checkpoint."""
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    name = f"run{len(list((folder / 'runs').glob('*')))}" if (folder / "runs").exists() else "run"
    status = main(["fit", "--config", "c.yaml", "--name", name, *words])
    checkpoints = sorted((folder / "runs" / name).glob("*/checkpoints/*.ckpt"))
    return status, checkpoints[-1] if checkpoints else folder


def test_one_line_starts_a_run_from_another_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, first = fit(tmp_path)
    assert status == 0
    capsys.readouterr()
    # Other data, whose own tokenizer would be another one.
    other = ["--data.source.n_train", "30", "--data.source.seed", "9"]
    status, second = fit(
        tmp_path, "--pretrained", str(first), *other, "--trainer.max_steps", "1",
        "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.0",
    )  # fmt: skip
    assert status == 0
    assert "100.0% of the parameters" in capsys.readouterr().out
    one, two = read_checkpoint(first), read_checkpoint(second)
    assert one["tx_lightning"]["tokenizers"] == two["tx_lightning"]["tokenizers"]
    for name, value in one["state_dict"].items():
        if name.startswith("network."):
            assert torch.equal(value, two["state_dict"][name]), name
    # The run goes on, and is tested, without the checkpoint that it started from.
    first.unlink()
    run = second.parents[1]
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "2"]) == 0
    words = ["--config", str(run / "config.yaml"), "--name", "again"]
    assert main(["test", *words, "--ckpt_path", str(second)]) == 0
    assert isinstance(load_task(second), LanguageModeling)


def test_a_pretrained_checkpoint_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, first = fit(tmp_path)
    status, _ = fit(tmp_path, "--pretrained", str(first), "--data.vocab_size", "200")
    assert status == 1
    error = capsys.readouterr().err
    assert "embedding.tokens.weight is (300, 8) there and (200, 8) here" in error
    status, _ = fit(tmp_path, "--pretrained", "nowhere.ckpt")
    assert status == 1
    assert "checkpoint nowhere.ckpt: there is no such file" in capsys.readouterr().err
