"""config.json of a folder: values with the defaults of their architecture, checked one by one."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from tx_lightning.nn import GELUFeedForward, ReLUFeedForward, SwishFeedForward
from tx_lightning.weights.errors import WeightsError

Values = Mapping[str, Any]
Arguments = dict[str, Any]

_FEED_FORWARDS: dict[str, tuple[str, Arguments]] = {
    "gelu": ("GELUFeedForward", {"approximate": "none"}),
    "gelu_python": ("GELUFeedForward", {"approximate": "none"}),
    "gelu_new": ("GELUFeedForward", {"approximate": "tanh"}),
    "gelu_fast": ("GELUFeedForward", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("GELUFeedForward", {"approximate": "tanh"}),
    "relu": ("ReLUFeedForward", {}),
    "silu": ("SwishFeedForward", {}),
    "swish": ("SwishFeedForward", {}),
}


class Configuration:
    """The values of a config.json.

    Args:
        values: What is in the file.
        defaults: What holds where the file is silent.
        where: The file, for errors.
    """

    def __init__(self, values: Values, defaults: Values, where: str) -> None:
        self._values = {**defaults, **values}
        self._where = where

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def integer(self, name: str) -> int:
        """A whole number."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refused(name, "a whole number")
        return value

    def number(self, name: str) -> float:
        """A number."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(name, "a number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self[name]
        if not isinstance(value, bool):
            raise self.refused(name, "true or false")
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuse a value other than these; a field that is not there is none."""
        if name in self._values and self[name] not in supported:
            raise self.refused(name, " or ".join(map(json.dumps, supported)))

    def equal(self, name: str, other: str) -> int:
        """The whole number that two fields must have in common."""
        if self[name] != self[other]:
            raise self.refused(name, f"the value of {other}, {json.dumps(self[other])}")
        return self.integer(name)

    def feed_forward(self, name: str, dropout: float = 0.0) -> Arguments:
        """The feed-forward sublayer of an activation, as a class path with arguments."""
        if self[name] not in _FEED_FORWARDS:
            raise self.refused(name, ", ".join(_FEED_FORWARDS))
        class_name, arguments = _FEED_FORWARDS[self[name]]
        return {
            "class_path": f"tx_lightning.nn.{class_name}",
            "init_args": {"dropout": dropout, **arguments},
        }

    def refused(self, name: str, supported: str) -> WeightsError:
        """The error about a field: its value, and what is supported."""
        return WeightsError(
            f"{self._where}: {name} is {json.dumps(self[name])}; supported: {supported}"
        )


def layer_norm(eps: float) -> Arguments:
    """A norm as a class path with arguments."""
    return {"class_path": "torch.nn.LayerNorm", "init_args": {"eps": eps}}


class FeedForward(NamedTuple):
    """A feed-forward sublayer in their terms.

    Attributes:
        activation: Its name.
        d_ff: Width in between.
        dropout: On the activations.
    """

    activation: str
    d_ff: int
    dropout: float


def feed_forward_of(module: nn.Module) -> FeedForward | None:
    """What Hugging Face would call a feed-forward sublayer; None where it has none like it."""
    if not isinstance(module, ReLUFeedForward | GELUFeedForward | SwishFeedForward):
        return None
    if type(module) not in (ReLUFeedForward, GELUFeedForward, SwishFeedForward):
        return None
    if isinstance(module, GELUFeedForward):
        name = {"none": "gelu", "tanh": "gelu_new"}[module.activation.approximate]
    else:
        name = "relu" if isinstance(module, ReLUFeedForward) else "silu"
    return FeedForward(name, module.inner.out_features, module.dropout.p)


def norm_eps(norms: Sequence[nn.Module]) -> float | None:
    """The epsilon that layer norms have in common; None where one is something else."""
    found = set()
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            return None
        found.add(norm.eps)
    return found.pop() if len(found) == 1 else None
