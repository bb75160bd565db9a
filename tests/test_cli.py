"""The command line from words to files, with a task and data of a few rows."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from tests import wandb_file
from tests.stand_ins import TRUST, TinyTask
from tx_lightning import __version__, cli, commands
from tx_lightning.__main__ import VERBS, main
from tx_lightning.callbacks.progress_bar import ProgressBar
from tx_lightning.checkpoints import load_task, read_checkpoint
from tx_lightning.errors import TRACEBACK
from tx_lightning.loggers import read_metrics
from tx_lightning.nn import linear

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    "model": {"class_path": "tests.stand_ins.TinyTask", "init_args": {"lr": 0.05}},
    "data": {"class_path": "tests.stand_ins.TinyData"},
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
MID_EPOCH = "ignore:You're resuming from a checkpoint that ended before the epoch ended"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, without W&B and without the rest of the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with cli.process_restored():
        yield


def config(name: str, **sections: Any) -> str:
    """Write a YAML file and return its path."""
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(sections))
    return str(path)


@pytest.fixture
def base() -> str:
    return config("tiny", **BASE)


def only_run(name: str = "tiny") -> Path:
    (folder,) = Path("runs", name).iterdir()
    return folder


def weights(checkpoint: Path) -> torch.Tensor:
    tensor: torch.Tensor = read_checkpoint(checkpoint)["state_dict"]["layer.weight"]
    return tensor


def test_a_run_has_a_folder_with_all_it_takes_to_repeat_it(base: str) -> None:
    assert main(["fit", "--config", base]) == 0
    folder = only_run()
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints"}
    assert [row["val/bleu"] for row in read_metrics(folder / "metrics.jsonl")] == [10.0, 20.0]
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    first, second = sorted(Path("runs/tiny").iterdir())
    (one,), (other,) = first.glob("checkpoints/*.ckpt"), second.glob("checkpoints/*.ckpt")
    assert torch.equal(weights(one), weights(other))


def test_any_task_is_evaluated_at_the_step_of_its_checkpoint() -> None:
    saving = {"save_top_k": -1, "monitor": "val/loss", "mode": "max"}  # the first is the best
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    saved = config("saved", trainer={"callbacks": [saver]})
    words = ["--config", config("tiny", **BASE), "--config", saved]
    assert main(["fit", *words, "--test_after", "true"]) == 0

    def tested(folder: Path) -> list[int]:
        return [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "test/loss" in row]

    assert tested(only_run()) == [10]
    for checkpoint in only_run().glob("checkpoints/*.ckpt"):
        step = read_checkpoint(checkpoint)["global_step"]
        assert main(["test", *words, "--ckpt_path", str(checkpoint), "--name", str(step)]) == 0
        assert tested(only_run(str(step))) == [step]
    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "10", "20"}


def test_a_checkpoint_is_enough_to_rebuild_the_task(base: str) -> None:
    assert main(["fit", "--config", base]) == 0
    (checkpoint,) = only_run().glob("checkpoints/*.ckpt")
    task = load_task(checkpoint, trust="tests")
    assert isinstance(task, TinyTask)
    assert task.settings == {
        "class_path": "tests.stand_ins.TinyTask",
        "init_args": {"vocab_size": 6, "dim": 4, "lr": 0.05},
    }
    assert torch.equal(task.layer.weight, weights(checkpoint))
    assert read_checkpoint(checkpoint)["metrics"]["val/bleu"] == 20.0


def test_files_merge_in_order_and_words_come_last(base: str) -> None:
    overlay = config("overlay", model={"init_args": {"dim": 2}}, data={"init_args": {"batches": 3}})
    words = ["--config", base, "--config", overlay, "--data.batches", "5", "--name", "other"]
    line = cli.CommandLine(words, run=False)
    model, data = line.config.model.init_args, line.config.data.init_args
    assert (model.dim, model.lr, data.batches) == (2, 0.05, 5)
    assert not line.config.trainer.use_distributed_sampler
    assert not line.config.trainer.enable_autolog_hparams
    assert line.folder is not None
    assert line.folder.parent == Path.cwd() / "runs" / "other"


def test_linked_values_follow_and_cannot_be_set_apart(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", base, "--data.vocab_size", "8", "--seed_everything", "3"]
    line = cli.CommandLine(words, run=False)
    assert line.model.layer.out_features == 8
    assert line.config.data.init_args.seed == 3
    assert cli.CommandLine([*words, "--model.vocab_size", "8"], run=False).config
    for words, says in (
        (["--model.vocab_size", "7"], "model.vocab_size=7 contradicts data.vocab_size=6"),
        (["--data.seed=4"], "data.seed=4 contradicts seed_everything=0"),
    ):
        assert main(["fit", "--config", base, *words]) == 2
        assert says in capsys.readouterr().err


def test_the_precision_of_products_is_that_of_the_run(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_BFLOAT16", True)
    cli.CommandLine(["--config", base, "--matmul_precision", "medium"], run=False)
    assert linear._rounded
    cli.CommandLine(["--config", base], run=False)
    assert not linear._rounded


def test_the_bar_is_ours_unless_one_is_given(base: str) -> None:
    words = ["--config", base, "--trainer.enable_progress_bar", "true"]
    line = cli.CommandLine(words, run=False)
    assert type(line.trainer.progress_bar_callback) is ProgressBar
    words += ["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks.refresh_rate=7"]
    bar = cli.CommandLine(words, run=False).trainer.progress_bar_callback
    assert type(bar) is TQDMProgressBar
    assert bar.refresh_rate == 7
    assert cli.CommandLine(["--config", base], run=False).trainer.progress_bar_callback is None


def test_a_run_goes_on_where_it_ended(base: str) -> None:
    assert main(["fit", "--config", base, "--name", "whole", "--trainer.max_epochs", "3"]) == 0
    assert main(["fit", "--config", base]) == 0
    folder = only_run()
    assert main(["fit", "--resume", str(folder), *TRUST, "--trainer.max_epochs", "3"]) == 0
    assert list(Path("runs/tiny").iterdir()) == [folder]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [10, 20, 30]
    (whole,) = only_run("whole").glob("checkpoints/*.ckpt")
    assert torch.equal(weights(folder / "checkpoints" / whole.name), weights(whole))
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


@pytest.mark.filterwarnings(MID_EPOCH)
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_saves_at_the_step_boundary_and_says_how_to_go_on(
    base: str, capsys: pytest.CaptureFixture[str], name: str, status: int
) -> None:
    """Also within an accumulation window, whose gradients must not be lost."""
    stop = {"class_path": "tests.stand_ins.SignalAt", "init_args": {"batch": 13, "name": name}}
    accumulated = config("stop", trainer={"accumulate_grad_batches": 2, "callbacks": [stop]})
    handler = signal.getsignal(signal.Signals[name])
    assert main(["fit", "--config", base, "--config", accumulated]) == status
    assert signal.getsignal(signal.Signals[name]) == handler
    folder = only_run()
    interrupted = folder / "checkpoints" / "interrupted.ckpt"
    assert read_checkpoint(interrupted)["global_step"] == 7  # 13 batches began: 14 are done
    go_on = f"to go on: tx-lightning fit --resume {folder} --trust tests"
    assert go_on in capsys.readouterr().err

    assert main(go_on.split()[4:]) == 0
    assert not interrupted.exists()
    words = ["--name=whole", "--trainer.accumulate_grad_batches=2"]
    assert main(["fit", "--config", base, *words]) == 0
    (whole,) = only_run("whole").glob("checkpoints/*.ckpt")
    assert torch.equal(weights(folder / "checkpoints" / whole.name), weights(whole))


def test_a_run_stopped_after_its_last_step_does_what_comes_at_the_end(base: str) -> None:
    words = ["--trainer.max_steps", "20", "--trainer.max_epochs", "-1"]
    assert main(["fit", "--config", base, *words]) == 0
    (last,) = only_run().glob("checkpoints/*.ckpt")
    interrupted = last.with_name("interrupted.ckpt")
    interrupted.write_bytes(last.read_bytes())
    assert main(["fit", "--resume", str(only_run()), *TRUST]) == 0
    assert not interrupted.exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(base: str) -> None:
    stop = {"class_path": "tests.stand_ins.SignalAt", "init_args": {"batch": 15, "name": "SIGKILL"}}
    overlay = config("stop", trainer={"callbacks": [stop]})
    killed = subprocess.run(
        [sys.executable, "-m", "tx_lightning", "fit", "--config", base, "--config", overlay],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (command,) = (line for line in killed.stdout.splitlines() if "go on with" in line)
    folder = only_run()
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    assert read_checkpoint(checkpoint)["global_step"] == 10
    assert main(command.partition("tx-lightning ")[2].split()) == 0
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [10, 20]


def test_a_run_is_not_started_again_over_damaged_checkpoints(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base]) == 0
    (checkpoint,) = only_run().glob("checkpoints/*.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["fit", "--resume", str(only_run()), *TRUST]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: none of the 1 checkpoints in")
    assert main(["fit", "--resume", "runs"]) == 2


def test_the_model_section_may_come_from_the_checkpoint(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base, "--model.dim", "4"]) == 0
    (checkpoint,) = only_run().glob("checkpoints/*.ckpt")
    data = config("data", **{key: value for key, value in BASE.items() if key != "model"})
    words = ["test", "--config", data, "--ckpt_path", str(checkpoint), *TRUST]
    capsys.readouterr()
    assert main(words) == 0
    assert f"model section: from checkpoint {checkpoint}" in capsys.readouterr().out
    recorded = yaml.safe_load((only_run("data") / "config.yaml").read_text())
    assert recorded["model"]["init_args"]["lr"] == 0.05
    assert main(["test", "--config", data]) == 2
    assert "no model section" in capsys.readouterr().err
    assert main([*words, "--data.vocab_size", "7"]) == 2
    assert "data.vocab_size is 7, the checkpoint's 6" in capsys.readouterr().err


def test_neither_model_section_silently_replaces_the_other(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base]) == 0
    (checkpoint,) = only_run().glob("checkpoints/*.ckpt")
    words = ["test", "--config", base, "--ckpt_path", str(checkpoint)]
    assert main(words) == 0
    capsys.readouterr()
    words += ["--model.lr", "0.5"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "model.lr: 0.5 here, 0.05 there" in said
    assert "dim" not in said
    for whose, lr in (("config", 0.5), ("checkpoint", 0.05)):
        assert main([*words, "--model_from", whose, "--name", whose]) == 0
        recorded = yaml.safe_load((only_run(whose) / "config.yaml").read_text())
        assert recorded["model"]["init_args"]["lr"] == lr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.vocab_sze=7"], "TinyTask has no parameter 'vocab_sze' (did you mean 'vocab_s"),
        (["--trainer.max_epcohs", "7"], "no 'trainer.max_epcohs' (did you mean 'max_epochs'?)"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs: x is not int or null"),
        (["--config", "tny.yaml"], "--config tny.yaml: there is no such file (did you mean 'tiny."),
        (["--model", "tests.stand_ins.TinyTusk"], "no class 'TinyTusk' (did you mean 'TinyTask'?)"),
        (["--model", "tests.stand_in.TinyTask"], "No module named 'tests.stand_in'"),
        (["--data", "TinyDatum"], "there is no class 'TinyDatum' (did you mean 'TinyData'?)"),
        (["--trainer.callbacks+=Nothing"], "there is no class 'Nothing'"),
        (["--trainer.strategy=none"], "trainer: You selected an invalid strategy name"),
        (["--resume", "nowhere"], "--resume nowhere: it has no config.yaml"),
        (["--ckpt_path", "no.ckpt"], "checkpoint no.ckpt: there is no such file"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(
    base: str, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["fit", "--config", base, *words]) in (1, 2)
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: {class_path: TinyTask}", "bad.yaml: there is no 'modle' (did you mean 'model'?)"),
        ("model: {init_args: {dims: 3}}", "bad.yaml: model: TinyTask has no parameter 'dims' (did"),
        ("model: {init_args: {dim: three}}", "model.dim: three is not int"),
        ("model: {class_path: TinyTask, dim: 2}", "'dim' stands beside class_path"),
        (
            "trainer: {callbacks: [{class_path: LearningRateMonitr}]}",
            "trainer.callbacks.0: there is no class 'LearningRateMonitr' (did you mean 'Learni",
        ),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {montor: x}}]}",
            "trainer.callbacks.0: ModelCheckpoint has no parameter 'montor' (did you mean",
        ),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: all}}]}",
            "trainer.callbacks.0.save_top_k: all is not int",
        ),
        ("trainer: [", "bad.yaml is not YAML"),
        ("just a sentence", "bad.yaml holds no keys, but str"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(
    base: str, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    Path("bad.yaml").write_text(text)
    assert main(["fit", "--config", base, "--config", "bad.yaml"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) <= 3
    assert not Path("runs").exists()


def test_errors_of_the_user_are_one_line_and_defects_are_not(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["test", "--config", base, "--ckpt_path", base]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: checkpoint {base} cannot be read: it is not a checkpoint"
    with pytest.raises(ValueError, match="dim=3 must be even"):  # the task is not of this package
        main(["fit", "--config", base, "--model.dim=3"])
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        main(["test", "--config", base, "--ckpt_path", base])


def test_what_a_run_told_wandb_can_be_read_back(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["fit", "--config", base, "--trainer.max_epochs=4"]) == 0
    assert "wandb sync runs/tiny/" in capsys.readouterr().out
    run = wandb_file.read(only_run())
    assert run.job_type == "fit"
    assert run.config["model"]["init_args"] == {"vocab_size": 6, "dim": 4, "lr": 0.05}
    assert run.config["trainer"]["max_epochs"] == 4
    assert run.config["n_parameters"] == 6 * 4 + 6
    assert run.config["data_statistics"] == {"pairs": 10}
    assert run.config["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    scores = [row["val/bleu"] for row in run.history if "val/bleu" in row]
    assert scores == [10.0, 20.0, 30.0, 30.0]
    assert run.summary["val/bleu"] == {"max": 30.0}
    assert run.metrics["val/bleu"].step_metric == "trainer/global_step"


def test_every_class_of_the_package_has_its_short_name() -> None:
    commands.import_classes()
    for module in Path(cli.__file__).parent.rglob("*.py"):
        relative = module.relative_to(ROOT).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        assert name in sys.modules or name.endswith("__main__")


def test_what_needs_no_torch_is_answered_without_it() -> None:
    program = (
        "import sys; from tx_lightning.__main__ import main\n"
        "assert main([]) == main(['--help']) == main(['--version']) == 0\n"
        "assert main(['fti', '--config', 'x']) == 2\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"tx-lightning {__version__}" in done.stdout
    assert "'fti' is not a verb; did you mean 'fit'?" in done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_the_help_of_a_verb_has_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--trainer.max_epochs" in said
    assert ("--resume" in said) == (verb == "fit")


def test_the_version_is_that_of_the_project() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_a_model_section_that_this_version_does_not_know_is_refused(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base]) == 0
    (path,) = only_run().glob("checkpoints/*.ckpt")
    checkpoint = read_checkpoint(path)
    checkpoint["tx_lightning"]["task"]["init_args"]["width"] = 3
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert main(["test", "--config", base, "--ckpt_path", str(path)]) == 2
    said = capsys.readouterr().err
    assert "is not accepted" in said
    assert "width" in said
    words = ["test", "--config", base, "--ckpt_path", str(path), "--model_from", "config"]
    assert main(words) == 0


def test_options_cannot_be_abbreviated(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is read ahead of the parser, as --ckpt_path and --resume, has one spelling."""
    assert main(["test", "--config", base, "--ckpt", base]) == 2
    assert "there is no 'ckpt' (did you mean 'ckpt_path'?)" in capsys.readouterr().err


