"""Every run has a folder of its own: runs/<name>/<time>, the same on all its processes.

It holds config.yaml, metrics.jsonl, checkpoints/, wandb/ and what callbacks write.
"""

import itertools
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
# Files that training appends to; a checkpoint remembers how long they were.
APPENDED = (METRICS, "samples/val.jsonl")
FOLDER_VARIABLE = "TX_LIGHTNING_RUN_FOLDER"  # how a process tells those that Lightning starts

_stores: list[TCPStore] = []  # kept open: torch.distributed meets at the same address afterwards


def run_folder(parent: Path) -> Path:
    """Make a new folder in `parent` and return it, one and the same on every process of the run.

    Processes that torchrun or SLURM started agree through the store where torch.distributed will
    meet; processes that Lightning starts inherit the choice of the first.
    """
    environment = _cluster()
    if environment is not None:
        return _agreed(parent, environment)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return Path(os.environ[FOLDER_VARIABLE])
    folder = new_folder(parent)
    os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def new_folder(parent: Path) -> Path:
    """Make a folder named after the time; of two made in one second, the later gets a number."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = parent.absolute() / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if parent.is_dir():
                continue
            raise
        return folder
    raise AssertionError("unreachable")


def sizes(folder: Path) -> dict[str, int]:
    """The bytes that a run has appended to each of its files so far."""
    files = {name: folder / name for name in APPENDED}
    return {name: path.stat().st_size for name, path in files.items() if path.exists()}


def rewind(folder: Path, lengths: Mapping[str, int]) -> None:
    """Drop what was appended after a checkpoint: training goes on from there.

    Args:
        folder: The run folder.
        lengths: `sizes` at that time.
    """
    for name, size in sizes(folder).items():
        if size > lengths.get(name, 0):
            os.truncate(folder / name, lengths.get(name, 0))


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes files."""
    environment = _cluster()
    if environment is not None:
        return environment.global_rank() == 0
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _cluster() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)
    return None


def _agreed(parent: Path, environment: ClusterEnvironment) -> Path:
    first = environment.global_rank() == 0
    hosted_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        environment.main_address,
        environment.main_port,
        is_master=first and not hosted_elsewhere,
        timeout=timedelta(minutes=5),
        wait_for_workers=False,
        multi_tenant=True,
    )
    _stores.append(store)
    key = f"tx_lightning/run_folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if first:
        store.set(key, str(new_folder(parent)))
    return Path(store.get(key).decode())
