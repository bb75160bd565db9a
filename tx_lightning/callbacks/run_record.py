"""What a run is: its configuration, size, data and scores, told to the loggers and checkpoints."""

import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from tx_lightning.loggers import WandB
from tx_lightning.metrics import CorpusBLEU, CorpusChrF
from tx_lightning.provenance import add_start, provenance
from tx_lightning.runs import sizes


@runtime_checkable
class HasStatistics(Protocol):
    """A datamodule that counted its data: pairs, tokens, what the filters dropped."""

    statistics: dict[str, int | float | str]


@runtime_checkable
class HasIdentity(Protocol):
    """A datamodule that can say which data it has."""

    def identity(self) -> dict[str, Any]:
        """Digests of all that decides its batches."""


class RunRecord(Callback):
    """Tells the loggers what is being run, and every checkpoint how good it is.

    Loggers receive the resolved configuration, `n_parameters`, `data_statistics` and the
    signatures of BLEU and chrF. A checkpoint written at the step of a validation receives
    `checkpoint["metrics"]`, by which `tx-lightning average --best` ranks. Where the run comes from
    (`tx_lightning.provenance`) is written to the run folder and to `checkpoint["provenance"]`;
    `checkpoint["sizes"]` and `checkpoint["wandb_rows"]` say how much of metrics, samples and W&B's
    history is kept when training resumes from it.

    Args:
        config: The resolved configuration, nested, of plain values.
        folder: The run folder.
    """

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self._provenance: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._tell(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._metrics = {
            name: value
            for name, value in values.items()
            if name.startswith("val/") and math.isfinite(value)  # NaN is never best
        }
        self._step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._step == trainer.global_step:
            checkpoint["metrics"] = self._metrics
        checkpoint["provenance"] = self._provenance
        checkpoint["sizes"] = sizes(self.folder)
        rows = [logger.rows for logger in trainer.loggers if isinstance(logger, WandB)]
        checkpoint["wandb_rows"] = rows[0] if rows else None

    def _tell(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        record = dict(self.config)
        record["n_parameters"] = sum(p.numel() for p in pl_module.parameters())
        untyped: Any = trainer  # Lightning sets these attributes of a trainer elsewhere
        if isinstance(untyped.datamodule, HasStatistics):
            record["data_statistics"] = untyped.datamodule.statistics
        for metric in pl_module.modules():
            if isinstance(metric, CorpusBLEU):
                record["bleu_signature"] = metric.signature
            elif isinstance(metric, CorpusChrF):
                record["chrf_signature"] = metric.signature
        data = untyped.datamodule
        identity = data.identity() if isinstance(data, HasIdentity) else None
        self._provenance = provenance(self.config, identity)
        if not untyped.fast_dev_run:
            add_start(self._provenance, self.folder)
        for logger in trainer.loggers:
            logger.log_hyperparams(record)
