"""Settings that a file brings, checked against what may be built from a file.

Settings are a tree of `{"class_path": ..., "init_args": {...}}`.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from tx_lightning.configuration import read_yaml
from tx_lightning.errors import ConfigurationError
from tx_lightning.runs import shown
from tx_lightning.trust import Trust
from tx_lightning.walking import Approved, SettingsError, TooMuch, Walk


def approve_task(settings: Any, trust: Trust, where: str) -> Approved:
    """Check the settings of a task; nothing is imported that the user has not agreed to.

    Args:
        settings: From a file.
        trust: The user's consent.
        where: The file, for errors.

    Raises:
        SettingsError: They name something that may not be built, or are no settings.
    """
    walk = Walk(trust)
    return walk.finish(lambda: walk.value(settings, (LightningModule,), "task"), where)


def approve_run(sections: Any, trust: Trust, where: str, folder: Path | None = None) -> Approved:
    """Check the configuration of a run: model, data, trainer, and all that belongs to these.

    Args:
        sections: The content of config.yaml.
        trust: The user's consent.
        where: The file, for errors.
        folder: Where it is: texts in it may be the names of files there.

    Raises:
        SettingsError: It names something that may not be built, or is no configuration.
    """
    walk = Walk(trust, folder)
    return walk.finish(lambda: walk.sections(sections), where)


def check_run(config: Path, trust: Trust) -> Approved:
    """Check the configuration of a run that may be of others, before the parser reads it.

    Args:
        config: Its config.yaml.
        trust: The user's consent.

    Raises:
        ConfigurationError: It names something that may not be built, or is no configuration.
    """
    try:
        return approve_run(read_yaml(config), trust, shown(config), config.parent)
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None


def packages_of(sections: Mapping[str, Any]) -> list[str]:
    """What has to be trusted before a configuration of one's own can be read from a file."""
    walk = Walk(Trust(everything=True))
    with contextlib.suppress(TooMuch):
        walk.sections(sections)
    return list(dict.fromkeys(package for _, package in walk.foreign.values()))
