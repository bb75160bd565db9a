"""Multi-head attention, self and cross in one class, on a fused kernel with a naive oracle.

Shapes: B batch, T queries, S keys, D d_model, H heads, K = D / H head width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tx_lightning.nn.cache import KeyValueCache, KeyValues
from tx_lightning.nn.checks import check_share, check_size
from tx_lightning.nn.dropout import dropout
from tx_lightning.nn.linear import Linear, linear, product_dtype
from tx_lightning.nn.masks import additive_mask, causal_mask, check_mask, check_score_bias
from tx_lightning.nn.positions import Positions

_SHORT = 128  # queries or keys

# q, k, v, mask, causal, dropout, score_bias
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, Tensor | None], Tensor]


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    drop: float,
    score_bias: Tensor | None = None,
) -> Tensor:
    """Attend with the fastest kernel: q (B, H, T, K), k and v (B, H, S, K) -> q's shape.

    This is torch's fused kernel. On CPUs that kernel computes one head of one sentence at a time,
    which is slow for short sentences; `short_attention` computes those.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Boolean, True = may attend; broadcasts to (B, H, T, S). torch's flash kernels need
            None here and no score bias.
        causal: Whether no query sees its future, the last query being at the last key.
        drop: Share of the attention weights that is dropped.
        score_bias: Added to the scores; broadcasts to (B, H, T, S), in q's type.

    Raises:
        ValueError: The mask is not boolean, or the bias is not floating point.
    """
    check_mask(mask)
    check_score_bias(score_bias)
    t, s = q.shape[2], k.shape[2]
    on_cpu = q.device.type == "cpu" and q.dtype == torch.float32
    if on_cpu and max(t, s) <= _SHORT and score_bias is None:
        return short_attention(q, k, v, mask, causal, drop)
    if causal and (t != s or mask is not None or score_bias is not None):
        # torch's own causal mask is at the upper left and cannot be combined with another.
        allowed = causal_mask(t, s, q.device)
        mask, causal = allowed if mask is None else mask & allowed, False
    if score_bias is not None:
        mask = additive_mask(mask, score_bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=drop)


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, drop: float
) -> Tensor:
    """Attend with two batched products over all heads and sentences; see `fused_attention`.

    A query that may attend to nothing gets 0.

    Raises:
        ValueError: The mask is not boolean.
    """
    check_mask(mask)
    b, h, t, width = q.shape
    q, k, v = (x.reshape(b * h, -1, width) for x in (q, k, v))
    if causal:  # the product is added to the mask
        hidden = ~causal_mask(t, k.shape[1], q.device)
        bias = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
    else:
        unused = q.new_empty(1, 1, 1)
        scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    scores = scores.view(b, h, t, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights * mask  # changes only the rows of queries that see no key
    y = torch.bmm(dropout(weights, drop).view(b * h, t, -1), v)
    return y.view(b, h, t, width)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as Vaswani et al. 2017, eq. 1, is written; return the result and the weights.

    softmax(q k^T / sqrt(K) + score_bias) v, with weights (B, H, T, S); a query that may attend to
    nothing gets weights and result 0.

    Raises:
        ValueError: The mask is not boolean, or the bias is not floating point.
    """
    check_mask(mask)
    check_score_bias(score_bias)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if score_bias is not None:
        scores = scores + score_bias
    if causal:
        allowed = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)  # softmax would be 0 / 0
    weights = scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """Self-attention, or attention over a memory (Vaswani et al. 2017, section 3.2.2).

    Args:
        d_model: Width D of input and output.
        n_heads: Number of heads H; must divide d_model.
        dropout: Dropout on the attention weights. Above 0 it costs torch's fused
            kernel on CPUs, which matters above 128 tokens.
        bias: Whether the four projections have a bias.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_heads", n_heads)
        check_share("dropout", dropout)
        if d_model % n_heads:
            divisors = [h for h in range(1, d_model + 1) if d_model % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - n_heads))
            raise ValueError(
                f"d_model={d_model} is not divisible by n_heads={n_heads}: "
                f"the nearest number of heads that divides it is {nearest}"
            )
        self.n_heads = n_heads
        self.dropout = dropout
        self.bias = bias
        self.input = Linear(d_model, 3 * d_model, bias=bias)  # queries, keys, values
        self.output = Linear(d_model, d_model, bias=bias)
        self.kernel: Kernel = fused_attention
        for part in self.input.weight.chunk(3):  # Xavier of three D x D matrices, not of one
            nn.init.xavier_uniform_(part)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeyValues | None = None,
        *,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        causal: bool = False,
        positions: Positions | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend from x (B, T, D) over itself, or over a memory (B, S, D): -> (B, T, D).

        Args:
            x: The queries' side.
            memory: What is attended to; x itself where None; `KeyValues` where it was projected
                once with `keys_values`.
            mask: Boolean, True = may attend; broadcasts to (B, H, T, S).
            score_bias: Added to the scores, in the type of the queries; broadcasts likewise. For a
                stack of layers, `masks.combine` joins it with the mask once.
            causal: Whether no query sees its future, the last query being at the last key.
            positions: The scheme that rotates queries and keys.
            cache: Earlier keys and values; the new ones are appended to it.

        Raises:
            ValueError: The mask is not boolean, or the bias is not floating point.
        """
        check_mask(mask)
        check_score_bias(score_bias)
        d = x.shape[-1]
        if memory is None:
            q, k, v = (self._split(y) for y in self.input(x).chunk(3, dim=-1))
        else:
            q = self._split(self._project(x, slice(d)))
            k, v = memory if isinstance(memory, KeyValues) else self.keys_values(memory)
        if positions is not None:
            start = 0 if cache is None else cache.length
            q, k = positions.rotate(q, start), positions.rotate(k, start)
        if cache is not None:
            k, v = cache.append(KeyValues(k, v))
        drop = self.dropout if self.training else 0.0
        y = self.kernel(q, k, v, mask, causal, drop, score_bias)
        return self.output(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)

    def keys_values(self, memory: Tensor) -> KeyValues:
        """Project a memory (B, S, D) once, for many queries: keys and values (B, H, S, K)."""
        k, v = self._project(memory, slice(memory.shape[-1], None)).chunk(2, dim=-1)
        return KeyValues(self._split(k), self._split(v))

    def reserve(self, x: Tensor, cache: KeyValueCache) -> None:
        """Make room in a cache for the keys and values of x (B, T, D); see its `reserve`."""
        b, t, d = x.shape
        like = x.new_empty(0, dtype=product_dtype(x))
        cache.reserve(like, (b, self.n_heads, t, d // self.n_heads))

    def _project(self, x: Tensor, rows: slice) -> Tensor:
        bias = self.input.bias[rows] if self.bias else None
        return linear(x, self.input.weight[rows], bias)

    def _split(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        return x.view(b, t, self.n_heads, -1).transpose(1, 2)  # (B, T, D) -> (B, H, T, K)


@contextmanager
def record_attention(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Run every attention inside `module` through the naive kernel and keep its weights.

    Yields a dictionary from the qualified name of each `MultiHeadAttention`
    ("encoder.layers.0.self_attention") to its weights (B, H, T, S) of the latest call. Nothing
    is added to the modules, compiled ones run uncompiled meanwhile, and outside the context the
    kernels run as before.

    Raises:
        ValueError: An attention computes something else than `fused_attention` does.
    """
    maps: dict[str, Tensor] = {}
    attentions = recordable_attentions(module)
    kernels = {name: attention.kernel for name, attention in attentions.items()}
    try:
        for name, attention in attentions.items():
            attention.kernel = _Recorder(name, maps)
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        for name, attention in attentions.items():
            attention.kernel = kernels[name]


def recordable_attentions(module: nn.Module) -> dict[str, MultiHeadAttention]:
    """Return the attentions inside `module` by name, all of which `record_attention` can record.

    Raises:
        ValueError: One has a kernel or a forward of its own: softmax weights would not be what it
            computes.
    """
    found = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, MultiHeadAttention)
    }
    for name, attention in found.items():
        kernel, kind = attention.kernel, type(attention)
        if kernel is not fused_attention and not isinstance(kernel, _Recorder):
            name_of = kernel.__name__ if isinstance(kernel, FunctionType) else type(kernel).__name__
            own = f"kernel {name_of}"
        elif kind.forward is not MultiHeadAttention.forward:
            own = f"forward, that of {kind.__name__}"
        else:
            continue
        raise ValueError(
            f"the attention weights of {name or kind.__name__} cannot be recorded: it has its own "
            f"{own}, and only the weights of fused_attention are known; set its kernel to "
            "fused_attention, or do not record or log attention"
        )
    return found


class _Recorder:
    """A kernel that keeps its weights under a name."""

    def __init__(self, name: str, maps: dict[str, Tensor]) -> None:
        self.name = name
        self.maps = maps

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        drop: float,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        y, weights = naive_attention(q, k, v, mask, causal, score_bias=score_bias)
        self.maps[self.name] = weights.detach()
        return F.dropout(weights, drop) @ v if drop else y
