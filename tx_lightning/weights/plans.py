"""What an architecture decides: how its folder becomes a task of ours, and a task its folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.weights.configuration import Arguments, Configuration
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.rules import Table

TokenId = Callable[[str], int | None]  # the id of what is called pad_token, eos_token and so on


class TokenError(WeightsError):
    """A special token is missing or invalid; the caller adds the name of the file."""


@dataclass(frozen=True)
class ImportPlan:
    """How to import a folder.

    Args:
        task: The class of the task, in `tx_lightning.tasks`.
        arguments: Its arguments.
        table: Maps tensor names; ours are relative to the task's network.
        new: Name prefixes of our tensors that the folder may lack.
        dropped: Name prefixes of tensors in the folder that are left out, with a description each.
        notes: Messages for the user, one line each.
        labels: The classifier's labels.
    """

    task: str
    arguments: Arguments
    table: Table
    new: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    labels: list[str] | None = None

    @property
    def settings(self) -> Arguments:
        """The task as a class path with arguments."""
        return {"class_path": f"tx_lightning.tasks.{self.task}", "init_args": self.arguments}


@dataclass(frozen=True)
class Family:
    """A model family that can be imported.

    Args:
        model_type: `model_type` in config.json.
        architectures: The supported classes; the first is the default.
        defaults: Values of fields that config.json omits.
        base: Name of the headless model, the prefix of its tensors in files with a head.
        parts: Top-level modules of the headless model.
        special_tokens: Default names of the special tokens.
        plan: Builds the import plan from config, architecture and requested task.
        special_ids: Reads the special ids from config and tokenizer.
        overridden: Fields for which generation_config.json takes precedence over config.json.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    base: str
    parts: frozenset[str]
    special_tokens: Mapping[str, str]
    plan: Callable[[Configuration, str, str | None], ImportPlan]
    special_ids: Callable[[Configuration, TokenId], SpecialIds]
    overridden: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportPlan:
    """How to export a network.

    Args:
        model_type: `model_type` in config.json.
        config: Fields of config.json, except special ids.
        table: Maps tensor names.
        unsaid: Fields that are written only if no imported config.json exists.
        zeros: Tensors that the architecture has and the network lacks, with their shapes.
        longest: Maximum number of tokens of a text, None for no limit.
    """

    model_type: str
    config: dict[str, Any]
    table: Table
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    longest: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return int(self.config["vocab_size"])


def required(token_id: TokenId, name: str) -> int:
    """Return the id of a mandatory special token."""
    found = token_id(name)
    if found is None:
        raise TokenError(f"the tokenizer has no {name}")
    return found


def check_task(asked: str | None, possible: str, architecture: str) -> None:
    """Refuse a task that an architecture cannot serve."""
    if asked not in (None, possible):
        raise WeightsError(f"--task {asked}: a {architecture} becomes a {possible}")


def not_representable(kind: str, option: str, value: str, supported: str) -> WeightsError:
    """The error about an option of ours that a family of theirs does not have."""
    return WeightsError(
        f"the network cannot be written as {kind}: its {option} is {value}; {kind} has {supported}"
    )
