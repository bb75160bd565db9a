"""How a Transformer knows the order of its tokens: six schemes behind one interface.

A scheme may act in three places, and each does nothing unless a scheme overrides it: on the
embeddings (`embed`), on queries and keys (`rotate`), on the attention scores (`bias`). Each stack
(encoder, decoder) owns one scheme, shared by its layers; cross-attention uses none.

Shapes: B batch, T queries, S keys, D d_model, H heads, K head width. `start` is the position of the
first token given, which is not 0 when decoding with a cache.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tx_lightning.described import Described
from tx_lightning.nn.checks import check_range, check_size


class Positions(Described, nn.Module):
    """No positions at all, and the interface of every scheme.

    Args:
        d_model: Width of the embeddings.
        n_heads: Number of attention heads.
        bidirectional: Whether queries also see later keys (an encoder) or only earlier ones.

    Attributes:
        max_length: The longest sequence, None for no limit.
    """

    max_length: int | None = None

    def __init__(self, d_model: int, n_heads: int, bidirectional: bool) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_heads", n_heads, most=d_model)
        self.d_model = d_model
        self.n_heads = n_heads
        self.bidirectional = bidirectional

    def match_tokens(self, rms: float) -> None:
        """Start at the size of the token embeddings; a network calls this once it knows theirs.

        A scheme that adds something to embeddings overrides it, as positions much larger than the
        tokens drown them, and much smaller ones are not seen.

        Args:
            rms: Root mean square of what `embed` is called with, in a new network.
        """

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Add positions to scaled embeddings: (B, T, D) -> (B, T, D)."""
        return x

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """Turn queries or keys by their position: (B, H, T, K) -> (B, H, T, K)."""
        return x

    def bias(self, query_length: int, key_length: int) -> Tensor | None:
        """Return what is added to the scores, (1, H, T, S); the last query is at the last key."""
        return None


PositionsFactory = Callable[[int, int, bool], Positions]


class NoPositions(Positions):
    """No positions at all: an encoder sees a bag of words, a decoder infers order from its mask."""


SinusoidLayout = Literal["interleaved", "halves"]


def sinusoids(positions: Tensor, width: int, layout: SinusoidLayout = "interleaved") -> Tensor:
    """Return the (T, width) table of Vaswani et al. 2017, section 3.5.

    Args:
        positions: (T,).
        width: Number of columns.
        layout: "interleaved" for sines in even and cosines in odd columns, as the paper writes it;
            "halves" for all sines, then all cosines.
    """
    rates = torch.exp(
        torch.arange(0, width, 2, device=positions.device) * (-math.log(10000.0) / width)
    )
    angles = positions[:, None] * rates  # (T, width / 2)
    if layout == "halves":
        return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


