"""config.json of a folder: values with the defaults of their architecture, checked one by one."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from tx_lightning.nn import GELUFeedForward, ReLUFeedForward, SwishFeedForward
from tx_lightning.weights.errors import WeightsError

Values = Mapping[str, Any]
Arguments = dict[str, Any]

MOST = 10_000_000  # rows, columns or positions of a table
MOST_LAYERS = 10_000
_LONGEST_VALUE = 60  # characters of a value in a message
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
    """The fields of config.json, with type and range checks.

    Args:
        values: The fields in the file.
        defaults: Values of fields that the file omits.
        where: The path of the file, for errors.
    """

    def __init__(self, values: Values, defaults: Values, where: str) -> None:
        self._values = {**defaults, **values}
        self._where = where
        self._files = dict.fromkeys(values, where)

    def override(self, values: Values, where: str) -> None:
        """Replace fields by those of another file."""
        self._values.update(values)
        self._files.update(dict.fromkeys(values, where))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def integer(self, name: str, least: int = 1, most: int = MOST) -> int:
        """Return an integer within bounds, by default those of a size."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refused(name, f"a whole number from {least:,} to {most:,}")
        return value

    def optional(self, name: str, least: int = 1, most: int = MOST) -> int | None:
        """Return an integer within bounds, or None."""
        return None if self[name] is None else self.integer(name, least, most)

    def heads(self, name: str, width: str) -> int:
        """Return a number of attention heads; it must divide the width."""
        value = self.integer(name)
        if self.integer(width) % value:
            raise self.refused(name, f"a divisor of {width}, {self[width]}")
        return value

    def token_id(self, name: str) -> int:
        """Return a token id: a row of the embedding table."""
        value = self[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return self._row(name, value)

    def check_token_ids(self) -> None:
        """Refuse any token id that is not a row of the embedding table, even if it is not used."""
        for name, value in self._values.items():
            if name.endswith("_token_id") and value is not None:
                for one in value if isinstance(value, list) and value else [value]:
                    self._row(name, one)

    def _row(self, name: str, value: Any) -> int:
        rows = self.integer("vocab_size")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows:
            raise self.refused(name, f"0 to {rows - 1}, as vocab_size is {rows}")
        return value

    def number(self, name: str) -> float:
        """Return a number of moderate size."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
            raise self.refused(name, "a number")
        return float(value)

    def share(self, name: str) -> float:
        """Return a probability such as dropout, at least 0 and below 1."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.refused(name, "a number of at least 0 and below 1")
        return float(value)

    def epsilon(self, name: str) -> float:
        """Return the epsilon of a norm."""
        value = self.share(name)
        if value == 0:
            raise self.refused(name, "a number above 0 and below 1")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        value = self[name]
        if not isinstance(value, bool):
            raise self.refused(name, "true or false")
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuse a field that is present and has another value."""
        if name not in self._values:
            return
        value = self[name]
        if not any(type(value) is type(other) and value == other for other in supported):
            raise self.refused(name, " or ".join(map(json.dumps, supported)))

    def equal(self, name: str, other: str) -> int:
        """Return an integer that two fields must share."""
        if self.integer(name) != self.integer(other):
            raise self.refused(name, f"the value of {other}, {json.dumps(self[other])}")
        return self.integer(name)

    def feed_forward(self, name: str, dropout: float = 0.0) -> Arguments:
        """Return the feed-forward sublayer of an activation, as class path and arguments."""
        if not isinstance(self[name], str) or self[name] not in _FEED_FORWARDS:
            raise self.refused(name, ", ".join(_FEED_FORWARDS))
        class_name, arguments = _FEED_FORWARDS[self[name]]
        return {
            "class_path": f"tx_lightning.nn.{class_name}",
            "init_args": {"dropout": dropout, **arguments},
        }

    def refused(self, name: str, supported: str) -> WeightsError:
        """Build the error for a field: its value and what is supported."""
        value = json.dumps(self[name])
        if len(value) > _LONGEST_VALUE:
            value = f"{value[:_LONGEST_VALUE]}..."
        where = self._files.get(name, self._where)
        default = "" if name in self._files else " by default"
        return WeightsError(f"{where}: {name} is {value}{default}; supported: {supported}")


def same_activation(one: Any, other: Any) -> bool:
    """Return whether two fields of config.json name the same activation."""
    names = [value for value in (one, other) if isinstance(value, str) and value in _FEED_FORWARDS]
    return len(names) == 2 and _FEED_FORWARDS[names[0]] == _FEED_FORWARDS[names[1]]


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
        if type(norm) is not nn.LayerNorm or not norm.elementwise_affine:
            return None
        found.add(norm.eps)
    return found.pop() if len(found) == 1 else None
