"""Words and files that nobody writes, but somebody may: what they mean, or one line on why not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn

from tests.small import make, make_trainer
from tests.stand_ins import TRUST
from tests.test_cli import BASE
from tests.test_junk import TEXTS, refused, saved, tiny
from tx_lightning import cli
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import CheckpointError, load_task
from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import Tokenizer, Words
from tx_lightning.decoding import BeginWith
from tx_lightning.loggers import read_metrics

FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(BASE))
    with cli.process_restored():
        yield


def fit(*words: str) -> int:
    return main(["fit", "--config", "tiny.yaml", *words])


def only_run(name: str = "tiny") -> Path:
    (folder,) = Path("runs", name).iterdir()
    return folder


# Names


@pytest.mark.parametrize("name", ["010", "1e3", "0x10", "1_000", "on", "2026-01-31", "null x"])
def test_a_folder_is_called_what_is_written(name: str) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    shutil.move(only_run(), name)
    resumed = main(["fit", "--resume", name, "--trainer.max_epochs", "2", *TRUST])
    assert resumed == 0
    assert len(read_metrics(Path(name, "metrics.jsonl"))) == 2


@pytest.mark.parametrize("word", ["a\nb", "a\rb: [", "tab\there", "quote'\"", "\u2028", "\udcff"])
def test_any_word_leaves_a_configuration_that_can_be_read(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tx-lightning", "fit", "--runs_dir", word])
    assert fit("--trainer.max_epochs", "1") == 0
    config = only_run() / "config.yaml"
    assert yaml.safe_load(config.read_text())["name"] == "tiny"
    assert main(["fit", "--resume", str(only_run()), *TRUST]) == 0


@pytest.mark.parametrize("name", ["a\nb", "\udcff"])
def test_a_name_is_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", name) == 2
    assert "it may have no line breaks, only text" in capsys.readouterr().err


# Numbers


@pytest.mark.parametrize("key", ["devices", "accumulate_grad_batches"])
def test_numbers_without_end_are_refused(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cli.CommandLine, "instantiate_classes")  # no thousands of processes
    monkeypatch.delattr(LightningCLI, "instantiate_classes")
    assert fit(f"--trainer.{key}", str(10**6)) == 2
    assert f"trainer.{key} is 1000000; it must be at most 10,000" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["fit", "--resume"], ["reproduce"]])
def test_integers_of_thousands_of_digits_are_refused(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    config = only_run() / "config.yaml"
    text = config.read_text().replace("max_epochs: 1", f"max_epochs: 0x{'f' * 10_000}")
    config.write_text(text)
    assert main([*verb, str(only_run()), *TRUST]) in (1, 2)
    assert "an integer of 40,000 bits is no setting" in capsys.readouterr().err


def test_a_list_of_thousands_is_parsed_at_once() -> None:
    """The parser copies a list for each of its elements, which grows with its square."""
    from tx_lightning.configuration import ConfigurationParser

    copies = 0

    class Counted(list[Any]):
        def __deepcopy__(self, memo: Any) -> "Counted":
            nonlocal copies
            copies += 1
            return self

    parser = ConfigurationParser()
    parser.add_argument("--weights", type=list[float])
    given: list[Any] = Counted([1.0] * 20_000)
    assert parser.parse_object({"weights": given}).weights == [1.0] * 20_000
    assert copies < 10


def test_the_timer_of_lightning_has_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    timer = {
        "class_path": "lightning.pytorch.callbacks.Timer",
        "init_args": {"duration": "00:01:00:00"},
    }
    assert fit(f"--trainer.callbacks+={json.dumps(timer)}") == 0
    written = yaml.safe_load((only_run() / "config.yaml").read_text())
    assert written["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


def test_a_plugin_that_cannot_be_built_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    plugin = "lightning.pytorch.plugins.environments.LSFEnvironment"
    assert fit(f"--trainer.plugins+={plugin}") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"error: {plugin}: Did not find the environment variable `LSB_DJOB_RANKFILE`"


# Streams and files


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--help", "--version", "average a.ckpt --output mean.ckpt"])
def test_a_full_disk_below_standard_output_is_one_line(words: str) -> None:
    Path("a.ckpt").write_bytes(saved(tiny()))
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tx_lightning", *words.split()],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_a_loop_of_links_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.ckpt").write_bytes(saved(tiny()))
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    assert main(["average", "a.ckpt", "--output", "one"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


# Inside of checkpoints


@pytest.mark.parametrize("view", [torch._neg_view, lambda t: t.to(torch.complex64).conj()])
def test_a_tensor_that_is_not_computed_yet_is_refused(view: Any, tmp_path: Path) -> None:
    checkpoint = tiny()
    checkpoint["state_dict"]["weight"] = view(checkpoint["state_dict"]["weight"])
    assert refused(tmp_path / "lazy.ckpt", saved(checkpoint))


def test_a_first_token_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match=r"^ids must be at least 0; it is -1"):
        BeginWith([-1])
    with pytest.raises(ValueError, match="ids of BeginWith: 9 is not below the vocabulary size, 9"):
        BeginWith([9])(torch.zeros(2, 9), torch.zeros(2, 0, dtype=torch.long), 2)


@pytest.mark.parametrize("strategy", [{"Fixed": 10}, "BatchLongest"])
def test_a_tokenizer_does_not_pad_or_cut(strategy: Any) -> None:
    settings = json.loads(Words().train(TEXTS, 30).to_json())
    plain = Tokenizer(json.dumps(settings))
    settings["padding"] = {
        "strategy": strategy, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5,
        "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    settings["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    assert Tokenizer(json.dumps(settings)).encode_batch(TEXTS) == plain.encode_batch(TEXTS)


def test_replacements_that_explode_are_refused() -> None:
    settings = json.loads(Words().train(TEXTS, 30).to_json())
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    settings["normalizer"] = {"type": "Sequence", "normalizers": [longer] * 12}
    with pytest.raises(DataError, match="make a text 1,000,000,000,000 times as long"):
        Tokenizer(json.dumps(settings))


def test_what_a_tokenizer_panics_with_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    settings = json.loads(Words().train(TEXTS, 30).to_json())
    settings["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(DataError, match="^tokenizer: "):
        Tokenizer(json.dumps(settings))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("label", ["neg\nERR", "a\tb", "\x1b[31m", "\ud800", "\u2028"])
def test_a_label_is_printed_on_a_line(label: str) -> None:
    task: Any = make("Classification")[0]
    with pytest.raises(ValueError, match="no tabs, line breaks and other control characters"):
        task.attach_labels([label, "pos"], 1)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        ({"class_path": "torch.nn.LayerNorm", "init_args": {"device": "meta"}}, "without values"),
        ({"class_path": "torch.nn.CosineSimilarity"}, "CosineSimilarity is no norm"),
        (
            {
                "class_path": "torch.nn.Transformer",
                "init_args": {"nhead": 2, "num_encoder_layers": 10**7},
            },
            "Transformer may not be named in a file",
        ),
    ],
)
def test_a_module_in_the_wrong_place_is_one_line(
    norm: dict[str, Any], why: str, tmp_path: Path
) -> None:
    task, data = make("Translation")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    checkpoint["tx_lightning"]["task"]["init_args"]["network"]["init_args"]["norm"] = norm
    torch.save(checkpoint, tmp_path / "forged.ckpt")
    with pytest.raises(CheckpointError, match=why):
        load_task(tmp_path / "forged.ckpt")
    assert isinstance(load_task(tmp_path / "whole.ckpt"), nn.Module)
