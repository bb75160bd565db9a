"""The keys and values that decoding keeps, so that each step computes one new position only.

Shapes: N rows being decoded, H heads, S positions so far, K head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_CAPACITY = 32  # positions; doubled each time it is full


class KeyValues(NamedTuple):
    """Keys and values already projected and split into heads: both (N, H, S, K)."""

    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> "KeyValues":
        """Keep, reorder or repeat rows: row i of the result is row rows[i]."""
        return KeyValues(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class KeyValueCache:
    """A growing (N, H, S, K) pair of keys and values; appending costs amortized constant time."""

    def __init__(self) -> None:
        self.length = 0
        self._buffer: KeyValues | None = None

    def append(self, new: KeyValues) -> KeyValues:
        """Append positions (N, H, T, K) and return all positions so far, (N, H, S + T, K)."""
        end = self.length + new.keys.shape[2]
        buffer = self.reserve(new.keys, new.keys.shape)
        buffer.keys[:, :, self.length : end] = new.keys
        buffer.values[:, :, self.length : end] = new.values
        self.length = end
        return KeyValues(buffer.keys[:, :, :end], buffer.values[:, :, :end])

    def reserve(self, like: Tensor, shape: Sequence[int]) -> KeyValues:
        """Make room for keys and values of a shape (N, H, T, K), and return the whole buffer.

        `append` does so as well; where layers are compiled, a network does it before calling them,
        since each way through their code is compiled for itself.

        Args:
            like: Of the device and type that keys and values will have.
            shape: That of the positions to come.
        """
        rows, h, t, k = shape
        end, buffer = self.length + t, self._buffer
        if buffer is None or end > buffer.keys.shape[2]:
            capacity = max(_FIRST_CAPACITY, 2 * end)
            grown = KeyValues(*(like.new_empty(rows, h, capacity, k) for _ in range(2)))
            if buffer is not None:
                for old, larger in zip(buffer, grown, strict=True):
                    larger[:, :, : self.length] = old[:, :, : self.length]
            self._buffer = buffer = grown
        return buffer

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows in place: row i becomes what row rows[i] was."""
        if self._buffer is None:
            return
        if self._buffer.keys.device.type != "cpu":  # some devices write no parts of a tensor
            self._buffer = self._buffer.select(rows)
            return
        selected = KeyValues(*(old.new_empty(len(rows), *old.shape[1:]) for old in self._buffer))
        for old, new in zip(self._buffer, selected, strict=True):  # what is filled, and no more
            torch.index_select(old[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
        self._buffer = selected
