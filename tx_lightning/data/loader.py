"""A loader of batches that Lightning can stop anywhere and resume exactly there."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tx_lightning.data.batches import Batch, Batches, as_collated
from tx_lightning.data.sampler import EvaluationSampler, StepSampler

B = TypeVar("B", bound=Batch)


class BatchLoader(Generic[B]):
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
        data: Batches[B],
        sampler: StepSampler | EvaluationSampler,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.batch_sampler = sampler
        self._loader: DataLoader[B] = DataLoader(
            data,  # type: ignore[arg-type]  # has __getitems__ alone
            batch_sampler=sampler,  # type: ignore[arg-type]  # Shares, not lists of indices.
            collate_fn=as_collated,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Otherwise each pass would draw from the global generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[B]:
        """Lazy: workers start with the first batch asked for, when the epoch is known.

        They end with the pass, so that none is left when a run is stopped.
        """
        yield from self._loader


class LoadersInTurn(Generic[B]):
    """Loaders one after the other, as one.

    Args:
        loaders: At least one.
    """

    def __init__(self, loaders: Sequence[BatchLoader[B]]) -> None:
        self.loaders = list(loaders)

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[B]:
        for loader in self.loaders:
            yield from loader


class ResumableLoader(BatchLoader[B]):
    """The training loader of a `Trainer`, which keeps the loader's state in the checkpoint.

    The state is an epoch and a number of optimizer steps, so it means the same on every rank and
    for any split of a step into micro-batches. A run that was stopped within a step, its gradients
    half accumulated, takes that step from its start.

    Args:
        data: Makes a batch of each share.
        sampler: Gives the shares.
        num_workers: Worker processes; 0 prepares batches in this process.
        pin_memory: Copy batches to page-locked memory, for faster transfer to a GPU.
        trainer: Knows how many batches it is done with. That is less than the loader has handed
            out, whenever workers run ahead or a step failed.
    """

    batch_sampler: StepSampler

    def __init__(
        self,
        data: Batches[B],
        sampler: StepSampler,
        *,
        num_workers: int,
        pin_memory: bool,
        trainer: Trainer,
    ) -> None:
        super().__init__(data, sampler, num_workers=num_workers, pin_memory=pin_memory)
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Position in the order of training."""
        sampler = self.batch_sampler
        steps, rest = divmod(self._progress().current.processed, sampler.accumulate)
        return {"epoch": sampler.epoch, "steps": steps, "within": int(rest > 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position; after the end of an epoch Lightning sets the next."""
        sampler, progress = self.batch_sampler, self._progress()
        sampler.set_epoch(state["epoch"])
        position = sampler.start = state["steps"] * sampler.accumulate
        if self._saved_after_training(state["epoch"]) and self._begin_next_epoch(position):
            return
        if position == progress.current.processed:
            return
        # Stopped within a step, which is taken from its start, as if the checkpoint stood after the
        # step before; or steps are split differently. Every step has `accumulate` micro-batches.
        within = state.get("within", 0)  # older checkpoints do not say
        ended = within or progress.total.completed == progress.total.processed
        everything = self._trainer.global_step * sampler.accumulate
        for done, count in ((progress.current, position), (progress.total, everything)):
            done.ready = done.started = done.processed = count
            done.completed = count if ended else count - 1

    def _saved_after_training(self, epoch: int) -> bool:
        """Whether the checkpoint was saved when `fit` had returned.

        Lightning then counts the last epoch as done, also one in whose middle `max_steps` ended
        training, but keeps the position in it: it would go on in the next epoch at that position.
        """
        done: Any = self._trainer.fit_loop.epoch_progress.current
        return int(done.completed) > epoch

    def _begin_next_epoch(self, position: int) -> bool:
        """Begin the epoch after a position at the end of one, or go on with the one it is in."""
        loop, progress = self._trainer.fit_loop, self._progress()
        if position < self._batches_of_an_epoch():
            epochs: Any = (loop.epoch_progress.current, loop.epoch_progress.total)
            for done in epochs:
                done.processed = done.completed = self.batch_sampler.epoch
            loop.update_restart_stage()
            return False
        progress.current.reset()
        self.batch_sampler.set_epoch(self.batch_sampler.epoch + 1)
        return True

    def _batches_of_an_epoch(self) -> int:
        """Micro-batches after which the trainer ends an epoch."""
        limit, n_batches = self._trainer.limit_train_batches, len(self)
        return int(n_batches * limit) if isinstance(limit, float) else min(n_batches, limit)

    def _progress(self) -> Any:
        """The trainer's counts of micro-batches: `current` of this epoch, `total` of all."""
        return self._trainer.fit_loop.epoch_loop.batch_progress