def test_training_does_not_go_on_from_weights_alone(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base]) == 0
    (path,) = only_run().glob("checkpoints/*.ckpt")
    assert main(["average", str(path), "--output", "averaged.ckpt", *TRUST]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", base, "--ckpt_path", "averaged.ckpt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "averaged.ckpt holds weights alone" in line
    assert line.endswith("start from them with --pretrained averaged.ckpt")
    assert main(["test", "--config", base, "--ckpt_path", "averaged.ckpt"]) == 0


def test_a_checkpoint_that_lightning_cannot_restore_is_one_line(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", base]) == 0
    (path,) = only_run().glob("checkpoints/*.ckpt")
    checkpoint = read_checkpoint(path)
    words = ["fit", "--config", base, "--ckpt_path", str(path), "--trainer.max_epochs", "3"]
    states: list[dict[str, Any]] = [{"state": {}}, {"state": {}, "param_groups": []}]
    for state in states:
        torch.save({**checkpoint, "optimizer_states": [state]}, path)
        capsys.readouterr()
        assert main(words) == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: checkpoint {path} cannot be restored: ")


def test_checkpoints_are_always_read_without_code(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    @functools.wraps(Trainer.validate)
    def validate(trainer: Trainer, **options: Any) -> None:
        asked.append(options["weights_only"])

    monkeypatch.setattr(Trainer, "validate", validate)
    assert main(["validate", "--config", base]) == 0
    assert asked == [True]
    assert main(["fit", "--config", base, "--weights_only", "false"]) == 2
    assert "weights_only=false: checkpoints hold nothing" in capsys.readouterr().err


def test_consent_is_needed_where_a_file_names_the_classes(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not where the user's own configuration does."""
    assert main(["fit", "--config", base]) == 0
    said = capsys.readouterr().out
    folder = only_run()
    assert f"go on with: tx-lightning fit --resume {folder} --trust tests\n" in said
    assert main(["fit", "--resume", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/config.yaml names code that is not part of tx_light")
    assert "tests.stand_ins.TinyTask (model), tests.stand_ins.TinyData (data)" in line
    (path,) = folder.glob("checkpoints/*.ckpt")
    assert main(["test", "--config", base, "--ckpt_path", str(path)]) == 0
