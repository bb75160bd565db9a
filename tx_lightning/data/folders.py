"""The folders that data is looked for and kept in."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TX_LIGHTNING_CACHE`, else `~/.cache/tx_lightning`; it may not exist yet."""
    configured = os.environ.get("TX_LIGHTNING_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "tx_lightning"


def data_folder() -> Path | None:
    """`$TX_LIGHTNING_DATA`, where the user keeps named datasets, one folder each; None if unset."""
    configured = os.environ.get("TX_LIGHTNING_DATA")
    return Path(configured).expanduser() if configured else None
