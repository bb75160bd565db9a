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
    """Special tokens are missing or do not suit; whoever reads the file names it."""


@dataclass(frozen=True)
class ImportPlan:
    """How a folder becomes a checkpoint.

    Args:
        task: The class of the task, in `tx_lightning.tasks`.
        arguments: Its arguments.
        table: The tensors; names of ours are those of the task's network.
        new: Beginnings of the names of tensors of ours that the folder does not have.
        dropped: Beginnings of the names of tensors of theirs that are left out, each with what
            they are.
        notes: What else the user should know, a line each.
        labels: Those of a classifier.
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
    """What is read from folders of one kind.

    Args:
        model_type: What config.json calls it.
        architectures: The classes whose weights can be read; the first where the file names none.
        defaults: The values of config.json where the file is silent.
        base: The name of the part that a model without a head consists of, and a head's file has
            before its names.
        parts: What this part consists of.
        special_tokens: What its special tokens are called where the files do not say.
        plan: Of a configuration, an architecture and a task that was asked for.
        special_ids: Of a configuration and the ids of special tokens.
        overridden: What generation_config.json, where there is one, says rather than config.json.
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
    """How a network becomes a folder.

    Args:
        model_type: What config.json calls it.
        config: What config.json says of it, but for the ids of special tokens.
        table: The tensors.
        unsaid: What config.json says where an imported one says nothing.
        zeros: Tensors of theirs that we have none of, with their shapes.
        longest: Most tokens of a text, None for no limit.
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
    """The id of a special token that there must be."""
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
