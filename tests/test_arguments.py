"""Files and words of Lightning's verbs: a wrong number, list or key is one line that names it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.stand_ins import TRUST
from tests.test_cli import BASE, config, only_run
from tx_lightning import cli, commands
from tx_lightning.__main__ import main

TRANSLATION = str(
    Path(__file__).resolve().parents[1] / "experiments" / "quickstart" / "translation.yaml"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, without W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with cli.process_restored():
        commands.import_classes()
        yield


@pytest.fixture
def base() -> str:
    return config("tiny", **BASE)


def best(**arguments: object) -> dict[str, object]:
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}


def test_a_callback_inherits_nothing_from_the_one_that_had_its_place(base: str) -> None:
    first = config("first", trainer={"callbacks": [best(monitor="val/loss", filename="best")]})
    later = config("later", trainer={"callbacks": [best(every_n_train_steps=5)]})
    files = ["--config", base, "--config", first, "--config", later]
    for words in (files, [*files[:4], f"--trainer.callbacks=[{json.dumps(best())}]"]):
        (found,) = cli.CommandLine(words, run=False).config.trainer.callbacks
        assert (found.init_args.monitor, found.init_args.filename) == (None, None)
    words = [*files, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    kept, added = cli.CommandLine(words, run=False).config.trainer.callbacks
    assert kept.init_args.every_n_train_steps == 5
    assert added.init_args.monitor == "val/loss"


def test_a_logger_is_replaced_by_loggers(base: str) -> None:
    """The base's is one class, and not a list."""
    own = {"class_path": "tx_lightning.loggers.WandB"}
    first = config("first", trainer={"logger": {**own, "init_args": {"project": "mine"}}})
    later = config("later", trainer={"logger": [own]})
    words = ["--config", base, "--config", first, "--config", later]
    (found,) = cli.CommandLine(words, run=False).config.trainer.logger
    assert found.init_args.project is None


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to")
def test_a_resumed_run_takes_the_lists_of_later_files(base: str) -> None:
    first = config("first", trainer={"callbacks": [best(monitor="val/loss", filename="best")]})
    assert main(["fit", "--config", base, "--config", first]) == 0
    later = config("later", trainer={"max_epochs": 3, "callbacks": [best(save_last=True)]})
    run = only_run()
    assert main(["fit", "--resume", str(run), *TRUST, "--config", later]) == 0
    (found,) = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]
    assert found["init_args"]["monitor"] is None
    assert found["init_args"]["save_last"] is True


def test_a_key_given_twice_is_named_with_its_file_and_lines(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["fit", "--config", base, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    Path("twice.yaml").write_text("trainer:\n  max_epochs: 1\n  max_steps: 4\n  max_epochs: 2\n")
    says = "twice.yaml: trainer.max_epochs is given twice, in lines 2 and 4"
    assert says in refused("--config", "twice.yaml")
    Path("section.yaml").write_text("max_epochs: 1\nmax_epochs: 2\n")
    says = "section.yaml: max_epochs is given twice, in lines 1 and 2"
    assert says in refused("--trainer", "section.yaml")
    assert "lr is given twice" in refused('--model={"init_args": {"lr": 1, "lr": 2}}')
    folder = Path("runs/tiny/old")
    folder.mkdir(parents=True)
    text = Path(base).read_text()
    (folder / "config.yaml").write_text(f"{text}\nseed_everything: 1\nseed_everything: 2\n")
    assert main(["fit", "--resume", str(folder), *TRUST]) == 2
    lines = len(text.splitlines()) + 2, len(text.splitlines()) + 3
    says = f"config.yaml: seed_everything is given twice, in lines {lines[0]} and {lines[1]}"
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.lr", ".nan"], "model.lr: nan is not a finite number"),
        (["--model.lr", "-.inf"], "model.lr: -inf is not a finite number"),
        (["--model.lr", "1" + 400 * "0"], "model.lr: 1000000000000000000000000000000000000... is"),
        (["--model.lr", "0,001"], "model.lr: 0,001 is not float; a number looks like 0.001 or 1e-"),
        (["--model.lr", "null"], "model.lr: null is not float"),
        (["--model.lr=true"], "model.lr: true is not float"),
        (["--model.dim", "x", "--model.lr", "-1e-3"], "model.dim: x is not int"),
        (["--trainer.gradient_clip_val", ".inf"], "trainer.gradient_clip_val: inf is not a finite"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.min_delta=.nan"],
            "min_delta: nan is not a finite number",
        ),
        (["--trainer.max_epochs", "9" * 5000], "trainer.max_epochs"),
        (["--seed_everything", "-1"], "seed_everything is -1; it must be from 0 to 4294967295"),
        (["--seed_everything", str(2**40)], "seed_everything is 1099511627776; it must be from 0"),
        (["--seed_everything", "1.5"], "seed_everything: 1.5 is not int"),
    ],
)
def test_a_wrong_number_is_one_line(
    base: str, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["fit", "--config", base, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert len(line) < 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: '0,001'}}", "0,001 is not fl"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: true}}", "true is not float"),
        ("network: {init_args: {dropout: .inf}}", "model.network.dropout: inf is not a finite"),
        ("network: {init_args: {d_model: null}}", "model.network.d_model: null is not int"),
        (
            "decoding: {init_args: {filters: [{class_path: MinLength, init_args: {length: x}}]}}",
            "model.decoding.filters.0.length: x is not int",
        ),
    ],
)
def test_a_wrong_number_below_classes_is_one_line(
    capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    Path("wrong.yaml").write_text(f"model: {{init_args: {{{text}}}}}")
    assert main(["fit", "--config", TRANSLATION, "--config", "wrong.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.startswith("error: model.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trainer: 5", "trainer: 5 is no section of keys"),
        ("trainer: [max_epochs]", "trainer: ['max_epochs'] is no section of keys"),
        ("model: {init_args: 5}", "model.init_args is 5; it must hold arguments by their names"),
        ("trainer: {callbacks: [5]}", "trainer.callbacks: 5 is not accepted there"),
        ("trainer: {callbacks: [{class_path: EarlyStopping}]}", "monitor: null is not str; give"),
        ("ckpt_path: 5", "checkpoint 5: there is no such file"),
        ("resume: 5", "--resume 5: it has no config.yaml"),
        ("name: 5", "name: 5 is not str or null"),
        ("trainer: {max_epochs: 1e3}", "trainer.max_epochs: 1000.0 is not int or null"),
    ],
)
def test_a_value_of_another_kind_is_one_line(
    base: str, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    Path("odd.yaml").write_text(text)
    assert main(["fit", "--config", base, "--config", "odd.yaml"]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_without_data_there_is_no_run(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    alone = config("alone", model=BASE["model"])
    assert main(["fit", "--config", alone]) == 2
    assert capsys.readouterr().err == "error: no data section: give --config with one\n"


@pytest.mark.parametrize("path", [".", "/dev/null", "/dev/zero", "pipe"])
def test_a_configuration_is_a_file(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    assert main(["fit", "--config", path]) == 2
    assert capsys.readouterr().err == f"error: --config {path}: it is not a file\n"
