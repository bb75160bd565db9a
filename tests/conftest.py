"""Every test runs on one thread, without a display, a network or the user's cache."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch

from tx_lightning.nn.linear import set_matmul_precision

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
# Named data sets of the user must not decide what a test sees: only `real_data` brings them back.
_REAL_DATA = Path(os.environ.pop("TX_LIGHTNING_DATA", "") or _BESIDE).expanduser().resolve()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test its own cache, its own W&B folder, a seed, one thread, exact products."""
    monkeypatch.setenv("TX_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    set_matmul_precision("highest", "cpu")
    if "wandb" in sys.modules:
        import wandb

        if wandb.run is not None:  # a process has one; a test must not write to another's
            wandb.finish()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data: $TX_LIGHTNING_DATA, or ../shared/data beside the project."""
    if not (_REAL_DATA / "multi30k").is_dir():
        pytest.skip(
            f"no real data: set TX_LIGHTNING_DATA to a folder with multi30k ({_REAL_DATA} has none)"
        )
    return _REAL_DATA
