"""The CPU kernels of this package against torch's, in turns, in one process.

    python benchmarks/kernels.py --threads 2

The sizes are those of Transformer-Tiny with batches of 4096 tokens. Each line is the median time of
a forward and a backward pass, and torch's time divided by ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tx_lightning.losses import linear_cross_entropy
from tx_lightning.nn.attention import fused_attention
from tx_lightning.nn.dropout import Dropout
from tx_lightning.nn.linear import linear

TOKENS, WIDTH, INNER, VOCABULARY = 4096, 128, 256, 10_000
HEADS, LENGTH = 4, 16

Kernel = Callable[..., Tensor]


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1).loss


def loss_on_all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, label_smoothing=0.1, reduction="sum")


def cases() -> list[tuple[str, Kernel, Kernel, list[Tensor]]]:
    """Name, our kernel, torch's kernel, and the arguments of both."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    linears = [
        (f"linear {i} -> {o}", linear, F.linear, [normal(TOKENS, i), normal(o, i), normal(o)])
        for i, o in ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, INNER), (INNER, WIDTH))
    ]
    targets = torch.randint(VOCABULARY, (TOKENS,))
    heads = [normal(TOKENS // LENGTH, HEADS, LENGTH, WIDTH // HEADS) for _ in range(3)]
    return [
        *linears,
        (
            f"attention over {LENGTH} tokens",
            lambda q, k, v: fused_attention(q, k, v, None, False, 0.0),
            F.scaled_dot_product_attention,
            heads,
        ),
        (
            f"dropout 0.3 of {WIDTH}",
            Dropout(0.3),
            lambda x: F.dropout(x, 0.3),
            [normal(TOKENS, WIDTH)],
        ),
        (
            f"projection to {VOCABULARY} and loss",
            fused_loss,
            loss_on_all_logits,
            [normal(TOKENS, WIDTH), normal(VOCABULARY, WIDTH), targets],
        ),
    ]


def seconds(kernel: Kernel, inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    y = kernel(*inputs)
    torch.autograd.grad(y, [x for x in inputs if x.requires_grad], torch.ones_like(y))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Our CPU kernels against torch's.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {arguments.threads} threads, float32")
    print(f"{TOKENS} tokens, forward and backward    ours      torch   ratio")
    for name, ours, theirs, inputs in cases():
        for kernel in (ours, theirs):
            seconds(kernel, inputs)  # warm up: oneDNN makes its kernel in the first call
        turns = [(seconds(ours, inputs), seconds(theirs, inputs)) for _ in range(arguments.turns)]
        a, b = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
        print(f"{name:31} {a:6.2f} ms  {b:6.2f} ms  {b / a:6.2f}")


if __name__ == "__main__":
    main()
