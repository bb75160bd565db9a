"""Run folders: new ones differ, those of the processes of one run do not."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.stand_ins import free_port
from tx_lightning import runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a process of the command line would keep: its folder and its stores."""
    monkeypatch.setattr(runs, "_stores", [])
    with patch.dict(os.environ):
        yield


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = {runs.new_folder(tmp_path / "experiment") for _ in range(5)}
    assert len(folders) == 5
    for folder in folders:
        assert folder.is_dir()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d)?", folder.name)


def test_a_file_in_the_way_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match="runs"):
        runs.new_folder(tmp_path / "runs")


def test_processes_that_lightning_starts_take_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs.run_folder(tmp_path)
    assert runs.is_first_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.run_folder(tmp_path) == first
    assert not runs.is_first_process()


def test_a_second_run_of_one_process_is_a_new_one(tmp_path: Path) -> None:
    assert runs.run_folder(tmp_path) != runs.run_folder(tmp_path)


def test_processes_of_torchrun_agree_where_its_agent_hosts_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    as_torchrun(monkeypatch, port, hosted_elsewhere=True)
    folders = []
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        folders.append(runs.run_folder(tmp_path))
        assert runs.is_first_process() == (rank == 0)
    del agent
    assert list(tmp_path.iterdir()) == [folders[0]]
    assert set(folders) == {folders[0]}


def test_processes_agree_where_the_first_hosts_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And torch.distributed can meet at the same address afterwards."""
    program = (
        "import sys; from pathlib import Path; from tx_lightning.runs import run_folder\n"
        "import torch.distributed as dist\n"
        "folder = run_folder(Path(sys.argv[1]))\n"
        "dist.init_process_group('gloo'); dist.barrier(); dist.destroy_process_group()\n"
        "print(folder)"
    )
    as_torchrun(monkeypatch, free_port(), hosted_elsewhere=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    folders = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [str(path) for path in tmp_path.iterdir()] == [folders[0]]
    assert folders[0] == folders[1]


def as_torchrun(monkeypatch: pytest.MonkeyPatch, port: int, *, hosted_elsewhere: bool) -> None:
    environment = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": str(hosted_elsewhere),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_paths_are_shown_as_they_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.shown(tmp_path / "runs" / "a") == "runs/a"
    assert runs.shown(Path("/elsewhere")) == "/elsewhere"
