"""What every task is: a network trained on (sum, tokens) losses, that shows what it does.

A task is a `Task` with a `forward` that sums the loss of a batch, the steps of its evaluation, and
`attach`, which takes the tokenizers. Callbacks and the command line know this class and no other.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torchmetrics import Metric

from tx_lightning.checkpoints import NOTHING, checkpoint_record
from tx_lightning.data.batches import Batch
from tx_lightning.data.tokenizers import Tokenizer, Tokenizers, check_rows
from tx_lightning.described import Described
from tx_lightning.errors import ConfigurationError
from tx_lightning.losses import TokenLoss
from tx_lightning.nn.layers import LayeredNetwork
from tx_lightning.rebuilding import described_settings, rebuild, saved_location
from tx_lightning.sharding import Sharded, gather, scatter, shard
from tx_lightning.tasks.companions import (
    PlateauSteps,
    StepNumbers,
    StopWhenDiverged,
    TrainerSettings,
    check_callbacks,
    monitored,
)
from tx_lightning.tasks.resuming import hold_configuration
from tx_lightning.tasks.steps import (
    check_layer_decay,
    check_states,
    clip_gradients,
    configure_optimizers,
    gradient_scaler,
    log_metrics,
    scale_gradients,
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


@runtime_checkable
class Pads(Protocol):
    """A network, or a part of one, that must know which id is padding.

    Attributes:
        pad_id: The id; 0 until a tokenizer says otherwise.
    """

    pad_id: int

    def use_pad_id(self, pad_id: int) -> None:
        """Take another id for padding."""


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
        stop_when_diverged: Whether training ends when a loss or gradient norm is not finite.
        logged: The last optimizer step whose metrics were logged, and these.
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
        check_layer_decay(layer_decay)
        self.network = network
        self.vocab_size = vocab_size
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.layer_decay = layer_decay
        self.tokenizers: Tokenizers | None = None
        self.settings: dict[str, Any] | None = None
        self._described: tuple[dict[str, Any] | None, Mapping[str, str]] | None = None
        self.stop_when_diverged = True
        self.logged: tuple[int, dict[str, float]] = (-1, {})
        self.loaded_step: int | None = None  # of the checkpoint that the weights are of
        self._loaded_alone = False  # and in evaluation mode since
        self._train_sums: Tensor | None = None  # of whole steps since the last row of the log
        self._step_sums: Tensor | None = None  # of this one
        self._parts_seen = 0  # micro-batches of this step so far
        self._step_tokens = 0  # that the losses of this step were divided by
        self._grad_norm: Tensor | None = None
        self._monitored = False  # whether a callback needs the loss or norm of every step
        freeze_parameters(network, freeze)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "network" and isinstance(value, OptimizedModule):
            raise ValueError(
                "task.network = torch.compile(network) would compile nothing that a task calls and "
                "rename all weights: call task.network.compile(), with the same arguments"
            )
        super().__setattr__(name, value)

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
        for tokenizer in (tokenizers.source, tokenizers.target):
            check_special_ids(tokenizer, self.vocab_size)
        for name, part in self.network.named_modules():
            if isinstance(part, Pads):
                follow_pad_id(f"network.{name}.pad_id".replace("..", "."), part, tokenizers)
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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers of the network with `torch.compile`, to which all arguments go."""
        self.network.compile(*args, **kwargs)

    def setup(self, stage: str) -> None:
        """Take the tokenizers of the data that the trainer was given.

        Raises:
            ValueError: When they do not suit the network, or a part of it was wrapped by
                `torch.compile`.
        """
        for name, module in self.network.named_modules():
            if isinstance(module, OptimizedModule):
                raise ValueError(
                    f"network.{name} was replaced by torch.compile(...), which renames its weights "
                    f"in checkpoints: call network.{name}.compile() instead"
                )
        if self._compiler_ctx is not None and isinstance(self.network, LayeredNetwork):
            # The trainer was given torch.compile(task), and has all steps compiled, with whatever
            # they do to texts and files. The layers are what gains from it.
            self.network.compile_layers(self._compiler_ctx["dynamo_ctx"])
            to_uncompiled(self)
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

    def record(self) -> dict[str, Any]:
        """All that using the weights needs: settings and tokenizers."""
        tokenizers = None if self.tokenizers is None else self.tokenizers.to_dict()
        settings, undescribed = self.settings, NOTHING
        if settings is None:
            if self._described is None:
                self._described = described_settings(self, without=("optimizer", "scheduler"))
            settings, undescribed = self._described
        return checkpoint_record(settings, tokenizers, undescribed=undescribed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in the record, and what is needed to log the same when training is resumed."""
        checkpoint["tx_lightning"] = self.record()
        checkpoint["logged"] = self.logged
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
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            self.loaded_step = checkpoint["global_step"]
            return
        hold_configuration(self, checkpoint)
        if "train_sums" in checkpoint:
            self._take_train_sums(checkpoint["train_sums"])
        if "logged" in checkpoint:
            step, metrics = checkpoint["logged"]
            self.logged = step, dict(metrics)

    def _take_train_sums(self, sums: list[float]) -> None:
        """Go on from the sums over all processes, which the first one has from now on."""
        first, device = self.trainer.is_global_zero, self.trainer.strategy.root_device
        self._train_sums = torch.tensor(sums if first else [0.0, 0.0], device=device)

    def configure_callbacks(self) -> list[Callback]:
        """Bring what training needs, unless the trainer has it already."""
        check_callbacks(self.trainer, self)
        there = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        own = [StepNumbers(), PlateauSteps(), StopWhenDiverged(), TrainerSettings()]
        return [callback for callback in own if type(callback) not in there]

    @property
    def lr(self) -> float:
        """The learning rate that the schedule multiplies, where Lightning's `LearningRateFinder`
        looks for it; setting it changes the rate of the optimizer that training uses.

        Raises:
            ConfigurationError: When it is set and layers have rates of their own.
        """
        group = self._optimizers()[0].param_groups[0]
        rate: float = group.get("initial_lr", group["lr"])
        return rate

    @lr.setter
    def lr(self, rate: float) -> None:
        if self.layer_decay is not None:
            raise ConfigurationError(
                "LearningRateFinder sets one rate for all layers, but model.layer_decay is "
                f"{self.layer_decay}: leave out one of them"
            )
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = rate
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            schedule.base_lrs = [rate for _ in schedule.base_lrs]

    def _optimizers(self) -> list[Optimizer]:
        """Those of the trainer, or new ones where there is none yet."""
        attached = [] if self._trainer is None else self.trainer.optimizers
        return list(attached) or [self.configure_optimizers()["optimizer"]]

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
        self.loaded_step = None
        if self._loaded_alone and not any(module.training for module in self.modules()):
            self.train()

    def on_train_start(self) -> None:
        """Spare several processes an exchange before each step: no buffer changes in training.

        Where a callback monitors the loss of training, it finds it after every step.
        """
        check_states(self.trainer.optimizers)
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.broadcast_buffers = False
        self._monitored = any(name.startswith("train/") for name in monitored(self.trainer))
        step, metrics = self.logged  # of the checkpoint that training resumes from
        log_metrics(self.trainer, metrics, step, loggers=False)

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
            # The type is given, because half precision changes the default one.
            self._step_sums = torch.zeros(2, dtype=sums.loss.dtype, device=self.device)
            self._parts_seen = 0
        self._step_sums[0] += sums.loss.detach()
        self._step_sums[1] += batch.loss_tokens
        self._parts_seen += 1
        self._step_tokens = batch.step_tokens
        loss: Tensor = sums.loss * (batch.parts / batch.step_tokens)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide by the labels that were seen where a step has fewer micro-batches than planned.

        The trainer ends an epoch in the middle of a step when `limit_train_batches` or
        `overfit_batches` say so.
        """
        if self._parts_seen == self.trainer.accumulate_grad_batches or self._step_sums is None:
            return
        seen = float(self.trainer.strategy.reduce(self._step_sums[1], reduce_op="sum"))
        if seen:
            scale_gradients(self, self._step_tokens / seen)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and keep the norm for the log."""
        wanted = self._monitored or self._logs_after(self.trainer.global_step + 1)
        if gradient_clip_val is not None or wanted:
            self._grad_norm = clip_gradients(
                self, optimizer, gradient_clip_val, gradient_clip_algorithm
            )

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
        logs = self._logs_after(step)
        if not (logs or self._monitored) or self._train_sums is None or self._grad_norm is None:
            return
        loss, tokens = self.trainer.strategy.reduce(self._train_sums, reduce_op="sum").tolist()
        metrics = {"train/loss": loss / max(tokens, 1), "train/grad_norm": float(self._grad_norm)}
        log_metrics(self.trainer, metrics, step, loggers=logs)
        if not logs:
            return
        self._train_sums = None
        self.trainer.progress_bar_metrics["train/loss"] = metrics["train/loss"]
        if gradient_scaler(self.trainer) is not None:
            del metrics["train/grad_norm"]  # infinite whenever the scaler looks for a scale
        self.logged = step, metrics

    def _logs_after(self, step: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and step % every == 0

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
        # On the device, as processes with GPUs exchange nothing else; Apple's have no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        named = {
            f"{split}/{name}": value.to(dtype).to(self.device) for name, value in values.items()
        }
        # The metrics have added up all processes; the mean of equal numbers is that number.
        self.log_dict(named, prog_bar=split == "val", sync_dist=True)
        reset_metrics(scores)


def without_padding(ids: Sequence[int], pad_id: int) -> Sequence[int]:
    """Return the ids of a row up to its padding.

    Only what is at the end is padding: some models use the same id as the start token, which is the
    first of a row.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]


