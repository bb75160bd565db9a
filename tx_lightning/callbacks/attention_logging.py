"""Attention maps of a few fixed sentences: pictures, and the entropy of every head.

Shapes: L layers, H heads, T queries, S keys.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from tx_lightning.callbacks.modes import mode
from tx_lightning.data.module import TextData
from tx_lightning.nn.attention import MultiHeadAttention, record_attention
from tx_lightning.nn.checks import check_size
from tx_lightning.tasks.task import Labels, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = re.compile(r"(?:(\w+)\.)?layers\.\d+\.(self|cross)_attention")
_MOST_TOKENS = 100  # of a side in a picture; a longer sentence is cut there
_TOKEN, _LETTER = 0.17, 0.065  # inches for a cell and for a letter of a label


class AttentionLogger(Callback):
    """Draw what a few validation examples attend to, with whatever attention the network has.

    At its log points, and at no other time, the first process runs the examples through the naive
    attention kernel, in evaluation mode. For each example and kind (of a translation model
    `encoder_self`, `decoder_self` and `cross`, of a language model `self`, of a classifier
    `encoder_self`) a picture of layers by heads, queries down and keys across, goes to `attention/`
    in the run folder, and to Weights & Biases and TensorBoard where they are loggers. The mean
    entropy of the rows of each chosen head, in nats, is logged as
    `attention/<kind>/layer<i>/head<j>/entropy`: 0 attends to one token, log S to all alike.

    Args:
        examples: Positions in the validation split.
        layers: Layers to show, from 0, and -1 for the last; or all.
        heads: Heads to show, from 0; or all.
        every_n_steps: Log every so many optimizer steps. null: after each validation.

    Raises:
        ValueError: When there is no such example, layer or head.
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
        _chosen("examples", self.examples, range(_data(trainer).n_examples))
        network = pl_module.network
        for names in _stacks(network).values():
            _chosen("layers", self.layers, range(-len(names), len(names)))
            for name in names:
                attention = network.get_submodule(name)
                assert isinstance(attention, MultiHeadAttention)
                _chosen("heads", self.heads, range(attention.n_heads))

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
        step = trainer.global_step
        entropies: dict[str, float] = {}
        for kind, maps in self._record(trainer, pl_module).items():
            paths = []
            for example, weights, labels in zip(
                self.examples, maps.weights, maps.labels, strict=True
            ):
                title = f"{kind}, validation example {example}, step {step}"
                paths.append(folder / f"{kind}-example{example}-step{step}.png")
                _save(draw(weights, labels, maps.layers, maps.heads, title), paths[-1])
            _log_images(trainer, kind, paths, self.examples, step)
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
            for kind, names in _stacks(task.network).items():
                numbers = _chosen("layers", self.layers, range(-len(names), len(names)))
                layers = list(dict.fromkeys(i % len(names) for i in numbers))
                weights = torch.cat([maps[names[layer]] for layer in layers])  # (L, H, T, S)
                heads = _chosen("heads", self.heads, range(weights.shape[1]))
                of_kind = found.setdefault(kind.replace(".", "_"), _Maps(layers, heads))
                of_kind.weights.append(weights[:, heads].float().cpu())
                of_kind.labels.append(labels[kind])
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


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of each distribution over keys: (..., S) -> (...)."""
    terms: Tensor = torch.special.entr(weights)  # -w log w, and 0 at 0
    return terms.sum(-1)


def draw(
    weights: Tensor, labels: Labels, layers: Sequence[int], heads: Sequence[int], title: str
) -> "Figure":
    """Draw the maps of one sentence, a row for each layer and a column for each head.

    Args:
        weights: (L, H, T, S).
        labels: T and S tokens, written at the left and below.
        layers: Their L numbers.
        heads: Their H numbers.
        title: Stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = ([_short(token) for token in tokens[:_MOST_TOKENS]] for tokens in labels)
    weights = weights[:, :, : len(rows), : len(columns)]
    # In inches. Placing the axes by hand takes a tenth of the time of matplotlib's layouts, and
    # texts a tenth of that of ticks.
    width, height = max(1.2, _TOKEN * len(columns)), max(0.6, _TOKEN * len(rows))
    left, bottom = (_LETTER * max(map(len, tokens)) + 0.1 for tokens in (rows, columns))
    gap, top = 0.25, 0.35
    total_width = left + (width + gap) * len(heads)
    total_height = bottom + (height + gap) * len(layers) + top
    figure = Figure(figsize=(total_width, total_height))
    FigureCanvasAgg(figure)  # no window, no global state of pyplot
    figure.text(0.1 / total_width, 1 - 0.1 / total_height, title, fontsize=9, va="top")
    for i, layer in enumerate(layers):
        y = bottom + (height + gap) * (len(layers) - 1 - i)
        for j, head in enumerate(heads):
            x = left + (width + gap) * j
            axes = figure.add_axes(
                (x / total_width, y / total_height, width / total_width, height / total_height)
            )
            axes.imshow(weights[i, j].numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_title(f"layer {layer}, head {head}", fontsize=7, pad=2)
            axes.set_axis_off()
            # A $ in the data is a $.
            if j == 0:
                for t, token in enumerate(rows):
                    axes.text(-0.7, t, token, ha="right", va="center", fontsize=7, parse_math=False)
            if i == len(layers) - 1:
                for s, token in enumerate(columns):
                    axes.text(
                        s,
                        len(rows) - 0.3,
                        token,
                        ha="center",
                        va="top",
                        fontsize=7,
                        rotation=90,
                        parse_math=False,
                    )
    return figure


def _short(token: str) -> str:
    return token if len(token) <= 16 else f"{token[:15]}…"


def _save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks
        figure.savefig(path)


def _log_images(
    trainer: Trainer, kind: str, paths: list[Path], examples: list[int], step: int
) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"attention/{kind}", [str(path) for path in paths], step=step)
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for example, path in zip(examples, paths, strict=True):
                image = imread(path)[..., :3]
                tag = f"attention/{kind}/example{example}"
                logger.experiment.add_image(tag, image, step, dataformats="HWC")


def _stacks(network: nn.Module) -> dict[str, list[str]]:
    """Return the names of the attentions of each kind, in the order of their layers."""
    stacks: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        match = _NAME.fullmatch(name)
        if match and isinstance(module, MultiHeadAttention):
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
