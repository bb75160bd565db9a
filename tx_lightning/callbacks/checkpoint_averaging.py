"""Average the last or the best checkpoints when training ends."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from tx_lightning.averaging import average_checkpoints, best_checkpoints, last_checkpoints
from tx_lightning.loggers import WandB
from tx_lightning.nn.checks import check_size


class CheckpointAveraging(Callback):
    """Write `averaged.ckpt` beside the checkpoints of a run when it ends (or is stopped).

    `test --ckpt_path .../averaged.ckpt` and `translate` use it like any other; training goes on
    from the others. Keep enough of them: `ModelCheckpoint(save_top_k=n, monitor="step",
    mode="max")` keeps the last n. It has no state: it reads what is in the folder.

    Args:
        n: How many checkpoints to average, or all when there are fewer.
        best: A validation metric, such as val/bleu, to take the n best by; null takes the last n.

    Raises:
        ValueError: When `n` is below 1 or no `ModelCheckpoint` is among the callbacks.
    """

    def __init__(self, n: int = 10, best: str | None = None) -> None:
        if n < 1:
            raise ValueError(f"n={n} of CheckpointAveraging must be at least 1")
        check_size("n", n)
        self.n = n
        self.best = best

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        saved = any(isinstance(c, ModelCheckpoint) for c in trainer.checkpoint_callbacks)
        development: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage == "fit" and not saved and not development:
            raise ValueError(
                "CheckpointAveraging has no checkpoints to average: "
                "add a ModelCheckpoint to trainer.callbacks"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = _folder(trainer)
        if trainer.is_global_zero and folder is not None:
            averaged = self._average(folder)
            for logger in trainer.loggers:
                if averaged is not None and isinstance(logger, WandB):
                    logger.log_checkpoint(averaged, ["averaged"])
        trainer.strategy.barrier("averaged")

    def _average(self, folder: Path) -> Path | None:
        if self.best is None:
            paths = last_checkpoints(folder, self.n)
        else:
            paths = best_checkpoints(folder, self.n, self.best)
        if not paths:
            scored = "" if self.best is None else f" with {self.best}"
            rank_zero_info(f"CheckpointAveraging: {folder} has no checkpoints{scored} to average")
            return None
        out = folder / "averaged.ckpt"
        average_checkpoints(paths, out)
        rank_zero_info(f"averaged {len(paths)} checkpoints (n={self.n}) into {out}")
        return out


def _folder(trainer: Trainer) -> Path | None:
    """The folder of the first `ModelCheckpoint`, None where there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath)
    return None
