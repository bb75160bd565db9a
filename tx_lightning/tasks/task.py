"""What every task is: a network trained on (sum, tokens) losses, that shows what it does.

A task is a `Task` with a `forward` that sums the loss of a batch, the steps of its evaluation, and
`attach`, which takes the tokenizers. Callbacks and the command line know this class and no other.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torchmetrics import Metric

from tx_lightning.checkpoints import NOTHING, checkpoint_record
from tx_lightning.data.batches import Batch
from tx_lightning.data.tokenizers import Tokenizer, Tokenizers, check_rows
from tx_lightning.described import Described
from tx_lightning.losses import TokenLoss
from tx_lightning.rebuilding import described_settings, rebuild, saved_location
from tx_lightning.sharding import Sharded, gather, scatter, shard
from tx_lightning.tasks.steps import (
    check_states,
    clip_gradients,
    configure_optimizers,
    seed_batch,
)
from tx_lightning.trust import Trust

B = TypeVar("B", bound=Batch)
T = TypeVar("T", bound="Task[Any]")
Row = dict[str, str | float]  # of a table of samples: what stands in each column
Labels = tuple[list[str], list[str]]  # of an attention map: the tokens of its rows and columns


def fused_adamw(parameters: Any) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), one kernel for all parameters."""
    return AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


