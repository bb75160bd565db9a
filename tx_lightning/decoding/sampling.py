"""Tokens drawn at random from the model's distribution, sharpened and cut as asked."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tx_lightning.decoding.filters import Filter, keep_min_p, keep_top_k, keep_top_p
from tx_lightning.decoding.rows import Choice, RowSearch
from tx_lightning.decoding.search import Problem, at_least


class Sampling(RowSearch):
    """Draws each token from the model's distribution.

    The draws of a sample are a pure function of (seed, index of the sentence, number of the
    sample): they depend neither on the other sentences of the batch nor on the device. Temperature
    comes first, then top-k, top-p and min-p in this order.

    Args:
        n_samples: Samples per sentence.
        temperature: Divides the log probabilities; below 1 sharpens, above 1 flattens.
        top_k: Draw among the k most probable tokens only.
        top_p: Draw from the nucleus only: the fewest most probable tokens with a sum of at least p.
        min_p: Draw among the tokens with at least this share of the largest probability only.
        seed: Another seed gives other samples.
        length_penalty: Exponent of the length penalty in the score that orders the samples.
        max_length_ratio: Most tokens, EOS included, per token of the source.
        max_length_offset: Added to that.
        filters: What may not come next, such as `NoRepeatNgram` and `MinLength`.
    """

    def __init__(
        self,
        *,
        n_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        length_penalty: float = 0.6,
        max_length_ratio: float = 2.0,
        max_length_offset: int = 10,
        filters: Sequence[Filter] = (),
    ) -> None:
        super().__init__(
            length_penalty=length_penalty,
            max_length_ratio=max_length_ratio,
            max_length_offset=max_length_offset,
            filters=filters,
        )
        at_least("n_samples", n_samples, 1)
        at_least("seed", seed, 0)
        if not temperature > 0:
            raise ValueError(
                f"temperature must be above 0; it is {temperature} (for the most probable token "
                "at each step use Greedy)"
            )
        if top_k is not None:
            at_least("top_k", top_k, 1)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; it is {top_p}")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1; it is {min_p}")
        self.n_samples = n_samples
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.seed = seed

    @property
    def rows_per_sentence(self) -> int:
        return self.n_samples

    def choice(self, problem: Problem) -> Choice:
        uniforms = self.uniforms(problem).to(problem.device)

        def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
            scaled = log_probs / self.temperature
            if self.top_k is not None:
                keep_top_k(scaled, self.top_k)
            if self.top_p is not None:
                keep_top_p(scaled, self.top_p)
            if self.min_p is not None:
                keep_min_p(scaled, self.min_p)
            return draw(scaled.softmax(dim=1), uniforms[rows, step])

        return choose

    def uniforms(self, problem: Problem) -> Tensor:
        """Return one number in [0, 1) per row and step, (B * n_samples, longest)."""
        numbers = np.zeros(
            (problem.n_sentences * self.n_samples, max(problem.max_lengths)), np.float32
        )
        for i, (index, length) in enumerate(zip(problem.indices, problem.max_lengths, strict=True)):
            for sample in range(self.n_samples):
                stream = np.random.SeedSequence(self.seed, spawn_key=(index, sample))
                row = i * self.n_samples + sample
                numbers[row, :length] = np.random.default_rng(stream).random(length, np.float32)
        return torch.from_numpy(numbers)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return ids (N,) drawn from probs (N, V) by inverting the cumulative sum at uniforms (N,).

    An id of probability 0 is never drawn, however sums are rounded.
    """
    sums = probs.cumsum(dim=1).masked_fill_(probs == 0, 0)
    total = sums.amax(dim=1)
    target = torch.minimum(uniforms.to(total.dtype) * total, total.nextafter(total.new_zeros(())))
    # Of equal maxima argmax returns the first: the first id whose sum exceeds the target.
    return (sums > target[:, None]).to(torch.uint8).argmax(dim=1)
