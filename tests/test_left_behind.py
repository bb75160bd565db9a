"""What a test can leave behind is reported after it and restored: an offender of each kind."""

import gc
import locale
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.left_behind import Guard
from tests.process_state import PROBES
from tests.stand_ins import free_port
from tx_lightning.data import writing
from tx_lightning.nn.linear import set_matmul_precision

ROOT = Path(__file__).resolve().parents[1]
LOGGER = logging.getLogger("tx_lightning.tests")


def ignore(*_: Any) -> None:
    """A handler, hook or replacement."""


def let_through(record: logging.LogRecord) -> bool:
    return True


def freeze() -> None:
    gc.freeze()  # the one of the time of the test


def set_environment() -> None:
    os.environ["MASTER_PORT"] = "1"
    os.environ["WANDB_MODE"] = "online"
    del os.environ["MPLBACKEND"]


def initialize_process_group() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def draw() -> None:
    import matplotlib.pyplot as plt

    plt.figure()


def use_wandb(*, finish: bool) -> None:
    import wandb

    run = wandb.init(mode="offline", settings=wandb.Settings(console="off", silent=True))
    if finish:
        run.finish()


# What each does to the process, and what the report says of it.
OFFENDERS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "environment": (
        set_environment,
        [
            "environment variable MASTER_PORT: nothing -> '1'",
            "environment variable MPLBACKEND: 'agg' -> nothing",
            "environment variable WANDB_MODE: 'offline' -> 'online'",
        ],
    ),
    "directory": (lambda: os.chdir("/"), ["current directory: "]),
    "sys.path": (lambda: sys.path.append("/elsewhere"), ["sys.path: "]),
    "signal": (lambda: signal.signal(signal.SIGUSR1, ignore), ["handler of SIGUSR1: "]),
    "level": (lambda: LOGGER.setLevel(logging.ERROR), ["logger tx_lightning.tests: (0, "]),
    "handler": (lambda: LOGGER.addHandler(logging.NullHandler()), ["logger tx_lightning.tests: "]),
    "filter": (lambda: LOGGER.addFilter(let_through), ["logger tx_lightning.tests: "]),
    "propagation": (lambda: setattr(LOGGER, "propagate", False), ["logger tx_lightning.tests: "]),
    "root logger": (lambda: logging.root.setLevel(5), ["logger root: "]),
    "logging": (lambda: logging.disable(logging.INFO), ["logging.disable: 0 -> 20"]),
    "stdout": (lambda: setattr(sys, "stdout", sys.__stderr__), ["sys stdout: "]),
    "stderr": (lambda: setattr(sys, "stderr", sys.__stdout__), ["sys stderr: "]),
    "excepthook": (lambda: setattr(sys, "excepthook", ignore), ["sys excepthook: "]),
    "thread hook": (lambda: setattr(threading, "excepthook", ignore), ["sys thread: "]),
    "locale": (lambda: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"), ["locale: "]),
    "errstate": (lambda: np.seterr(divide="raise"), ["numpy errstate divide: 'warn' -> 'raise'"]),
    "printing": (
        lambda: np.set_printoptions(precision=2),
        ["numpy print option precision: 8 -> 2"],
    ),
    "collector": (gc.disable, ["gc enabled: True -> False"]),
    "frozen": (freeze, ["gc.freeze was called"]),
    "figure": (draw, ["matplotlib figures: 0 -> 1"]),
    "rank": (lambda: setattr(rank_zero_only, "rank", 1), ["rank_zero_only.rank: 0 -> 1"]),
    "function mode": (lambda: TorchFunctionMode().__enter__(), ["modes of torch: [] -> ['<torch"]),
    "dispatch mode": (lambda: TorchDispatchMode().__enter__(), ["modes of torch: [] -> ['<torch"]),
    "device": (
        lambda: torch.set_default_device("meta"),
        ["modes of torch: [] -> ['default device meta']"],
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), ["default dtype: "]),
    "threads": (lambda: torch.set_num_threads(2), ["torch threads: 1 -> 2"]),
    "matmul": (lambda: torch.set_float32_matmul_precision("high"), ["float32 matmul precision: "]),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        ["deterministic algorithms: 0 -> 2"],
    ),
    "grad": (lambda: torch.set_grad_enabled(False), ["grad mode: True -> False"]),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), ["autocast cpu: (False, "]),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), ["anomaly detection: False -> "]),
    "stance": (lambda: torch.compiler.set_stance("force_eager"), ["compiler stance: 'default' "]),
    "kernel": (
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        ["attention kernel flash: True -> False"],
    ),
    "generator": (
        lambda: setattr(torch, "default_generator", torch.Generator()),
        ["patched: torch.default_generator"],
    ),
    "clock": (lambda: setattr(time, "sleep", ignore), ["patched: time.sleep"]),
    "constant": (
        lambda: setattr(writing, "CHUNK", 4),
        ["patched: tx_lightning.data.writing.CHUNK"],
    ),
    "process group": (initialize_process_group, ["process group: False -> True", "sys excepthook"]),
    "module": (
        lambda: sys.modules.__setitem__("wandb.errors", sys),
        ["sys.modules: another wandb.errors"],
    ),
    "temporary file": (tempfile.mkdtemp, ["temporary file: "]),
    "run of wandb": (lambda: use_wandb(finish=False), ["wandb.run: "]),
}


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A guard with a checkout and a folder for temporary files of its own."""
    monkeypatch.setattr(gc, "freeze", gc.freeze)  # that of the guard of this test
    for name in ("checkout/tests", "temporary", "test"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    import wandb.errors  # noqa: F401

    return Guard(tmp_path / "checkout", tmp_path / "temporary", patience=0.1)


@pytest.mark.parametrize("kind", OFFENDERS)
def test_what_is_left_behind_is_reported_and_restored(
    kind: str, guard: Guard, tmp_path: Path
) -> None:
    """That it is restored, the guard of this test itself sees."""
    leave, reports = OFFENDERS[kind]
    assert guard.check(tmp_path / "test") == []
    leave()
    found = guard.check(tmp_path / "test")
    assert len(found) == len(reports), found
    for line, report in zip(found, reports, strict=True):
        assert line.startswith(report)


def test_every_switch_has_an_offender() -> None:
    reports = [report for _, reports in OFFENDERS.values() for report in reports]
    for probe in PROBES:
        if probe.what != "inference mode":  # nothing but its context manager sets it
            assert any(report.startswith(probe.what) for report in reports), probe.what


def test_inference_mode_is_reported_and_left(guard: Guard) -> None:
    mode = torch.inference_mode()
    mode.__enter__()
    assert "inference mode: False -> True" in guard.check(None)
    assert not torch.is_inference_mode_enabled()


def test_a_thread_is_reported(guard: Guard) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()
    assert guard.check(None) == ["thread: left"]
    assert guard.check(None) == []  # it is the fault of one test
    end.set()
    thread.join()


def test_a_thread_that_is_about_to_end_is_waited_for(guard: Guard) -> None:
    threading.Thread(target=time.sleep, args=(0.02,)).start()
    assert guard.check(None) == []


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize("ended", [False, True])
def test_a_process_is_reported_and_ended(ended: bool, guard: Guard) -> None:
    process = subprocess.Popen(["sleep", "0" if ended else "60"])
    if ended:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    (found,) = guard.check(None)
    said = "that nobody waited for" if ended else "sleep 60"
    assert found.strip() == f"child process: {process.pid} {said}"
    assert guard.check(None) == []
    process.wait()


@needs_proc
def test_a_store_of_torch_is_reported(guard: Guard) -> None:
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    found = guard.check(None)
    assert found
    assert all(line.startswith("open file: socket:") for line in found)
    del store


@needs_proc
def test_an_open_file_in_the_folder_of_the_test_is_reported(guard: Guard, tmp_path: Path) -> None:
    with (tmp_path / "test" / "a").open("w"), (tmp_path / "b").open("w"):
        assert guard.check(tmp_path / "test") == [f"open file: {tmp_path / 'test' / 'a'}"]


@needs_proc
def test_what_only_the_collector_can_close_is_no_fault(guard: Guard, tmp_path: Path) -> None:
    cycle: list[Any] = [os.fdopen(os.open(tmp_path / "test" / "a", os.O_CREAT), "rb")]
    cycle.append(cycle)
    del cycle
    with pytest.warns(ResourceWarning):
        found = guard.check(tmp_path / "test")
    assert found == []


@pytest.mark.parametrize("name", ["runs", "wandb", "lightning_logs", ".hypothesis", "tests/a.txt"])
def test_a_file_in_the_checkout_is_reported(name: str, guard: Guard, tmp_path: Path) -> None:
    for cache in ("__pycache__", ".pytest_cache", "tests/__pycache__"):
        (tmp_path / "checkout" / cache).mkdir()
    assert guard.check(None) == []
    (tmp_path / "checkout" / name).mkdir()
    assert guard.check(None) == [f"file in the checkout: {tmp_path / 'checkout' / name}"]
    assert guard.check(None) == []


def test_a_module_from_the_folder_of_the_test_is_reported(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test" / "left_module.py").write_text("")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "test")
        __import__("left_module")
    assert "left_module" in sys.modules
    path = tmp_path / "test" / "left_module.py"
    assert guard.check(tmp_path / "test") == [f"sys.modules: left_module from {path}"]
    assert "left_module" not in sys.modules


def test_the_precision_of_products_is_reported(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tx_lightning.nn import linear

    monkeypatch.setattr(linear, "_BFLOAT16", True)
    guard.check(None)
    set_matmul_precision("medium", "cpu")
    assert guard.check(None) == ["patched: tx_lightning.nn.linear._rounded"]
    assert not linear._rounded


def test_the_service_of_wandb_is_ended(guard: Guard) -> None:
    use_wandb(finish=True)
    assert guard.check(None) == []
    assert "WANDB_SERVICE" not in os.environ
    assert sys.excepthook is sys.__excepthook__


SUITE = """
import os

