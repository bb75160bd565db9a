"""Which errors are one line, and that defects of the program are not."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import SGD

from tests.test_cli import BASE, config, only_run
from tx_lightning import commands
from tx_lightning.__main__ import main
from tx_lightning.configuration import ConfigurationParser
from tx_lightning.errors import PACKAGE, TRACEBACK, one_line


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, without W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = list(sys.path)
    commands.import_classes()
    yield
    sys.path[:] = path


def callback(name: str, **arguments: object) -> list[str]:
    words = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    return [f"--trainer.callbacks={name}", *words]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        # What Lightning refuses, and in which words.
        (["--trainer.val_check_interval=100"], "`val_check_interval` (100) must be less than or"),
        (
            callback("EarlyStopping", monitor="val/x"),
            "Early stopping conditioned on metric",
        ),
        (
            callback("ModelCheckpoint", monitor="val/x"),
            "could not find the monitored key",
        ),
        (callback("BatchSizeFinder"), "Field batch_size not found"),
        (
            ["--trainer.limit_train_batches=0.001"],
            "Please increase the `limit_train",
        ),
        # What a library's class refuses when it is built.
        (callback("EMAWeightAveraging", decay=7), "EMAWeightAveraging: Invalid decay value 7.0"),
        (["--trainer.logger=CometLogger"], "CometLogger: Requirement 'comet-ml>=3"),
        # What Lightning takes, and fails with a traceback later.
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches is 0; it must be at le"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch is 0; it must be at le"),
        (["--trainer.val_check_interval=0"], "val_check_interval is 0; it must be above 0"),
        (["--trainer.gradient_clip_val=-1"], "gradient_clip_val is -1; it must be at least 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_what_lightning_finds_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["fit", "--config", config("tiny", **BASE), *words]) in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert says in said[0]


def test_a_package_that_is_not_installed_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    words = callback("DeviceStatsMonitor")
    assert main(["fit", "--config", config("tiny", **BASE), *words]) == 1
    assert "error: `DeviceStatsMonitor` cannot log CPU stats as" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    base = config("tiny", **BASE)
    assert main(["fit", "--config", base, "--trainer.max_epochs=1"]) == 0
    (checkpoint,) = only_run().glob("checkpoints/*.ckpt")
    capsys.readouterr()
    words = ["--ckpt_path", str(checkpoint), "--model_from=config", "--model.dim=2"]
    for verb in ("fit", "test"):
        assert main([verb, "--config", base, *words, "--name", verb]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(
            "error: the weights of the checkpoint do not fit TinyTask: size mismatch for layer.wei"
        )
        assert line.endswith("or --pretrained to take the weights that fit")


def built(kind: Any, *words: str) -> Any:
    parser = ConfigurationParser()
    parser.add_argument("--it", type=kind)
    return parser.instantiate(parser.parse_args(words)).it


def caught(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    pytest.fail("there was no error")


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(1))]


CONVOLUTION = {
    "class_path": "torch.nn.Conv1d",
    "init_args": {"in_channels": 3, "out_channels": 2, "kernel_size": 1, "groups": 2},
}


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (
            lambda: built(OptimizerCallable, "--it=torch.optim.AdamW", "--it.lr=-1")(parameters()),
            "AdamW: Invalid learning rate: -1.0",
        ),
        (
            lambda: built(LRSchedulerCallable, "--it=OneCycleLR", "--it.max_lr=1")(
                SGD(parameters(), lr=1.0)
            ),
            "OneCycleLR: You must define either total_steps OR",
        ),
        (
            lambda: built(nn.Module, f"--it={json.dumps(CONVOLUTION)}"),
            "Conv1d: in_channels must be divisible by groups",
        ),
    ],
)
def test_what_a_class_of_a_library_refuses_is_one_line(
    action: Callable[[], object], says: str
) -> None:
    line = one_line(caught(action))
    assert line is not None
    assert line.startswith(says)


def test_memory_that_does_not_suffice_is_one_line() -> None:
    for action in (lambda: torch.empty(2**60), lambda: torch.empty(10**10, 10**10)):
        line = one_line(caught(action))
        assert line is not None
        assert line.startswith("there is not enough memory: ")
    assert one_line(MemoryError("no more")) == (
        "there is not enough memory: no more; take a smaller network or smaller batches"
    )
    assert one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to")) is not None


def test_misuse_of_wandb_is_one_line() -> None:
    from wandb.errors import CommError, UsageError

    assert one_line(UsageError("api_key not\nconfigured")) == "api_key not configured"
    assert one_line(CommError("Run is gone")) == "Run is gone"


def fault_in(file: Path, body: str) -> BaseException:
    """The error of code that is in a file."""
    scope: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(compile(f"def act():\n    {body}", str(file), "exec"), scope)
    return caught(scope["act"])


OURS, THEIRS = PACKAGE / "tasks" / "made_up.py", Path("/home/me/research/model.py")


@pytest.mark.parametrize("file", [OURS, THEIRS])
@pytest.mark.parametrize(
    "body",
    [
        "torch.ones(2) @ torch.ones(3)",
        "nn.Linear(2, 2)(torch.ones(3))",
        "nn.Linear(2, 2).load_state_dict({})",
        "torch.optim.SGD([], lr=1.0)",  # a ValueError, but nobody asked for no parameters
        "raise RuntimeError('what should not happen')",
        "raise KeyError('x')",
        "assert False",
        "None.x",
        "[][1]",
        "len(3)",
        "1 / 0",
        "import no_such_package",
    ],
)
def test_a_defect_shows_its_traceback(file: Path, body: str) -> None:
    assert one_line(fault_in(file, body)) is None


def test_a_refusal_of_ours_is_one_line_and_of_a_users_class_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = "raise ValueError('size is 0; it must be at least 1')"
    assert one_line(fault_in(OURS, body)) == "size is 0; it must be at least 1"
    assert one_line(fault_in(THEIRS, body)) is None
    assert one_line(fault_in(OURS, "open('nowhere')")) == "nowhere: No such file or directory"
    monkeypatch.setenv(TRACEBACK, "1")
    assert one_line(fault_in(OURS, body)) is None
    assert one_line(MemoryError()) is None


def test_a_defect_in_a_run_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by Lightning, and with the error raised in torch."""

    def broken(*_: object) -> None:
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("tx_lightning.callbacks.run_record.RunRecord.on_fit_start", broken)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["fit", "--config", config("tiny", **BASE)])
