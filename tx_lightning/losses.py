"""Losses as (sum, tokens): they are divided once, by the tokens of the whole optimizer step.

Shapes: N tokens, D d_model, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tx_lightning.nn.linear import ROWS, matmul_transposed, outer_sum, product_dtype

# Logits held at once. On a CPU they should stay in its cache; a GPU wants large products.
_CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}


class TokenLoss(NamedTuple):
    """Sums over N tokens, float32 scalars (float64 for float64 input).

    Attributes:
        loss: Label-smoothed cross-entropy, in nats; this is what is trained on.
        nll: Negative log-likelihood, in nats, without gradient.
    """

    loss: Tensor
    nll: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
) -> TokenLoss:
    """Project to the vocabulary and sum the label-smoothed cross-entropy, never holding all logits.

    Equals `F.cross_entropy(hidden @ weight.T + bias, targets, label_smoothing=...,
    reduction="sum")` (Szegedy et al. 2016, section 7: a share `label_smoothing` of the target is
    uniform over V). The logits of a chunk of tokens are made, turned into their gradient in place,
    multiplied back, and dropped, so that memory does not grow with N x V and the logits do not
    leave the cache.

    Args:
        hidden: (N, D).
        weight: (V, D), the output projection.
        targets: (N,) ids; no padding among them.
        label_smoothing: Between 0 and 1.
        bias: (V,), added to the logits.
    """
    if not torch.is_grad_enabled():  # or gradients would be computed
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    sums = _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing)  # type: ignore[no-untyped-call]
    return TokenLoss(*sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss: each chunk's logits exist only once.

    With p = softmax(z) the gradient of the loss of one token by its logits z is
    p - (1 - e) onehot(target) - e / V. The last term is the same for all tokens, and is taken out
    of the loop: it adds -e / V times the column sums of the weight, and of hidden, and -e N / V to
    the gradient of the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        h, w = hidden.to(product_dtype(hidden)), weight.to(product_dtype(weight))
        b = None if bias is None else bias.to(product_dtype(bias))
        rows = max(1, _CHUNK_LOGITS.get(device, 1 << 27) // weight.shape[0])
        rows -= rows % ROWS if rows > ROWS else 0
        uniform = label_smoothing / weight.shape[0]
        needs_grad = any(ctx.needs_input_grad[:3])
        wide = torch.promote_types(h.dtype, torch.float32)
        grad_h = torch.empty_like(h) if needs_grad else None
        grad_w = torch.zeros_like(w, dtype=wide) if needs_grad else None
        grad_b = torch.zeros_like(b, dtype=wide) if needs_grad and b is not None else None
        nll = torch.zeros((), device=hidden.device, dtype=wide)
        all_nll = torch.zeros_like(nll)  # summed over the whole vocabulary
        with _without_autocast(device):
            for chunk in range(0, len(targets), rows):
                part = slice(chunk, chunk + rows)
                target = targets[part, None]
                log_p = _logits(h[part], w, b).log_softmax(dim=-1, dtype=wide)  # (rows, V)
                nll -= log_p.gather(1, target).sum()
                if label_smoothing:
                    all_nll -= log_p.sum()
                if grad_h is None or grad_w is None:
                    continue
                p = log_p.exp_()
                p.scatter_add_(1, target, p.new_full(target.shape, label_smoothing - 1))
                if grad_b is not None:
                    grad_b += p.sum(0)
                p = p.to(h.dtype)
                grad_h[part] = matmul_transposed(p, w.t())
                grad_w += outer_sum(p, h[part])
            if grad_h is not None and grad_w is not None and label_smoothing:
                grad_h -= uniform * w.sum(0)
                grad_w -= uniform * h.sum(0, dtype=wide)
                if grad_b is not None:
                    grad_b -= uniform * len(targets)
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return (1 - label_smoothing) * nll + uniform * all_nll, nll

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor, grad_nll: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            (grad_h * grad_loss).to(hidden_dtype),
            (grad_w * grad_loss).to(weight_dtype),
            None if grad_b is None else (grad_b * grad_loss).to(bias_dtype),
            None,
            None,
        )


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    logits = matmul_transposed(h, w)
    return logits if b is None else logits.add_(b)
