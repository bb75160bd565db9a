"""What classes and tags share: the labels, and batches that are divided by their number."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from tx_lightning.data.cache import CacheError, build_once
from tx_lightning.data.errors import DataError, listed
from tx_lightning.data.module import Place
from tx_lightning.data.plans import Indices, Lengths
from tx_lightning.data.sampler import ShardSampler, TokenBatchSampler
from tx_lightning.data.store import FORMAT, Counts, digest
from tx_lightning.strict_json import to_json

TooLong = Literal["cut", "drop", "refuse"]


class LabelSampler(TokenBatchSampler):
    """Training batches of rows of like length; the loss is divided by their labels.

    Args:
        lengths: Tokens of each row, special ones included.
        labels: Labels of each row.
        batch_tokens: Budget of a global batch: rows x longest.
        seed: With the epoch, decides the order.
        place: This process.
    """

    def __init__(
        self, lengths: Lengths, labels: Lengths, batch_tokens: int, *, seed: int, place: Place
    ) -> None:
        super().__init__(
            np.zeros_like(lengths),  # there is one side
            lengths,
            batch_tokens,
            seed=seed,
            rank=place.rank,
            world_size=place.world_size,
            accumulate=place.accumulate,
            reshuffle=place.reshuffle,
        )
        self.labels = labels

    def step_tokens(self, step: int, epoch: int) -> int:
        return int(self.labels[self.plan()[step]].sum())


class LabelShardSampler(ShardSampler):
    """Evaluation batches of rows of like length, from the longest to the shortest.

    Args:
        lengths: Tokens of each row, special ones included.
        labels: Labels of each row.
        batch_tokens: Budget of a batch: rows x longest. A longer row is a batch alone.
        place: This process.
    """

    def __init__(
        self, lengths: Lengths, labels: Lengths, batch_tokens: int, *, place: Place
    ) -> None:
        super().__init__(
            np.zeros_like(lengths),
            lengths,
            batch_tokens,
            rank=place.rank,
            world_size=place.world_size,
        )
        self.labels = labels

    def step_tokens(self, batch: Indices) -> int:
        return int(self.labels[batch].sum())


class LabelFile:
    """The labels of a training split, in the cache.

    Args:
        cache: The cache folder.
        fingerprint: Of the training split.
    """

    def __init__(self, cache: Path, fingerprint: str) -> None:
        self.folder = cache / "labels" / digest({"format": FORMAT, "labels": fingerprint})

    def make(self, collect: Callable[[], list[str]]) -> None:
        """Collect the labels where they are not there yet."""

        def build(folder: Path) -> None:
            text = to_json(collect(), ensure_ascii=False, indent=1)
            (folder / "labels.json").write_text(text, encoding="utf-8")

        build_once(self.folder, build)

    def read(self) -> list[str]:
        """The labels.

        Raises:
            CacheError: They are not there, or damaged.
        """
        try:
            labels = json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError.damaged(self.folder, error) from error
        assert isinstance(labels, list)
        return labels


def check_number(name: str, number: int, labels: list[str], called: str, *, learned: bool) -> None:
    """Refuse another number of classes than there are labels.

    Args:
        name: The argument.
        number: Its value.
        labels: The labels.
        called: labels or tags.
        learned: Whether they are those of the training split, and not given ones.
    """
    if number == len(labels):
        return
    whose = "the training split has" if learned else "the pretrained classifier has"
    raise DataError(
        f"{name} is {number}, but {whose} {len(labels)} {called}: {listed(labels, '')}; set {name} "
        f"to {len(labels)}"
    )


def unknown_label(
    label: str, where: str, labels: list[str], called: str, *, learned: bool
) -> DataError:
    """The error of a label that is no class.

    Args:
        label: The label.
        where: Where it stands.
        labels: The known ones.
        called: label or tag.
        learned: Whether they are those of the training split, and not given ones.
    """
    known = "the training split has" if learned else "the pretrained classifier has"
    return DataError(
        f"{where}: there is no {called} {label!r}; {known} {listed(labels, label)}; mend it or "
        "remove the example"
    )


def check_budget(batch_tokens: int, longest: int) -> None:
    """Refuse a budget that the longest training row exceeds."""
    if longest > batch_tokens:
        raise DataError(
            f"batch_tokens is {batch_tokens}, but the longest training example has {longest} "
            "tokens; raise batch_tokens or lower max_length"
        )


def tell_too_long(split: str, counts: Counts, max_length: int, too_long: TooLong) -> None:
    """Say what became of examples that were too long."""
    policy = f"more than {max_length} tokens (max_length), too_long is {too_long}"
    for number, done in ((counts.cut, "cut"), (counts.dropped.get("too_long", 0), "dropped")):
        if number:
            print(f"{split}: {number:,} {counts.unit} {done}: {policy}", file=sys.stderr)
