"""Checks that a test leaves nothing behind; conftest.py runs this after each test.

A `Guard` remembers the state of the process and of the folders that tests share. After a test, when
all its fixtures are torn down, it reports what has changed and restores it, so that the next test
does not suffer. Warning filters are not checked: pytest restores them itself.
"""

import builtins
import gc
import multiprocessing
import operator
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from tests.process_state import PROBES

# Tests patch names of these modules, besides those of the package.
PATCHED = [
    builtins, gc, os, random, shutil, signal, socket, subprocess, tempfile, threading, time, torch,
    torch.cuda, torch.distributed, torch.random,
]  # fmt: skip
PATCHABLE = {BuiltinFunctionType, FunctionType, type, torch.Generator}
FREEZE = gc.freeze
OF_THE_PROCESS = ("wandb-media", "wandb-artifacts", "pymp-")  # one folder each
CHILD = "child process: "
HELPERS = ("resource_tracker", "forkserver")
# jsonargparse puts a new class of this name beside the parser's at every parsing.
RENEWED = "_ArgumentGroupAutoSubclass"
NOT_WATCHED = {"__pycache__", "runs", "wandb"}  # folders of the checkout; runs/ may be in use


class Names:
    """The names of a module, or of all modules, and their values.

    Args:
        now: The mapping that holds them.
        kinds: Types of the values that are of interest; all where there are none.
    """

    def __init__(self, now: Mapping[str, Any], kinds: Collection[type] = ()) -> None:
        self._now = now
        self._kinds = kinds
        self._before = dict(now)

    def replaced(self) -> dict[str, Any]:
        """The former values of the names that have another now, or none."""
        if len(self._now) == len(self._before) and all(
            map(operator.is_, self._now.values(), self._before.values())
        ):
            return {}  # nearly always, and in a hundredth of a millisecond
        before, self._before = self._before, dict(self._now)
        return {
            name: value
            for name, value in before.items()
            if self._now.get(name) is not value and (not self._kinds or type(value) in self._kinds)
        }


class Guard:
    """Finds what a test leaves behind.

    Args:
        checkout: The folder of the project, in which no file may appear.
        temporary: The folder for temporary files of this process.
        patience: Seconds to wait for threads, processes and files that are about to go away.
    """

    def __init__(self, checkout: Path, temporary: Path, *, patience: float = 10.0) -> None:
        self._patience = patience
        self._temporary = temporary
        self._folders = [checkout, *_folders_below(checkout)]
        self._freezes = 0
        # What exists by now stays: from here on a full collection is quick. Counting what is
        # frozen is slow, so calls are counted instead.
        gc.collect()
        FREEZE()
        gc.freeze = self._count_freeze
        self._remember()

    def _count_freeze(self) -> None:
        self._freezes += 1

    def _called_freeze(self) -> Iterator[str]:
        if self._freezes:
            yield "gc.freeze was called"
            self._freezes = 0

    def _remember(self) -> None:
        self._state = [probe.read() for probe in PROBES]
        self._modules = Names(sys.modules)
        self._known = set(sys.modules)
        self._names = list(_names())
        self._listed = {folder: _listing(folder) for folder in self._folders}
        self._resources = self._read_resources(None)

    def check(self, tmp_path: Path | None) -> list[str]:
        """Report what a test left behind, and restore the state before it.

        Args:
            tmp_path: The test's own folder, in which no file may still be open.
        """
        found = [
            *_end_wandb(),
            *self._called_freeze(),
            *self._changed_state(),
            *self._changed_names(),
            *self._changed_modules(tmp_path),
            *self._new_resources(tmp_path),
            *self._new_files(),
        ]
        if found or len(sys.modules) != len(self._known):
            self._remember()
        return found

    def _changed_state(self) -> Iterator[str]:
        for probe, before in zip(PROBES, self._state, strict=True):
            after = probe.read()
            if after != before and (differences := list(_differences(before, after))):
                yield from (f"{probe.what}{difference}" for difference in differences)
                probe.restore(before)

    def _changed_names(self) -> Iterator[str]:
        for module, names in self._names:
            for name, value in names.replaced().items():
                if name == RENEWED or (name.startswith("__") and not name.endswith("__")):
                    continue  # the latter are of torch.compile
                yield f"patched: {module.__name__}.{name}"
                setattr(module, name, value)

    def _changed_modules(self, tmp_path: Path | None) -> Iterator[str]:
        for name, module in self._modules.replaced().items():
            yield f"sys.modules: another {name}"
            sys.modules[name] = module
        if len(sys.modules) == len(self._known):
            return
        for name in sys.modules.keys() - self._known:
            file = vars(sys.modules[name]).get("__file__")
            if file and tmp_path and Path(file).is_relative_to(tmp_path):
                yield f"sys.modules: {name} from {file}"
                del sys.modules[name]

    def _read_resources(self, tmp_path: Path | None) -> set[str]:
        return {*_threads(), *_children(), *_open_files(tmp_path), *self._temporary_files()}

    def _temporary_files(self) -> Iterator[str]:
        for path in self._temporary.iterdir():
            if not any(name in path.name for name in OF_THE_PROCESS):
                yield f"temporary file: {path}"

    def _new_resources(self, tmp_path: Path | None) -> set[str]:
        new = self._read_resources(tmp_path) - self._resources
        if not new:
            return new
        gc.collect()  # as what hangs on a cycle with a trainer or an exception
        deadline = time.monotonic() + self._patience
        while new := self._read_resources(tmp_path) - self._resources:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for resource in new:
            if resource.startswith(CHILD):
                _kill(int(resource.removeprefix(CHILD).split()[0]))
        return new

    def _new_files(self) -> Iterator[str]:
        for folder, before in self._listed.items():
            if folder.stat().st_mtime_ns != before[0]:
                self._listed[folder] = _listing(folder)
                for name in self._listed[folder][1] - before[1]:
                    yield f"file in the checkout: {folder / name}"


