"""Datasets of the Hugging Face hub as sentence pairs; needs the optional package `datasets`."""

import hashlib
from collections.abc import Iterator
from typing import Any

from tx_lightning.data.errors import DataError
from tx_lightning.data.sources import ParallelSource, text_at


class HuggingFacePairs(ParallelSource):
    """A dataset of the Hugging Face hub, or a local folder that `datasets` can load.

    Args:
        name: Name of the dataset, such as `wmt/wmt14`, or a folder.
        source_key: Column of the source text. Dots reach into nested columns: `translation.en`.
        target_key: Column of the target text, likewise.
        config: Configuration of the dataset, such as `de-en`.
        revision: Commit or tag of the dataset's repository; without it the newest is taken.
        train: What the dataset calls its training split; null if it has none.
        val: What it calls its validation split.
        test: What it calls its test split.
    """

    def __init__(
        self,
        name: str,
        source_key: str,
        target_key: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        train: str | None = "train",
        val: str | None = "validation",
        test: str | None = "test",
    ) -> None:
        self.name = name
        self.keys = (source_key, target_key)
        self.config = config
        self.revision = revision
        names = {"train": train, "val": val, "test": test}
        self._names = {split: name for split, name in names.items() if name is not None}

    def splits(self) -> list[str]:
        return list(self._names)

    def prepare(self) -> None:
        for split in self.splits():
            self._load(split)

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        self.check_split(split)
        return self._read(split)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        parts = [*self.keys, self._load(split)._fingerprint]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _read(self, split: str) -> Iterator[tuple[str, str]]:
        source_key, target_key = self.keys
        for number, row in enumerate(self._load(split)):
            where = f"{self.name}, {self._names[split]}, row {number}"
            yield text_at(row, source_key, where), text_at(row, target_key, where)

    def _load(self, split: str) -> Any:
        """The split as a `datasets.Dataset`, memory-mapped; downloaded the first time."""
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(
                "HuggingFacePairs needs the package datasets: pip install 'tx-lightning[datasets]'"
            ) from None
        try:
            return datasets.load_dataset(
                self.name, self.config, revision=self.revision, split=self._names[split]
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot load split {self._names[split]!r} of the dataset {self.name!r}: {reason}"
            ) from error