class SinusoidalPositions(Positions):
    """Fixed sines and cosines added to the embeddings (Vaswani et al. 2017, section 3.5).

    The table is computed on demand, so there is no longest length and nothing in the checkpoint.

    Args:
        d_model: Width of the embeddings.
        n_heads: Number of attention heads.
        bidirectional: Whether queries also see later keys.
        layout: "interleaved" for sines in even and cosines in odd dimensions, as the paper writes
            it; "halves" for all sines, then all cosines, as Marian does.
        scale: What the sines and cosines are multiplied by; null for the root mean square of the
            token embeddings in a new network, which is 1 where these are scaled as in the paper.

    Raises:
        ValueError: Another layout, or a scale that is not a positive number.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        bidirectional: bool,
        layout: SinusoidLayout = "interleaved",
        scale: float | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, bidirectional)
        if layout not in ("interleaved", "halves"):
            raise ValueError(f"layout must be interleaved or halves; it is {layout!r}")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(
                f"scale of SinusoidalPositions must be positive and finite; it is {scale}: leave "
                "it out for that of the token embeddings"
            )
        self.layout = layout
        self.scale = scale
        self.amplitude = 1.0 if scale is None else scale
        self._table = torch.empty(0, d_model)

    def match_tokens(self, rms: float) -> None:
        if self.scale is None:
            self.amplitude = rms
            self._table = self._table[:0]

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > self._table.shape[0] or self._table.device != x.device:
            positions = torch.arange(max(end, 256, 2 * self._table.shape[0]), device=x.device)
            table = sinusoids(positions.float(), self.d_model, self.layout)
            self._table = self.amplitude * table
        return x + self._table[start:end].to(x.dtype)


class LearnedPositions(Positions):
    """One learned vector per position, added to the embeddings (Gehring et al. 2017; GPT; BERT).

    Args:
        d_model: Width of the embeddings.
        n_heads: Number of attention heads.
        bidirectional: Whether queries also see later keys.
        max_length: Number of positions; a longer sequence is an error.
    """

    def __init__(
        self, d_model: int, n_heads: int, bidirectional: bool, max_length: int = 1024
    ) -> None:
        super().__init__(d_model, n_heads, bidirectional)
        check_size("max_length", max_length)
        self.max_length: int = max_length
        self.table = nn.Parameter(torch.empty(max_length, d_model))
        self._std = 0.02  # of GPT-2 and BERT
        nn.init.normal_(self.table, std=self._std)

    def match_tokens(self, rms: float) -> None:
        with torch.no_grad():  # the draw stays that of the seed
            self.table.mul_(rms / self._std)
        self._std = rms

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"a sequence of {end} tokens exceeds max_length={self.max_length} of "
                "LearnedPositions: raise it, cut the data, or use a scheme without a limit"
            )
        return x + self.table[start:end].to(x.dtype)


class RotaryPositions(Positions):
    """Queries and keys turned by an angle proportional to their position (Su et al. 2021, eq. 34).

    Scores then depend on distances only. Pairs are (i, i + K/2), the layout of GPT-NeoX and Llama.

    Args:
        d_model: Width of the embeddings.
        n_heads: Number of attention heads; d_model / n_heads must be even.
        bidirectional: Whether queries also see later keys.
        base: Wavelengths grow from 2 pi to 2 pi base.
    """

    def __init__(
        self, d_model: int, n_heads: int, bidirectional: bool, base: float = 10000.0
    ) -> None:
        super().__init__(d_model, n_heads, bidirectional)
        check_range("base", base, 1, 1e12)
        width = d_model // n_heads
        if width % 2:
            raise ValueError(
                f"rotary positions need an even head width, but d_model={d_model} / "
                f"n_heads={n_heads} is {width}: change one of them"
            )
        self.base = base
        self._cos = self._sin = torch.empty(0, width)

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        cos, sin = self._turns(x, start, start + x.shape[2])
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    def _turns(self, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles at positions from start to end, (T, K) in x's type.

        Eager code keeps a table, so that no layer computes or casts them anew. Compiled code
        computes them in the kernel that needs them: a table that grows would have it compiled anew.
        """
        if torch.compiler.is_compiling():
            return self._compute(torch.arange(start, end, device=x.device), x)
        table = self._cos
        if end > table.shape[0] or table.device != x.device or table.dtype != x.dtype:
            # Tables of inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                size = max(end, 256, 2 * table.shape[0] if end > table.shape[0] else 0)
                self._cos, self._sin = self._compute(torch.arange(size, device=x.device), x)
        return self._cos[start:end], self._sin[start:end]

    def _compute(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rates = self.base ** -(torch.arange(0, width, 2, device=x.device) / width)
        angles = (positions[:, None] * rates).repeat(1, 2)  # (T, K), float32
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _relative_positions(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Return key position minus query position, (T, S); the last query is at the last key."""
    queries = torch.arange(key_length - query_length, key_length, device=device)
    return torch.arange(key_length, device=device)[None, :] - queries[:, None]


class AlibiPositions(Positions):
    """A penalty on the scores that grows with distance, a slope per head (Press et al. 2022).

    An encoder uses the symmetric form, -slope * |distance|. It sees no difference between a
    sequence and its mirror image; the end-of-sequence token, always last, is what tells them apart.
    """

    def __init__(self, d_model: int, n_heads: int, bidirectional: bool) -> None:
        super().__init__(d_model, n_heads, bidirectional)
        self.register_buffer("slopes", torch.tensor(_alibi_slopes(n_heads)), persistent=False)
        self.slopes: Tensor

    def bias(self, query_length: int, key_length: int) -> Tensor:
        distance = _relative_positions(query_length, key_length, self.slopes.device).abs()
        return -self.slopes[None, :, None, None] * distance


def _alibi_slopes(n_heads: int) -> list[float]:
    """Return 2^(-8/n), 2^(-16/n), ...; where n is no power of two, as the paper's authors do."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]


class T5RelativePositions(Positions):
    """A learned bias per head and bucket of distances (Raffel et al. 2020, section 2.1).

    Half of the buckets are exact distances, the other half grow logarithmically to max_distance.

    Args:
        d_model: Width of the embeddings.
        n_heads: Number of attention heads.
        bidirectional: Whether queries also see later keys; then half of the buckets are for those.
        n_buckets: Number of learned biases per head.
        max_distance: All longer distances share the last bucket.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        bidirectional: bool,
        n_buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__(d_model, n_heads, bidirectional)
        # Half of the buckets, and of those for either direction half, are exact distances.
        check_size("n_buckets", n_buckets, least=4 if bidirectional else 2)
        exact = n_buckets // (4 if bidirectional else 2)
        check_size("max_distance", max_distance, least=exact + 1)
        self.n_buckets = n_buckets
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(n_buckets, n_heads))
        nn.init.normal_(self.table, std=d_model**-0.5)

    def bias(self, query_length: int, key_length: int) -> Tensor:
        relative = _relative_positions(query_length, key_length, self.table.device)
        bias = self.table[self._buckets(relative)]  # (T, S, H)
        return bias.permute(2, 0, 1)[None]  # -> (1, H, T, S)

    def _buckets(self, relative: Tensor) -> Tensor:
        n = self.n_buckets
        offset: Tensor | int = 0
        if self.bidirectional:
            n //= 2
            offset = (relative > 0).long() * n
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = n // 2
        scale = (n - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1) / exact) * scale).long()
        return offset + torch.where(distance < exact, distance, far.clamp(max=n - 1))