def _differences(before: Any, after: Any) -> Iterator[str]:
    """What has changed in a value, or in each entry of a mapping; new loggers are no change."""
    if not isinstance(before, dict):
        yield f": {before!r} -> {after!r}"
        return
    for name in sorted(before.keys() | after.keys()):
        old, new = (repr(x[name]) if name in x else "nothing" for x in (before, after))
        if old != new and not (old == "nothing" and isinstance(after[name], tuple)):
            yield f" {name}: {old} -> {new}"


def _names() -> Iterator[tuple[ModuleType, Names]]:
    """The names of the modules of this package and of those that tests patch."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "tx_lightning":
            yield module, Names(vars(module))
    for module in PATCHED:
        yield module, Names(vars(module), PATCHABLE)


def _end_wandb() -> Iterator[str]:
    """End what lives as long as a process that has used wandb: its service, hook and cache."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is None:
        return
    if wandb.run is not None:
        yield f"wandb.run: {wandb.run.id}"
        wandb.finish()
    wandb.teardown()
    if type(sys.excepthook) is MethodType and "wandb" in sys.excepthook.__module__:
        sys.excepthook = sys.__excepthook__
    if cache := sys.modules.get("wandb.sdk.artifacts.artifact_instance_cache"):
        for artifact in cache.artifact_instance_cache_by_client_id.values():
            if artifact._tmp_dir is not None:
                artifact._tmp_dir.cleanup()
        cache.artifact_instance_cache.clear()
        cache.artifact_instance_cache_by_client_id.clear()


def _threads() -> Iterator[str]:
    for process in multiprocessing.active_children():
        yield f"{CHILD}{process.pid} {process.name}"
    for thread in threading.enumerate():
        if not thread.daemon:
            yield f"thread: {thread.name}"


def _children() -> Iterator[str]:
    """Child processes, on Linux, but for the two of multiprocessing that belong to a process."""
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in task.read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                if not any(f"multiprocessing.{name}" in command for name in HELPERS):
                    yield f"{CHILD}{pid} {command or 'that nobody waited for'}"


def _kill(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _open_files(tmp_path: Path | None) -> Iterator[str]:
    """Open files below a folder and open sockets, on Linux."""
    if Path("/proc/self/fd").is_dir():
        for handle in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                target = handle.readlink()
                below = tmp_path is not None and target.is_relative_to(tmp_path)
                if below or target.name.startswith("socket:"):
                    yield f"open file: {target}"


def _folders_below(folder: Path) -> Iterator[Path]:
    """The folders of the checkout that hold no results and no caches."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in NOT_WATCHED and not path.name.startswith("."):
            yield path
            yield from _folders_below(path)


def _listing(folder: Path) -> tuple[int, set[str]]:
    """Its time of change and its names, without what tools and who writes code put there."""
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    hidden = {name for name in names if name.startswith(".") and name != ".hypothesis"}
    return folder.stat().st_mtime_ns, {x for x in names - hidden if not x.endswith((".py", "~"))}
