"""Tokens drawn at random from the model's distribution, sharpened and cut as asked."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tx_lightning.decoding.filters import Filter, keep_min_p, keep_top_k, keep_top_p
from tx_lightning.decoding.limits import LARGEST, MOST_HYPOTHESES, at_least
from tx_lightning.decoding.rows import Choice, RowSearch
from tx_lightning.decoding.search import Problem

_STEPS = 64  # numbers of a row that are drawn at once


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
        at_least("n_samples", n_samples, 1, MOST_HYPOTHESES)
        at_least("seed", seed, 0, LARGEST)
        if temperature == math.inf:
            raise ValueError(f"temperature must be a finite number; it is {temperature}")
        if not temperature > 0:
            raise ValueError(
                f"temperature must be above 0; it is {temperature} (for the most probable token "
                "at each step use Greedy)"
            )
        if top_k is not None:
            at_least("top_k", top_k, 1, LARGEST)
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
        uniforms = _Uniforms(problem, self.n_samples, self.seed)

        def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
            scaled = tempered(log_probs, self.temperature)
            if self.top_k is not None:
                keep_top_k(scaled, self.top_k)
            if self.top_p is not None:
                keep_top_p(scaled, self.top_p)
            if self.min_p is not None:
                keep_min_p(scaled, self.min_p)
            return draw(scaled.softmax(dim=1), uniforms.at(step)[rows])

        return choose


class _Uniforms:
    """One number in [0, 1) for each row and step, drawn as far as the search has come.

    Args:
        problem: The sentences.
        n_samples: Rows of each.
        seed: With the index of a sentence and the number of a sample, decides a row's numbers.
    """

    def __init__(self, problem: Problem, n_samples: int, seed: int) -> None:
        self._streams = [
            np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, sample)))
            for index in problem.indices
            for sample in range(n_samples)
        ]
        self._device = problem.device
        self._first = 0  # the step of the first column
        self._numbers = torch.empty(0, 0, device=problem.device)

    def at(self, step: int) -> Tensor:
        """Return the numbers (B * n_samples,) of a step; steps only go forward."""
        while step >= self._first + self._numbers.shape[1]:
            self._first += self._numbers.shape[1]
            numbers = [stream.random(_STEPS, np.float32) for stream in self._streams]
            self._numbers = torch.from_numpy(np.stack(numbers)).to(self._device)
        return self._numbers[:, step - self._first]


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Return log probabilities (N, V) divided by the temperature, up to a constant of each row.

    The largest is subtracted first, so that both limits are exact: toward 0 only the most probable
    token is left, or those that tie; toward infinity all that may follow are equally probable.
    """
    numbers = torch.finfo(log_probs.dtype)
    below = log_probs - log_probs.amax(dim=1, keepdim=True)
    return below / min(max(temperature, numbers.tiny), numbers.max)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return ids (N,) drawn from probs (N, V) by inverting the cumulative sum at uniforms (N,).

    An id of probability 0 is never drawn, however sums are rounded.
    """
    sums = probs.cumsum(dim=1).masked_fill_(probs == 0, 0)
    total = sums.amax(dim=1)
    target = torch.minimum(uniforms.to(total.dtype) * total, total.nextafter(total.new_zeros(())))
    # Of equal maxima argmax returns the first: the first id whose sum exceeds the target.
    return (sums > target[:, None]).to(torch.uint8).argmax(dim=1)
