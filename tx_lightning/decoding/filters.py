"""What may not come next: small units that set log probabilities to -inf, in place.

Shapes: N rows being decoded, T tokens decoded so far, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from tx_lightning.decoding.limits import LARGEST, at_least
from tx_lightning.described import Described


class Filter(Described, ABC):
    """A rule about what may follow; a new one is one class and one line of YAML."""

    @abstractmethod
    def __call__(self, log_probs: Tensor, tokens: Tensor, eos_id: int) -> None:
        """Set log probabilities to -inf in place where a token may not follow.

        Args:
            log_probs: (N, V), some already -inf.
            tokens: (N, T), what each row holds so far, target prefix included, without BOS.
            eos_id: What ends a row.
        """


class MinLength(Filter):
    """EOS may not come before a minimum length.

    Args:
        length: Fewest tokens of a hypothesis, EOS not counted.
    """

    def __init__(self, length: int) -> None:
        at_least("length", length, 0, LARGEST)
        self.length = length

    def __call__(self, log_probs: Tensor, tokens: Tensor, eos_id: int) -> None:
        if tokens.shape[1] < self.length:
            log_probs[:, eos_id] = -math.inf


class BeginWith(Filter):
    """A hypothesis begins with certain tokens; BART's, for instance, with <s>.

    Args:
        ids: These tokens.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        for token in ids:
            at_least("ids", token, 0, LARGEST)
        self.ids = list(ids)

    def __call__(self, log_probs: Tensor, tokens: Tensor, eos_id: int) -> None:
        length = tokens.shape[1]
        if length < len(self.ids):
            if self.ids[length] >= log_probs.shape[1]:
                raise ValueError(
                    f"ids of BeginWith: {self.ids[length]} is not below the vocabulary size, "
                    f"{log_probs.shape[1]}"
                )
            kept = log_probs[:, self.ids[length]].clone()
            log_probs.fill_(-math.inf)
            log_probs[:, self.ids[length]] = kept


class NoRepeatNgram(Filter):
    """No n-gram occurs twice in a hypothesis (Paulus et al. 2017, section 2.5).

    Args:
        size: The n of the n-gram; 1 forbids every repeated token.
    """

    def __init__(self, size: int) -> None:
        at_least("size", size, 1, LARGEST)
        self.size = size

    def __call__(self, log_probs: Tensor, tokens: Tensor, eos_id: int) -> None:
        length = tokens.shape[1]
        if length < self.size:
            return
        ngrams = tokens.unfold(1, self.size, 1)  # (N, T) -> (N, T - size + 1, size)
        newest = tokens[:, length - self.size + 1 :]  # (N, size - 1), what the next one completes
        repeats = (ngrams[:, :, :-1] == newest[:, None]).all(dim=-1)
        # amin with +inf changes nothing; a token that ends two n-grams is banned by either.
        limits = log_probs.new_full(repeats.shape, math.inf).masked_fill_(repeats, -math.inf)
        log_probs.scatter_reduce_(1, ngrams[:, :, -1], limits, "amin")


def keep_top_k(log_probs: Tensor, k: int) -> None:
    """Let only the k most probable tokens follow, more when the last of them tie.

    Fan et al. 2018, section 5.
    """
    if k < log_probs.shape[1]:
        least = log_probs.topk(k, dim=1).values[:, -1:]
        log_probs.masked_fill_(log_probs < least, -math.inf)


def keep_top_p(log_probs: Tensor, p: float) -> None:
    """Let only the nucleus follow: the fewest most probable tokens whose share is at least p.

    Holtzman et al. 2020, section 3.1; the share is that of the tokens not banned so far.
    """
    if p < 1:
        values, ids = log_probs.sort(dim=1, descending=True)
        probs = values.softmax(dim=1)
        outside = probs.cumsum(dim=1) - probs >= p  # the more probable ones are enough
        log_probs.masked_fill_(outside.scatter(1, ids, outside), -math.inf)


def keep_min_p(log_probs: Tensor, share: float) -> None:
    """Let only tokens follow that have at least a share of the largest probability.

    Nguyen et al. 2024, section 3.
    """
    if share > 0:
        least = log_probs.amax(dim=1, keepdim=True) + math.log(share)
        log_probs.masked_fill_(log_probs < least, -math.inf)


def ban(log_probs: Tensor, ids: list[int]) -> None:
    """Let none of the ids follow in any row."""
    for token in ids:
        log_probs[:, token] = -math.inf


def force(log_probs: Tensor, tokens: Tensor) -> None:
    """Let only tokens[i] follow row i, with certainty; -1 leaves the row alone.

    Args:
        log_probs: (N, V).
        tokens: (N,).
    """
    forced, ids = (tokens >= 0)[:, None], tokens.clamp(min=0)[:, None]
    log_probs.masked_fill_(forced, -math.inf)
    log_probs.scatter_(1, ids, log_probs.gather(1, ids).masked_fill(forced, 0))
