"""Start training from the weights of another run, and say what was taken and what was not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tx_lightning.checkpoints import RECORD, CheckpointError, read_checkpoint
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.tasks.steps import parameter_depths
from tx_lightning.tasks.task import Task

NETWORK = "network."
_SHOWN = 6  # names in a line


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint to start from.

    Args:
        path: The file.
        weights: Its network, by the names that the parameters have in it.
        tokenizers: Those it was trained with.
    """

    path: Path
    weights: dict[str, Tensor]
    tokenizers: Tokenizers

    @classmethod
    def read(cls, path: str | Path) -> "Pretrained":
        """Read a checkpoint of `fit`, `average` or `import`.

        Raises:
            CheckpointError: When it cannot be read, or has no network or no tokenizers.
        """
        checkpoint = read_checkpoint(path, lazily=True)
        weights = {
            name.removeprefix(NETWORK): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(NETWORK)
        }
        if not weights:
            raise CheckpointError(f"pretrained: checkpoint {path} holds no network")
        return cls(Path(path), weights, tokenizers_of(path, checkpoint))


@dataclass(frozen=True)
class Loaded:
    """What became of the weights.

    Attributes:
        loaded: Tensors that were taken.
        new: Tensors that were not, and start as they were initialized, each with the reason.
        unused: Tensors of the checkpoint that the network has no place for.
        share: Of all parameters, how many were taken; 0 to 1.
    """

    loaded: list[str]
    new: dict[str, str]
    unused: list[str]
    share: float

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.new)
        lines = [
            f"{len(self.loaded)} of {total} tensors loaded, {self.share:.1%} of the parameters"
        ]
        for reason in dict.fromkeys(self.new.values()):
            names = [name for name, why in self.new.items() if why == reason]
            lines.append(f"  new, {reason}: {_listed(names)}")
        if self.unused:
            lines.append(f"  not used, as this network has no such part: {_listed(self.unused)}")
        return "\n".join(lines)


def tokenizers_of(path: str | Path, checkpoint: dict[str, Any]) -> Tokenizers:
    """The tokenizers in a checkpoint.

    Raises:
        CheckpointError: When it has none.
    """
    texts = checkpoint[RECORD]["tokenizers"]
    if not texts:
        raise CheckpointError(f"checkpoint {path} has no tokenizers: it cannot read or write text")
    try:
        return Tokenizers.from_dict(texts)
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path}: its tokenizers are damaged: {reason}") from error


def initialize(task: Task[Any], pretrained: Pretrained) -> Loaded:
    """Copy the weights that have the same name and shape into the network of a task.

    The parts above the layers (a head, a pooler) may be new. Embeddings and layers of another shape
    are an error: most likely a size in the model section is not that of the checkpoint.

    Raises:
        CheckpointError: When embeddings or layers do not fit, or nothing does.
    """
    network, given = task.network, pretrained.weights
    ours = network.state_dict()
    depths = parameter_depths(network)
    top = max(depths.values(), default=0)
    loaded: list[str] = []
    new: dict[str, str] = {}
    for name, tensor in ours.items():
        if name not in given:
            new[name] = "as the checkpoint has none"
        elif given[name].shape == tensor.shape:
            loaded.append(name)
        elif depths.get(name, top) < top:
            raise CheckpointError(
                f"pretrained: checkpoint {pretrained.path} does not fit: {name} is "
                f"{tuple(given[name].shape)} there and {tuple(tensor.shape)} here; make the sizes "
                "in the data and model sections those of the checkpoint"
            )
        else:
            new[name] = f"as the checkpoint's has another shape, {tuple(given[name].shape)}"
    if not loaded:
        raise CheckpointError(
            f"pretrained: checkpoint {pretrained.path} has nothing for a "
            f"{type(network).__name__}: its tensors are {_listed(list(given))}"
        )
    with torch.no_grad():
        for name in loaded:
            ours[name].copy_(given[name])
    unused = [name for name in given if name not in ours]
    return Loaded(loaded, new, unused, _share(network, loaded))


def _share(network: nn.Module, loaded: Sequence[str]) -> float:
    sizes = {name: p.numel() for name, p in network.named_parameters()}  # a tied one once
    return sum(sizes.get(name, 0) for name in loaded) / max(1, sum(sizes.values()))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
