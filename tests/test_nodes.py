"""Two hosts, each in a network of its own, joined by a cable that can be cut."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_kills import assert_same, written

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29517


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def host(node: int) -> str:
    return f"txl{os.getpid()}-{node}"


@pytest.fixture
def cable() -> Iterator[list[str]]:
    """Two network namespaces and the names of the two ends of the cable between them."""
    if not shutil.which("ip"):
        pytest.skip("the command ip is not installed")
    ends = [f"txl{os.getpid() % 10_000}e{node}" for node in (0, 1)]
    try:
        ip("netns", "add", host(0))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", host(1))
        ip("link", "add", ends[0], "netns", host(0), "type", "veth", "peer", ends[1])
        ip("link", "set", ends[1], "netns", host(1))
        for node, end in enumerate(ends):
            ip("-n", host(node), "addr", "add", f"{ADDRESSES[node]}/24", "dev", end)
            ip("-n", host(node), "link", "set", end, "up")
            ip("-n", host(node), "link", "set", "lo", "up")
        yield ends
    finally:
        for node in (0, 1):
            subprocess.run(["ip", "netns", "del", host(node)], check=False, capture_output=True)


def start(ends: list[str], run: Path, file: Path) -> list[subprocess.Popen[bytes]]:
    """Start the run on both hosts, or go on with it where it has begun."""
    if (run / "config.yaml").is_file():
        words = ["fit", "--resume", str(run), "--trust", "tests"]
    else:
        words = ["fit", "--config", str(file), "--trainer.default_root_dir", str(run)]
        words += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    processes = []
    for node, end in enumerate(ends):
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
        torchrun += ["--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv_id", run.name]
        # Which host holds the meeting place; torchrun's guess needs names that resolve.
        torchrun += ["--rdzv_conf", f"is_host={int(node == 0)}"]
        torchrun += ["--local_addr", ADDRESSES[node], "-m", "tx_lightning", *words]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "disabled",
            "GLOO_SOCKET_IFNAME": end,
            "PAUSE": "0.02",
        }
        with (file.parent / f"output-{node}.txt").open("a") as output:
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host(node), *torchrun],
                    cwd=file.parent,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


def outputs(file: Path) -> str:
    return "\n".join((file.parent / f"output-{node}.txt").read_text()[-3000:] for node in (0, 1))


def wait_for_step(run: Path, step: int, file: Path) -> None:
    """Until a metric of that step, or a later one, is written."""
    for _ in range(1200):
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(outputs(file))


def wait_for_output(file: Path, text: str) -> str:
    """Until the first host says it, within a minute."""
    for _ in range(600):
        found = (file.parent / "output-0.txt").read_text()
        if text in found:
            return found
        time.sleep(0.1)
    raise AssertionError(outputs(file))


def lose(node: int, process: subprocess.Popen[bytes]) -> None:
    """Kill everything that runs on a host: torchrun's workers have sessions of their own."""
    pids = subprocess.run(
        ["ip", "netns", "pids", host(node)], check=True, capture_output=True, text=True
    )
    for pid in map(int, pids.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)


@pytest.mark.slow
def test_two_hosts_survive_a_cut_cable_and_a_lost_host(cable: list[str], tmp_path: Path) -> None:
    file = written("LanguageModeling", tmp_path, max_steps=200)
    processes = start(cable, tmp_path / "whole", file)
    for process in processes:
        assert process.wait(timeout=300) == 0, outputs(file)

    run = tmp_path / "run"
    processes = start(cable, run, file)
    wait_for_step(run, 61, file)
    ip("-n", host(0), "link", "set", cable[0], "down")
    time.sleep(2)
    for node, process in enumerate(processes):
        lose(node, process)
    ip("-n", host(0), "link", "set", cable[0], "up")

    processes = start(cable, run, file)
    wait_for_step(run, 131, file)
    lose(1, processes[1])
    assert "RuntimeError" in wait_for_output(file, "by peer")
    lose(0, processes[0])  # else it waits for another host to take the place

    for process in start(cable, run, file):
        assert process.wait(timeout=300) == 0, outputs(file)
    assert_same(run, tmp_path / "whole")
