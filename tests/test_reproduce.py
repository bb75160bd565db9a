"""A run carried out again comes out the same, and where it does not, it is said what differs."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.stand_ins import TRUST
from tests.test_cli import BASE
from tx_lightning import cli
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import read_checkpoint
from tx_lightning.provenance import differing, read_starts, repository_state


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with cli.process_restored():
        yield


@pytest.fixture
def run() -> Path:
    Path("tiny.yaml").write_text(yaml.safe_dump(BASE))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    (folder,) = Path("runs/tiny").iterdir()
    return folder


def checkpoint_of(run: Path) -> Path:
    (path,) = run.glob("checkpoints/*.ckpt")
    return path


def test_the_same_run_comes_out_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(run), *TRUST]) == 0
    *_, metrics, weights, verdict = capsys.readouterr().out.splitlines()
    again = next(folder for folder in run.parent.iterdir() if folder.name != run.name)
    assert metrics == "metrics: 6 values up to step 20, all the same"
    assert weights == "weights: 2 tensors at step 20, all the same"
    assert verdict == f"reproduced: {run} and {again} are the same"
    assert len(read_starts(again)) == 1


def test_another_configuration_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 0.06"))
    assert main(["reproduce", str(run), *TRUST]) == 1
    said = capsys.readouterr().out
    assert "metrics: 2 of 6 values up to step 20 differ, the first at step 10: val/loss was" in said
    assert "weights: 2 of 2 tensors at step 20 differ, layer.weight by up to 0.0" in said
    assert f"not reproduced: {run} and " in said
    assert "inputs: config.model.init_args.lr was 0.05, is now 0.06\n" in said
    assert said.count("inputs:") == 1


def test_other_results_of_the_same_inputs_are_no_reproduction(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_of(run)
    checkpoint = read_checkpoint(path)
    checkpoint["state_dict"]["layer.bias"][0] = torch.nextafter(
        checkpoint["state_dict"]["layer.bias"][0], torch.tensor(9.0)
    )
    torch.save(checkpoint, path)
    assert main(["reproduce", str(run), *TRUST]) == 1
    said = capsys.readouterr().out
    assert "metrics: 6 values up to step 20, all the same" in said
    assert "weights: 1 of 2 tensors at step 20 differ, layer.bias by up to" in said
    assert "inputs: configuration, versions, hardware, code and data are the same" in said


def test_a_metric_that_is_gone_is_a_difference(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[0]["val/bleu"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["reproduce", str(run), *TRUST]) == 1
    assert "step 10: val/bleu was nothing, is now" in capsys.readouterr().out


def test_what_cannot_be_reproduced_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert main(["reproduce", "empty"]) == 2
    assert capsys.readouterr().err == "error: empty has no config.yaml, so it is no run folder\n"
    checkpoint_of(run).unlink()
    assert main(["reproduce", str(run), *TRUST]) == 2
    assert "has no checkpoint of a training run: there is nothing to" in capsys.readouterr().err
    assert main(["reproduce"]) == 2
    assert "The folder of a run of fit." in capsys.readouterr().out


def test_run_folder_and_checkpoint_say_where_they_come_from(run: Path) -> None:
    (start,) = read_starts(run)
    assert read_checkpoint(checkpoint_of(run))["provenance"] == start
    assert start["config"]["model"]["init_args"] == {"dim": 4, "lr": 0.05, "vocab_size": 6}
    assert start["config"]["seed_everything"] == 0
    assert start["versions"]["torch"] == torch.__version__
    assert start["hardware"]["threads"] == 1
    assert set(start["code"]) >= {"tx_lightning"}


def test_a_resumption_with_something_else_is_another_start(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--resume", str(run), *TRUST, "--trainer.max_epochs", "3"]
    assert main(words) == 0
    assert main(words) == 0
    first, second = read_starts(run)
    assert list(differing(first, second)) == [("config.trainer.max_epochs", 2, 3)]


def git(*words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


def test_the_state_of_a_repository(tmp_path: Path) -> None:
    assert repository_state(tmp_path) is None
    git("init", "-q")
    assert repository_state(tmp_path) is None  # there is no commit yet
    Path("a.py").write_text("one\n")
    Path(".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean: Any = repository_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["diff"] == ""
    assert clean["untracked"] == {}
    for name, text in (("a.py", "two\n"), ("new.py", "x"), ("ignored.py", "x"), ("b.bin", "x")):
        Path(name).write_text(text)
    changed: Any = repository_state(tmp_path)
    assert changed["commit"] == clean["commit"]
    assert changed["diff"].endswith("-one\n+two\n")
    assert list(changed["untracked"]) == ["new.py"]
    git("commit", "-q", "-a", "-m", "second")
    other: Any = repository_state(tmp_path)
    assert other["commit"] != clean["commit"]
    assert other["diff"] == ""


def test_differences_of_records() -> None:
    a = {"x": 1, "y": {"z": [1, 2], "same": None}, "gone": 3}
    b = {"x": 1, "y": {"z": [1, 3], "same": None}, "new": {"deep": 4}}
    found = list(differing(a, b))
    assert found == [("y.z", [1, 2], [1, 3]), ("gone", 3, None), ("new", None, {"deep": 4})]
    assert list(differing(a, a)) == []
