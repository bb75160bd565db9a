"""Processes that start at once: forked from one that has imported everything.

A process that imports torch and Lightning itself takes four seconds of a core, and tests start
dozens. The one they are forked from does nothing but import, so they are as good as new ones. Only
their hash seed is that of their siblings.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from lightning.pytorch.utilities import rank_zero_only

from tests.stand_ins import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.stand_ins", "tx_lightning.commands"])
_ENVIRONMENT = dict(os.environ)  # without what the first test that starts one has set


class Forked:
    """A function that runs in processes of its own; tests use it as a `subprocess.Popen`.

    Args:
        function: A function of a module. What it returns is the exit status.
        words: Its argument.
        environment: All environment variables.
        folder: The current directory.
        output: The file to which standard output and error are appended.
        ranks: How many processes, each with the variables that torchrun would set.
    """

    def __init__(
        self,
        function: Callable[[list[str]], int],
        words: list[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        output: Path,
        ranks: int = 1,
    ) -> None:
        port = free_port()
        # In a short path, for sockets of wandb; killed processes leave much there.
        self._temporary = tempfile.mkdtemp()
        environment = {**environment, "TMPDIR": self._temporary}
        self._processes = [
            _CONTEXT.Process(
                target=_child,
                args=(function, words, {**environment, **_torchrun(rank, ranks, port)}),
                kwargs={"folder": folder, "output": output},
            )
            for rank in range(ranks)
        ]
        with patch.dict(os.environ, _ENVIRONMENT, clear=True):
            for process in self._processes:
                process.start()

    def poll(self) -> int | None:
        """The exit status of the first process, negative for a signal; None while it runs."""
        return self._processes[0].exitcode

    def wait(self, timeout: float) -> int:
        """The exit status of the first process; of the others where that is 0."""
        for process in self._processes:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(str(process), timeout)
            if process.exitcode:
                return process.exitcode
        return 0

    def kill(self) -> None:
        """Kill all with the processes that they started, as a machine that goes down does.

        To be called in any case, in the end.
        """
        for process in self._processes:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        shutil.rmtree(self._temporary)


def _torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def _child(
    function: Callable[[list[str]], int],
    words: list[str],
    environment: Mapping[str, str],
    *,
    folder: Path,
    output: Path,
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = environment["TMPDIR"]
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv[1:] = words
    vars(rank_zero_only)["rank"] = int(environment.get("RANK", "0"))  # as its import would
    sys.exit(function(words))
