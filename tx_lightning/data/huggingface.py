"""Datasets of the Hugging Face hub; needs the optional package `datasets`."""

import hashlib
from collections.abc import Iterator
from typing import Any

from tx_lightning.data.errors import DataError
from tx_lightning.data.sources import ParallelSource, text_at


class HubRows:
    """The rows of a dataset of the Hugging Face hub, or of a local folder that `datasets` can load.

    Args:
        reader: The class that reads them, for its error.
        name: Name of the dataset, such as `wmt/wmt14`, or a folder.
        config: Configuration of the dataset, such as `de-en`.
        revision: Commit or tag of the dataset's repository; without it the newest is taken.
        train: What the dataset calls its training split; null if it has none.
        val: What it calls its validation split.
        test: What it calls its test split.
    """

    def __init__(
        self,
        reader: str,
        name: str,
        *,
        config: str | None,
        revision: str | None,
        train: str | None,
        val: str | None,
        test: str | None,
    ) -> None:
        self.reader = reader
        self.name = name
        self.config = config
        self.revision = revision
        names = {"train": train, "val": val, "test": test}
        self._names = {split: name for split, name in names.items() if name is not None}

    def splits(self) -> list[str]:
        """Those that the dataset has."""
        return list(self._names)

    def prepare(self) -> None:
        """Download what is not there yet."""
        for split in self.splits():
            self.load(split)

    def load(self, split: str) -> Any:
        """The split as a `datasets.Dataset`, memory-mapped; downloaded the first time.

        Raises:
            DataError: The package is not installed, or the dataset cannot be loaded.
        """
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(
                f"{self.reader} needs the package datasets: pip install 'tx-lightning[datasets]'"
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

    def rows(self, split: str) -> Iterator[tuple[str, Any]]:
        """Each row, and before it where it stands."""
        for number, row in enumerate(self.load(split)):
            yield f"{self.name}, {self._names[split]}, row {number}", row

    def fingerprint(self, split: str, *keys: str) -> str:
        """A digest of the split and of how it is read."""
        parts = [*keys, self.load(split)._fingerprint]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
        self.keys = (source_key, target_key)
        self._rows = HubRows(
            "HuggingFacePairs",
            name,
            config=config,
            revision=revision,
            train=train,
            val=val,
            test=test,
        )

    def splits(self) -> list[str]:
        return self._rows.splits()

    def prepare(self) -> None:
        self._rows.prepare()

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        self.check_split(split)
        source_key, target_key = self.keys
        return (
            (text_at(row, source_key, where), text_at(row, target_key, where))
            for where, row in self._rows.rows(split)
        )

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return self._rows.fingerprint(split, *self.keys)