def reset_metrics(scores: nn.Module) -> None:
    """Begin all metrics below a module from nothing."""
    # Validation outside of fit runs in inference mode; what is made there could not be added to
    # in fit.
    with torch.inference_mode(False):
        for metric in scores.modules():
            if isinstance(metric, Metric):
                metric.reset()


def check_special_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with a special id for which the embedding table has no row."""
    named = {
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unk": tokenizer.unk_id,
        "mask": tokenizer.mask_id,
    }
    for name, special in named.items():
        if special is not None and not 0 <= special < vocab_size:
            raise ValueError(
                f"the tokenizer's {name}_id is {special}, but vocab_size is {vocab_size}: raise "
                "vocab_size, or use the tokenizer that belongs to the weights"
            )


def follow_pad_id(name: str, part: Pads, tokenizers: Tokenizers) -> None:
    """Have a part of a network pad with the id that its tokenizers pad with.

    Args:
        name: Of the part's `pad_id`, for the error.
        part: One that pads with 0, or with the right id.
        tokenizers: Of the data or of a checkpoint.

    Raises:
        ValueError: The part was given another id, or no single id will do.
    """
    ids = {tokenizers.source.pad_id, tokenizers.target.pad_id}
    if len(ids) > 1:
        raise ValueError(
            f"the source tokenizer pads with {tokenizers.source.pad_id} and the target tokenizer "
            f"with {tokenizers.target.pad_id}: a network has one pad_id for both"
        )
    pad_id = ids.pop()
    if pad_id in (tokenizers.source.eos_id, tokenizers.target.eos_id):
        raise ValueError(
            f"the tokenizer pads with {pad_id}, which also ends its texts: {name} would hide the "
            "ends of texts; use a tokenizer with a token for padding"
        )
    if part.pad_id not in (0, pad_id):
        raise ValueError(
            f"{name} is {part.pad_id}, but the tokenizer pads with {pad_id}: leave it out, it "
            "follows from the tokenizer"
        )
    if part.pad_id != pad_id:
        part.use_pad_id(pad_id)


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
