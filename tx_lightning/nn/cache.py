"""The keys and values that decoding keeps, so that each step computes one new position only.

Shapes: N rows being decoded, H heads, S positions so far, K head width.
"""

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
        buffer = self._buffer
        if buffer is None or end > buffer.keys.shape[2]:
            buffer = self._grow(new, capacity=max(_FIRST_CAPACITY, 2 * end))
        buffer.keys[:, :, self.length : end] = new.keys
        buffer.values[:, :, self.length : end] = new.values
        self._buffer, self.length = buffer, end
        return KeyValues(buffer.keys[:, :, :end], buffer.values[:, :, :end])

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows in place: row i becomes what row rows[i] was."""
        if self._buffer is None:
            return
        selected = self._empty(self._buffer.keys, len(rows), self._buffer.keys.shape[2])
        for old, new in zip(self._buffer, selected, strict=True):  # what is filled, and no more
            torch.index_select(old[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
        self._buffer = selected

    def _grow(self, new: KeyValues, capacity: int) -> KeyValues:
        grown = self._empty(new.keys, len(new.keys), capacity)
        if self._buffer is not None:
            for old, larger in zip(self._buffer, grown, strict=True):
                larger[:, :, : self.length] = old[:, :, : self.length]
        return grown

    @staticmethod
    def _empty(like: Tensor, rows: int, capacity: int) -> KeyValues:
        _, h, _, k = like.shape
        keys, values = (like.new_empty(rows, h, capacity, k) for _ in range(2))
        return KeyValues(keys, values)
