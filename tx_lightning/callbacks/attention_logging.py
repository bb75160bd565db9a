"""Attention maps of a few fixed sentences: pictures, and the entropy of every head.

Shapes: L layers, H heads, T queries, S keys.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from tx_lightning.callbacks.attention_pictures import draw
from tx_lightning.callbacks.modes import mode
from tx_lightning.callbacks.pictures import save
from tx_lightning.data.module import TextData
from tx_lightning.nn.attention import record_attention, recordable_attentions
from tx_lightning.nn.checks import check_size
from tx_lightning.tasks import LanguageModeling
from tx_lightning.tasks.companions import evaluated_step
from tx_lightning.tasks.task import Labels, Task

_NAME = re.compile(r"(?:(\w+)\.)?layers\.\d+\.(self|cross)_attention")


class AttentionLogger(Callback):
    """Draw what a few validation examples attend to.

    At its log points, and at no other time, the first process runs the examples through the naive
    attention kernel, in evaluation mode. For each example and kind (of a translation model
    `encoder_self`, `decoder_self` and `cross`, of a language model `self`, of a classifier
    `encoder_self`) a picture of layers by heads, queries down and keys across, goes to `attention/`
    in the run folder, and to Weights & Biases and TensorBoard where they are loggers. It is split
    into several where it would have more than 2,000 pixels on a side; up to 100 tokens are shown.
    In a language model's pictures, red lines mark where a document ends. The mean entropy of the
    rows of each chosen head, in nats, is logged as `attention/<kind>/layer<i>/head<j>/entropy`: 0
    attends to one token, log S to all alike.

    Args:
        examples: Positions in the validation split.
        layers: Layers to show, from 0, and -1 for the last; or all.
        heads: Heads to show, from 0; or all.
        every_n_steps: Log every so many optimizer steps. null: after each validation.

    Raises:
        ValueError: When there is no such example, layer or head, or when the network has no
            attention, or attention whose weights are not known.
    """

    def __init__(
        self,
        examples: Sequence[int] = (0, 1),
        layers: Sequence[int] | Literal["all"] = (-1,),
        heads: Sequence[int] | Literal["all"] = "all",
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps} of AttentionLogger must be at least 1, "
                "or null to log after each validation"
            )
        if every_n_steps is not None:
            check_size("every_n_steps", every_n_steps)
        self.examples = list(examples)
        self.layers = layers
        self.heads = heads
        self.every_n_steps = every_n_steps
        self._step = 0  # the last optimizer step that was seen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        if not isinstance(pl_module, Task):
            raise ValueError(
                f"AttentionLogger cannot draw the maps of a {type(pl_module).__name__}"
            )
        data = _data(trainer)
        if data.val_split in data.stores:
            _chosen("examples", self.examples, range(data.n_examples))
        elif self.every_n_steps is not None:
            raise ValueError(
                "AttentionLogger draws examples of validation, which is not there: raise "
                "trainer.limit_val_batches, or leave every_n_steps out"
            )
        network = pl_module.network
        attentions = recordable_attentions(network)
        stacks = _stacks(attentions)
        if not stacks:
            raise ValueError(
                f"AttentionLogger finds no layers with attention in a {type(network).__name__}: "
                "remove it from the callbacks"
            )
        for names in stacks.values():
            _chosen("layers", self.layers, range(-len(names), len(names)))
            for name in names:
                _chosen("heads", self.heads, range(attentions[name].n_heads))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.every_n_steps is None or trainer.global_step == self._step:
            return  # nothing to do, or batches accumulate
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Task)
        folder = Path(trainer.default_root_dir) / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        step = evaluated_step(trainer)
        entropies: dict[str, float] = {}
        for kind, maps in self._record(trainer, pl_module).items():
            paths: dict[str, Path] = {}
            for example, weights, labels, ends in zip(
                self.examples, maps.weights, maps.labels, maps.ends, strict=True
            ):
                title = f"{kind}, validation example {example}, step {step}"
                reads = kind in ("decoder_self", "cross")
                pages = draw(
                    weights, labels, maps.layers, maps.heads, title, reads=reads, ends=ends
                )
                for number, page in enumerate(pages, 1):
                    part = f"-{number}of{len(pages)}" if len(pages) > 1 else ""
                    path = folder / f"{kind}-example{example}-step{step}{part}.png"
                    save(page, path)
                    paths[f"{kind}/example{example}{part}"] = path
            _log_images(trainer, kind, paths, step)
            # (L, H, T) of each example -> (L, H, all T)
            rows = torch.cat([entropy(weights) for weights in maps.weights], dim=-1)
            for layer, of_layer in zip(maps.layers, rows.mean(-1).tolist(), strict=True):
                for head, value in zip(maps.heads, of_layer, strict=True):
                    entropies[f"attention/{kind}/layer{layer}/head{head}/entropy"] = value
        for logger in trainer.loggers:
            logger.log_metrics(entropies, step=step)

    def _record(self, trainer: Trainer, task: Task[Any]) -> dict[str, "_Maps"]:
        """Run the examples one by one, so that nothing is padded; return the maps of each kind."""
        found: dict[str, _Maps] = {}
        for example in self.examples:
            batch = _data(trainer).example(example).to(task.device)
            inputs, [labels] = task.attention_inputs(batch)
            with (
                torch.no_grad(),
                mode(task.network, training=False),
                trainer.precision_plugin.forward_context(),
                record_attention(task.network) as maps,
            ):
                task.network(*inputs)
            for kind, names in _stacks(maps).items():
                numbers = _chosen("layers", self.layers, range(-len(names), len(names)))
                layers = list(dict.fromkeys(i % len(names) for i in numbers))
                weights = torch.cat([maps[names[layer]] for layer in layers])  # (L, H, T, S)
                heads = _chosen("heads", self.heads, range(weights.shape[1]))
                of_kind = found.setdefault(kind.replace(".", "_"), _Maps(layers, heads))
                of_kind.weights.append(weights[:, heads].float().cpu())
                of_kind.labels.append(labels[kind])
                of_kind.ends.append(_document_ends(task, inputs[0]))
        return found


def _data(trainer: Trainer) -> TextData[Any, Any]:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, TextData)
    return data


@dataclass
class _Maps:
    """The maps of one kind: of L layers and H heads, for each example (L, H, T, S) and labels."""

    layers: list[int]
    heads: list[int]
    weights: list[Tensor] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)


def _document_ends(task: Task[Any], ids: Tensor) -> list[int]:
    """The tokens that end documents, where one row (1, T) can hold several."""
    if not isinstance(task, LanguageModeling):
        return []
    eos_id = task.tokenizer.eos_id
    return [place for place, token in enumerate(ids[0].tolist()) if token == eos_id]


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of each distribution over keys: (..., S) -> (...)."""
    terms: Tensor = torch.special.entr(weights)  # -w log w, and 0 at 0
    return terms.sum(-1)


def _log_images(trainer: Trainer, kind: str, paths: Mapping[str, Path], step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            images = [str(path) for path in paths.values()]
            logger.log_image(f"attention/{kind}", images, step=step)
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for name, path in paths.items():
                image = imread(path)[..., :3]
                logger.experiment.add_image(f"attention/{name}", image, step, dataformats="HWC")


def _stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the attentions of each kind, in the order of their layers."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            stack, kind = match.groups()
            key = kind if kind == "cross" or stack is None else f"{stack}.{kind}"
            stacks.setdefault(key, []).append(name)
    return stacks


def _chosen(name: str, chosen: Sequence[int] | Literal["all"], existing: range) -> list[int]:
    """Return what was chosen of what exists.

    Raises:
        ValueError: When one does not exist.
    """
    if chosen == "all":
        return [number for number in existing if number >= 0]
    numbers = [int(number) for number in chosen]
    for number in numbers:
        if number not in existing:
            raise ValueError(
                f"{name}={numbers} of AttentionLogger: there is no {number}, only "
                f"{existing.start} to {existing.stop - 1}"
            )
    return numbers