import pytest


@pytest.fixture(scope="module")
def shared():
    os.environ["LEFT"] = "by a shared fixture"


def test_one(shared):
    pass


def test_two(shared, monkeypatch, tmp_path):
    assert "LEFT" not in os.environ
    monkeypatch.setenv("LEFT", "and taken back")
    monkeypatch.chdir(tmp_path)


def test_three():
    os.environ["LEFT"] = "by a test that fails"
    raise ValueError


def test_four(tmp_path):
    assert "LEFT" not in os.environ
    os.environ["WANDB_MODE"] = "online"


def test_five():
    assert os.environ["WANDB_MODE"] == "offline"
"""


def test_the_suite_checks_it_after_each_test(tmp_path: Path) -> None:
    """After all fixtures, also those of a module, and after a test that failed."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    words = ["-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *words,
            "--basetemp",
            tmp_path / "base",
            tmp_path / "test_suite.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "1 failed, 4 passed, 3 errors" in done.stdout
    for name, value in {
        "one": "LEFT: nothing -> 'by a shared fixture'",
        "three": "LEFT: nothing -> 'by a test that fails'",
        "four": "WANDB_MODE: 'offline' -> 'online'",
    }.items():
        line = rf"ERROR at teardown of test_{name} _+\nleft behind: environment variable {value}\n"
        assert re.search(line, done.stdout), done.stdout
