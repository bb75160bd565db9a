"""A loader of batches that Lightning can stop anywhere and resume exactly there."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from tx_lightning.data.batches import PairBatches, TranslationBatch, as_collated
from tx_lightning.data.sampler import ShardSampler, TokenBatchSampler


class BatchLoader:
    """Batches of a sampler, prepared by worker processes when there are any.

    It holds a `DataLoader` and is none, so that Lightning neither wraps the sampler nor builds the
    loader anew; `batch_sampler` is where Lightning looks for `set_epoch`.

    Args:
        data: Makes a batch of each share.
        sampler: Gives the shares.
        num_workers: Worker processes; 0 prepares batches in this process.
        pin_memory: Copy batches to page-locked memory, for faster transfer to a GPU.
    """

    def __init__(
        self,
        data: PairBatches,
        sampler: TokenBatchSampler | ShardSampler,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.batch_sampler = sampler
        self._loader = DataLoader(
            data,
            batch_sampler=sampler,  # type: ignore[arg-type]  # Shares, not lists of indices.
            collate_fn=as_collated,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Otherwise each pass would draw from the global generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[TranslationBatch]:
        """Lazy: workers start with the first batch asked for, when the epoch is known."""
        yield from self._loader


class ResumableLoader(BatchLoader):
    """The training loader; Lightning keeps its state in the checkpoint.

    Args:
        data: Makes a batch of each share.
        sampler: Gives the shares.
        num_workers: Worker processes; 0 prepares batches in this process.
        pin_memory: Copy batches to page-locked memory, for faster transfer to a GPU.
        done: Tells how many micro-batches of this epoch the training is done with. That is less
            than the loader has handed out, whenever it runs ahead or a step failed.
    """

    batch_sampler: TokenBatchSampler

    def __init__(
        self,
        data: PairBatches,
        sampler: TokenBatchSampler,
        *,
        num_workers: int,
        pin_memory: bool,
        done: Callable[[], int],
    ) -> None:
        super().__init__(data, sampler, num_workers=num_workers, pin_memory=pin_memory)
        self._done = done

    def state_dict(self) -> dict[str, Any]:
        """Position in the order of training; the same on every rank."""
        return {"epoch": self.batch_sampler.epoch, "done": self._done()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position; a finished epoch continues with the next."""
        sampler, epoch, done = self.batch_sampler, state["epoch"], state["done"]
        finished = done >= len(sampler)
        sampler.set_epoch(epoch + 1 if finished else epoch)
        sampler.start = 0 if finished else done