class Task(Described, LightningModule, Generic[B]):
    """A network with an optimizer, trained on batches of one kind.

    Args:
        network: What is trained.
        vocab_size: Rows of its embedding tables.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor,
            embeddings lowest (Howard & Ruder 2018); null: one rate for all.
        freeze: Parameters whose names match one of these patterns, with * for anything, are not
            trained, as `encoder.layers.0.*`.

    Attributes:
        tokenizers: Those of the data or of the checkpoint; None before either is there.
        settings: The task as a class path with arguments, which the command line sets; None where
            it was built in Python, and its checkpoints describe what it was built with.
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        vocab_size: int,
        *,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        layer_decay: float | None,
        freeze: Sequence[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.vocab_size = vocab_size
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.layer_decay = layer_decay
        self.tokenizers: Tokenizers | None = None
        self.settings: dict[str, Any] | None = None
        self._loaded_alone = False  # and in evaluation mode since
        self._train_sums: Tensor | None = None  # of whole steps since the last row of the log
        self._step_sums: Tensor | None = None  # of this one
        self._grad_norm: Tensor | None = None
        freeze_parameters(network, freeze)

    # What a task decides.

    @abstractmethod
    def forward(self, batch: B) -> TokenLoss:
        """Sum the loss over the labels of a batch."""

    @abstractmethod
    def sample_rows(self, n: int) -> list[Row]:
        """What the model makes of n examples of the last evaluation, as rows of a table."""

    @abstractmethod
    def attention_inputs(self, batch: B) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps.

        The labels are (row tokens, column tokens) for each kind of attention, as "encoder.self" or
        "cross"; padding has none.
        """

    def attach(self, tokenizers: Tokenizers) -> None:
        """Use these tokenizers.

        Raises:
            ValueError: When they differ from a checkpoint's, or do not suit the network.
        """
        if self.tokenizers is not None and self.tokenizers.to_dict() != tokenizers.to_dict():
            raise ValueError(
                "the tokenizers of the data differ from those of the checkpoint: use the data and "
                "tokenizer settings that it was trained with"
            )
        self.tokenizers = tokenizers

    def require_tokenizers(self) -> Tokenizers:
        """The tokenizers, where there must be some."""
        if self.tokenizers is None:
            raise ValueError("this task has no tokenizers yet: attach() them or load a checkpoint")
        return self.tokenizers

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a task with one text."""
        return self.require_tokenizers().source

    # Set-up and checkpoints.

    def setup(self, stage: str) -> None:
        """Take the tokenizers of the data that the trainer was given."""
        self.attach(self.trainer.datamodule.tokenizers)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Shard the parameters where the strategy asks for it.

        Raises:
            ValueError: When it is another strategy of that kind, whose checkpoints are not ours.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            shard(self, strategy.device_mesh["data_parallel"])
        elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise ValueError(
                f"trainer.strategy: {type(strategy).__name__} writes checkpoints that nothing here "
                "reads; use tx_lightning.sharding.Sharded (experiments/trainer/fsdp.yaml)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in all that using the weights needs: settings and tokenizers."""
        tokenizers = None if self.tokenizers is None else self.tokenizers.to_dict()
        settings, undescribed = self.settings, NOTHING
        if settings is None:
            settings, undescribed = described_settings(self, without=("optimizer", "scheduler"))
        checkpoint["tx_lightning"] = checkpoint_record(
            settings, tokenizers, undescribed=undescribed
        )
        if self._train_sums is not None:
            # Added up now, whether or not the run is resumed from here: so it ends the same.
            sums = self.trainer.strategy.reduce(self._train_sums, reduce_op="sum")
            self._take_train_sums(sums.tolist())
            checkpoint["train_sums"] = sums.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's tokenizers, or refuse if the data's differ."""
        tokenizers = Tokenizers.from_dict(checkpoint["tx_lightning"]["tokenizers"])
        for tokenizer in (tokenizers.source, tokenizers.target):
            check_rows(tokenizer, self.vocab_size)
        self.attach(tokenizers)
        self._loaded_alone = self._trainer is None
        if self._trainer is not None and "train_sums" in checkpoint:
            self._take_train_sums(checkpoint["train_sums"])

    def _take_train_sums(self, sums: list[float]) -> None:
        """Go on from the sums over all processes, which the first one has from now on."""
        first, device = self.trainer.is_global_zero, self.trainer.strategy.root_device
        self._train_sums = torch.tensor(sums if first else [0.0, 0.0], device=device)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule."""
        return configure_optimizers(
            self.network, self.optimizer, self.scheduler, layer_decay=self.layer_decay
        )

    @_restricted_classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[T],
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        trust: str | Iterable[str] = (),
        **changed: Any,
    ) -> T:
        """Rebuild the task of a checkpoint, in evaluation mode.

        Args:
            checkpoint_path: The file; its task must be of this class.
            map_location: Where the tensors go, as in `torch.load`; None: where they were, if there
                is such a device.
            hparams_file: Not supported: a checkpoint has all settings.
            strict: Whether all weights of task and file must have a partner.
            weights_only: True: checkpoints are never read in another way.
            trust: Packages whose classes the file may name, besides this class.
            **changed: Arguments of the task that replace those in the file.

        Raises:
            ValueError: When the file is refused, or an argument.
        """
        if not isinstance(checkpoint_path, str | Path):
            raise ValueError("checkpoint_path: give the name of a file")
        if hparams_file is not None:
            raise ValueError("hparams_file: a checkpoint has all settings; give what is to change")
        if weights_only is False:
            raise ValueError("weights_only=False: checkpoints hold nothing that would need it")
        return rebuild(
            checkpoint_path,
            cls,
            Trust.of(trust),
            map_location=saved_location if map_location is None else map_location,
            strict=strict,
            changed=changed,
        )

    def train(self: T, mode: bool = True) -> T:
        """Set the mode of all modules."""
        if mode:
            self._loaded_alone = False
        return super().train(mode)

    # Training.

    def on_fit_start(self) -> None:
        """Train a task from `load_task` with dropout, unless parts of it were set to a mode."""
        if self._loaded_alone and not any(module.training for module in self.modules()):
            self.train()

    def on_train_start(self) -> None:
        """Spare several processes an exchange before each step: no buffer changes in training."""
        check_states(self.trainer.optimizers)
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.broadcast_buffers = False

    def on_train_batch_start(self, batch: B, batch_idx: int) -> None:
        """Make this batch's dropout a function of its place in the run."""
        seed_batch(self.trainer, batch_idx)

    def training_step(self, batch: B, batch_idx: int) -> Tensor:
        """Return this part's share of the loss per label of the whole optimizer step.

        Accumulation and processes each average over their parts, so the sum is multiplied by the
        number of parts and divided by the labels of all of them.
        """
        sums = self(batch)
        if self._step_sums is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_sums = torch.zeros(2, device=self.device)
        self._step_sums[0] += sums.loss.detach()
        self._step_sums[1] += batch.loss_tokens
        loss: Tensor = sums.loss * (batch.parts / batch.step_tokens)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and keep the norm for the log."""
        if gradient_clip_val is not None or self._logs_after(self.trainer.global_step + 1):
            self._grad_norm = clip_gradients(self, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """On logging steps, log the loss per label since the last one and the gradient norm.

        Here rather than in a later hook, so that a checkpoint of this step is saved after it.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1  # the trainer counts it when this returns
        if self._step_sums is not None:
            before = self._train_sums
            self._train_sums = self._step_sums if before is None else before + self._step_sums
            self._step_sums = None
        if not self._logs_after(step) or self._train_sums is None or self._grad_norm is None:
            return
        loss, tokens = self.trainer.strategy.reduce(self._train_sums, reduce_op="sum").tolist()
        self._train_sums = None
        metrics = {"train/loss": loss / max(tokens, 1), "train/grad_norm": float(self._grad_norm)}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self.trainer.progress_bar_metrics["train/loss"] = metrics["train/loss"]

    def _logs_after(self, step: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step % max(1, every) == 0

    # Evaluation.

    def on_validation_start(self) -> None:
        """Let every process evaluate at its own pace, and the first one show examples."""
        gather(self)

    def on_validation_end(self) -> None:
        """Go on with shards: callbacks have done what they do here."""
        scatter(self)

    def on_test_start(self) -> None:
        """As in validation."""
        gather(self)

    def on_test_end(self) -> None:
        """As in validation."""
        scatter(self)

    def on_predict_start(self) -> None:
        """As in validation."""
        gather(self)

    def on_predict_end(self) -> None:
        """As in validation."""
        scatter(self)

    def log_scores(self, split: str, scores: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Log the scores of an evaluation and begin the next from nothing.

        Args:
            split: val or test; stands before the names.
            scores: Holds the metrics.
            values: Each score by its name.
        """
        named = {f"{split}/{name}": value for name, value in values.items()}
        # The metrics have added up all processes; the mean of equal numbers is that number.
        self.log_dict(named, prog_bar=split == "val", sync_dist=True)
        reset_metrics(scores)


def reset_metrics(scores: nn.Module) -> None:
    """Begin all metrics below a module from nothing."""
    # Validation outside of fit runs in inference mode; what is made there could not be added to
    # in fit.
    with torch.inference_mode(False):
        for metric in scores.modules():
            if isinstance(metric, Metric):
                metric.reset()


def freeze_parameters(network: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match a pattern out of training.

    Args:
        network: Its parameters are named as in its state dict.
        patterns: Names with * for anything.

    Raises:
        ValueError: When a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            shown = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(
                f"freeze: no parameter is named {pattern!r}; names begin with {shown}, and * "
                "stands for anything"
            )
        for name in matching:
            network.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze={list(patterns)} leaves no parameter to train")


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuse a share of the target that leaves nothing of it."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
