"""Every test runs on one thread, without a display, a network or the user's settings and caches.

Nothing is left behind from one test to the next (left_behind.py), so their order is free.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Set by the user for this package and W&B, or by a scheduler or a launcher: it would change what a
# test sees.
_OF_THE_USER = ("TX_LIGHTNING_", "WANDB_", "PL_", "SLURM_", "TORCHELASTIC_")
_OF_A_LAUNCHER = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
_REAL_DATA = "REAL_DATA_OF_TESTS"  # $TX_LIGHTNING_DATA, for `real_data` alone and for workers
if os.environ.get("TX_LIGHTNING_DATA"):
    os.environ[_REAL_DATA] = os.environ["TX_LIGHTNING_DATA"]
for _name in list(os.environ):
    if _name.startswith(_OF_THE_USER) or _name in _OF_A_LAUNCHER:
        del os.environ[_name]
# The folders of pytest stay where they always are. This one, deleted in the end, is for the rest;
# its path is short, since sockets of wandb lie in it.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
_FOLDER = Path(tempfile.mkdtemp(prefix="tx-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"]))
# By whoever leaves last: multiprocessing and wandb have folders there until the end.
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["TMPDIR"] = tempfile.tempdir = str(_FOLDER)
for _name in (
    "TX_LIGHTNING_CACHE", "HF_HOME", "HYPOTHESIS_STORAGE_DIRECTORY", "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_DIR",
):  # fmt: skip
    os.environ[_name] = str(_FOLDER / _name.lower())
    (_FOLDER / _name.lower()).mkdir()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import random

import hypothesis
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import WarningCache  # type: ignore[attr-defined]

from tests.left_behind import Guard

torch.set_num_threads(1)
# What libraries warn of once per process would reach only the first of the tests that cause it.
torch.set_warn_always(True)
WarningCache.add = lambda self, message: None  # type: ignore[method-assign]
# Examples are the same in each run, and none fails because the machine was busy.
hypothesis.settings.register_profile(
    "tests",
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")

_guard = pytest.StashKey[Guard]()
_failures = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # a worker has none
        pytest_terminal_summary(reporter, session.config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how to repeat a random order, first for runs that are killed, and at the end again."""
    if config.pluginmanager.has_plugin("randomly"):
        seed = config.getoption("randomly_seed")
        terminalreporter.write_line(f"random order: make test-random SEED={seed}")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    session = item.session
    if _guard not in session.stash:
        session.stash[_guard] = Guard(Path(__file__).resolve().parents[1], _FOLDER)
    session.stash[_failures] = session.testsfailed
    yield


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Function) -> Generator[None]:
    """Fail a test that has left something behind, when all its fixtures are torn down."""
    session = item.session
    tmp_path: Any = item.funcargs.get("tmp_path")
    if session.testsfailed > session.stash[_failures]:
        tmp_path = None  # a traceback may hold open files
    try:
        yield
    finally:
        item.funcargs.clear()  # these too
        left = session.stash[_guard].check(tmp_path)
    if left:
        pytest.fail(f"left behind: {'; '.join(left)}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Give a shared fixture the same seed, whichever test asks for it first."""
    if fixturedef.scope != "function":
        _seed()
    return (yield)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # what Lightning seeds
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache and a W&B folder of its own, and a seed."""
    monkeypatch.setenv("TX_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _seed()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data: $TX_LIGHTNING_DATA, or ../shared/data beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(_REAL_DATA, beside)).expanduser().resolve()
    if not (folder / "multi30k").is_dir():
        pytest.skip(
            f"no real data: set TX_LIGHTNING_DATA to a folder with multi30k ({folder} has none)"
        )
    return folder
