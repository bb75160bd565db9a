"""Which tokens of a text are hidden, so that a model learns to guess them: BERT's masks.

Devlin et al. 2019, section 3.1 and appendix A.1. A mask is a pure function of (seed, epoch,
example): it is new in each epoch, and the same on any rank, in any batch and after a resume.

Shapes: N tokens of a text, K of them chosen, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import Tokenizer

Ids = npt.NDArray[Any]
Positions = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

_MASKS = 1  # keeps these random numbers apart from those that order the examples


class Masked(NamedTuple):
    """A text with some of its tokens hidden.

    Args:
        ids: (N,) int64, what the network reads.
        positions: (K,), the places where it has to guess, in their order.
    """

    ids: Ids
    positions: Positions


@dataclass(frozen=True)
class Masking:
    """How many tokens are chosen, and what stands in their place. All chosen ones are guessed.

    Args:
        rate: Share of the tokens of a text that is chosen; at least one is. 0.15 in BERT; up to 0.4
            may be better (Wettig et al. 2023).
        mask_share: Share of the chosen that is replaced by the mask.
        random_share: Share of the chosen that is replaced by a random token. The others stay.
        whole_words: Choose all tokens of a word or none. Words are taken in random order; one that
            would exceed the number of tokens to choose is passed over, so a few less are chosen.
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise DataError(f"rate is {self.rate}; it must be between 0 and 1, such as 0.15")
        for name, share in (("mask_share", self.mask_share), ("random_share", self.random_share)):
            if not 0 <= share <= 1:
                raise DataError(f"{name} is {share}; it must be from 0 to 1")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise DataError(
                f"mask_share and random_share are {self.mask_share} and {self.random_share}; "
                "together they must be at most 1"
            )

    def counts(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """How many tokens are chosen of texts of these lengths; with whole words at most that."""
        return np.maximum(1, np.rint(self.rate * lengths)).astype(np.int64)

    def choose(self, random: np.random.Generator, starts: Flags) -> Positions:
        """Choose tokens of a text, in their order.

        Args:
            random: Where chance comes from.
            starts: (N,), whether a token begins a word; looked at with whole words only.
        """
        length = len(starts)
        count = max(1, round(self.rate * length))
        if not self.whole_words:
            return np.sort(random.permutation(length)[:count])
        starts = starts.copy()
        starts[0] = True
        firsts = np.flatnonzero(starts)
        sizes = np.diff(np.append(firsts, length))
        order = random.permutation(len(firsts))
        chosen: list[int] = []
        left = count
        for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= left:
                chosen.append(word)
                left -= size
            if left == 0:
                break
        if not chosen:  # All words are longer than the number.
            chosen.append(int(order[sizes[order].argmin()]))
        words = np.zeros(len(firsts), dtype=np.bool_)
        words[chosen] = True
        return np.flatnonzero(np.repeat(words, sizes))


class Masker:
    """Hides tokens of the texts of a split.

    Args:
        masking: How.
        tokenizer: Made the ids.
        vocab_size: Rows of the embedding table; its last row is the mask of a tokenizer that has
            none.
        seed: With epoch and example, decides what is hidden.
    """

    def __init__(self, masking: Masking, tokenizer: Tokenizer, vocab_size: int, seed: int) -> None:
        self.masking = masking
        self.seed = seed
        self.mask_id = mask_id(tokenizer, vocab_size)
        special = tokenizer.special_ids
        ordinary = [i for i in range(tokenizer.vocab_size) if i not in special]
        self._ordinary = np.array(ordinary, dtype=np.int64)
        self._word_starts = (
            tokenizer.word_starts()
            if masking.whole_words
            else np.ones(tokenizer.vocab_size, dtype=np.bool_)
        )

    def __call__(self, ids: Ids, epoch: int, example: int) -> Masked:
        """Hide tokens of a text, (N,) with N > 0.

        Args:
            ids: Its tokens, without BOS and EOS.
            epoch: Counts from 0.
            example: Its position in the split.
        """
        random = self._random(epoch, example)
        positions = self.masking.choose(random, self._word_starts[ids])
        share = random.random(len(positions))
        drawn = self._ordinary[random.integers(len(self._ordinary), size=len(positions))]
        hidden = share < self.masking.mask_share
        replaced = ~hidden & (share < self.masking.mask_share + self.masking.random_share)
        masked = ids.astype(np.int64)
        masked[positions[hidden]] = self.mask_id
        masked[positions[replaced]] = drawn[replaced]
        return Masked(masked, positions)

    def count(self, ids: Ids, epoch: int, example: int) -> int:
        """How many tokens are chosen; see `Masking.counts` where words may be cut."""
        starts = self._word_starts[ids]
        return len(self.masking.choose(self._random(epoch, example), starts))

    def _random(self, epoch: int, example: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, example, _MASKS])


def mask_id(tokenizer: Tokenizer, vocab_size: int) -> int:
    """The id that stands for a hidden token: the tokenizer's own, or the last row of the table."""
    return vocab_size - 1 if tokenizer.mask_id is None else tokenizer.mask_id
