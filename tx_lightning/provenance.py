"""Where a run comes from: all that decides its result, as plain values.

It stands in the run folder (`provenance.json`) and in every checkpoint, and is what
`tx-lightning reproduce` compares when two runs differ.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tx_lightning
from tx_lightning.strict_json import to_json

FILE = "provenance.json"
PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "numpy",
    "tokenizers",
    "sacrebleu",
    "jsonargparse",
    "wandb",
)


def provenance(config: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a run was started with.

    Args:
        config: The resolved configuration, of plain values; what only says where the run is written
            is left out.
        data: The identity of the data, `TextData.identity()`; None where it has none.
    """
    trainer = {k: v for k, v in config.get("trainer", {}).items() if k != "default_root_dir"}
    decides = {k: v for k, v in config.items() if k not in ("name", "runs_dir")}
    return {
        "config": {**decides, "trainer": trainer},
        "versions": _versions(),
        "hardware": _hardware(),
        "code": _code(),
        "data": None if data is None else dict(data),
    }


def _versions() -> dict[str, str]:
    found = {package: version(package) for package in PACKAGES}
    return {"tx_lightning": tx_lightning.__version__, "python": platform.python_version(), **found}


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _code() -> dict[str, dict[str, Any] | None]:
    """The state of the package's repository, and of the one that the run is started in."""
    package, here = Path(tx_lightning.__file__).parent, Path.cwd()
    states = {"tx_lightning": repository_state(package), "here": repository_state(here)}
    if states["here"] == states["tx_lightning"]:
        del states["here"]
    return states


def repository_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and what was changed since; None outside of a repository.

    Returns:
        `commit`, `diff` (of tracked files, as `git apply` takes it) and `untracked` (the SHA-256 of
        each file that is neither tracked nor ignored).
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if root is None or commit is None:
        return None
    top = Path(root.strip())
    names = (_git(top, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")
    untracked = {
        name: hashlib.sha256((top / name).read_bytes()).hexdigest()
        for name in names
        if name.endswith((".py", ".yaml", ".yml", ".toml")) and (top / name).is_file()
    }
    diff = _git(top, "diff", "--binary", "HEAD") or ""
    return {"commit": commit.strip(), "diff": diff, "untracked": untracked}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            check=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def add_start(record: dict[str, Any], folder: Path) -> None:
    """Add a start to the file of a run folder, unless it is that of the last start.

    The file is a list: the first start, and each time that the run was resumed with something else.
    """
    record = json.loads(to_json(record))  # as it will be read
    starts = read_starts(folder)
    if starts and starts[-1] == record:
        return
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(to_json([*starts, record], indent=1, ensure_ascii=False), "utf-8")
    temporary.replace(folder / FILE)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run; none where that is not known."""
    try:
        records = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return records if isinstance(records, list) else []


def differing(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two records of plain values differ: dotted name, and both values."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*ours, *theirs]):
            inner = f"{name}.{key}" if name else str(key)
            yield from differing(ours.get(key), theirs.get(key), inner)
    elif ours != theirs:
        yield name, ours, theirs
