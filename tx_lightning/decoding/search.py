"""What every way of decoding shares: the step it calls, the problem it solves, the answer it gives.

A strategy knows a step function and a state whose rows it may select; it knows no model. What the
researcher chooses is an argument of a strategy's constructor; what model and text fix is an
argument of the call.

Shapes: B sentences, N rows being decoded, T tokens decoded so far, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tx_lightning.decoding.filters import Filter, ban, force
from tx_lightning.decoding.limits import MOST_RATIO, MOST_TOKENS, STRONGEST, at_least, within
from tx_lightning.described import Described

_ROOM = 64  # tokens, at first


class NotFinite(ValueError):
    """No token has a finite log probability: the weights of the network are most likely NaN."""


class DecodingState(Protocol):
    """What a model remembers of the rows being decoded, beginning with one row per sentence."""

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows in place: row i becomes what row rows[i] was.

        Whenever the number of rows stays the same, every row also stays with its sentence, so that
        what depends on the sentence only (the encoder's memory) need not be touched.
        """


S = TypeVar("S", bound=DecodingState)
Step = Callable[[Tensor, S], Tensor]  # newest tokens (N,), state -> logits (N, V) of the next ones
Prefill = Callable[[Tensor, S], Tensor]  # several per row (N, T), state -> logits (N, V) likewise


@dataclass(frozen=True)
class Hypothesis:
    """One output of a sentence.

    Attributes:
        tokens: The ids, target prefix included, without BOS and EOS.
        score: `log_prob` divided by the length penalty of the tokens after the prefix, EOS
            included; hypotheses are ordered by it.
        log_prob: The model's log probability of the tokens after the prefix, which is given and
            not chosen, and of EOS where it came, in nats. Filters and temperature restrict the
            choice, they do not enter here.
        finished: Whether it ends in EOS, rather than having been cut at the maximum length.
    """

    tokens: list[int]
    score: float
    log_prob: float
    finished: bool


@dataclass(frozen=True)
class Problem:
    """The sentences of one call.

    Attributes:
        max_lengths: Most tokens of each sentence's hypotheses, prefix and EOS included.
        prefixes: The target prefix of each sentence.
        forced: (B, longest prefix), the prefixes on the device, -1 where the choice is free.
        indices: What names each sentence, for strategies that draw random numbers.
        vocabulary_size: Ids from here on are never generated.
        banned: Ids that are never generated.
        eos_id: What ends a hypothesis.
        pad_id: What fills the rows of tensors.
    """

    max_lengths: list[int]
    prefixes: list[list[int]]
    forced: Tensor
    indices: list[int]
    vocabulary_size: int | None
    banned: list[int]
    eos_id: int
    pad_id: int

    @property
    def device(self) -> torch.device:
        """Where the rows are decoded."""
        return self.forced.device

    @property
    def n_sentences(self) -> int:
        """B."""
        return len(self.max_lengths)

    def chosen_eos(self, tokens: Tensor, sentences: Tensor, step: int) -> Tensor:
        """Return which of the tokens (N,) end their row: EOS that is not part of the prefix."""
        eos = tokens == self.eos_id
        return eos & (self.forced[sentences, step] < 0) if step < self.forced.shape[1] else eos

    def read(self, ids: list[int], sentence: int) -> tuple[list[int], bool]:
        """Return what stands before the chosen EOS, or the maximum length; and whether it came."""
        ids = ids[: self.max_lengths[sentence]]
        prefix = len(self.prefixes[sentence])
        finished = self.eos_id in ids[prefix:]
        return (ids[: ids.index(self.eos_id, prefix)] if finished else ids), finished

    @property
    def shared_prefix(self) -> int:
        """Length up to which all sentences have a prefix: it is fed before the search begins."""
        return min(len(prefix) for prefix in self.prefixes)

    @property
    def shared_tokens(self) -> Tensor:
        """The prefixes up to there, (B, shared_prefix)."""
        return self.forced[:, : self.shared_prefix]

    def permitted(
        self, logits: Tensor, tokens: Tensor, sentences: Tensor, filters: Sequence[Filter]
    ) -> Tensor:
        """Return the log probabilities (N, V) of what may follow, -inf for what may not.

        Where the filters leave nothing, EOS may follow. A token of the prefix is certain.

        Args:
            logits: (N, V), left as it is.
            tokens: (N, T), what each row holds so far, without BOS.
            sentences: (N,), the sentence of each row.
            filters: Applied in this order.
        """
        log_probs = torch.log_softmax(logits, dim=1, dtype=score_dtype(logits))
        step = tokens.shape[1]
        eos_log_prob = log_probs[:, self.eos_id].clone()
        ban(log_probs, self.banned)
        if self.vocabulary_size is not None:
            log_probs[:, self.vocabulary_size :] = -math.inf
        for keep in filters:
            keep(log_probs, tokens, self.eos_id)
        if filters:
            stuck = log_probs.amax(dim=1) == -math.inf
            log_probs[:, self.eos_id] = torch.where(stuck, eos_log_prob, log_probs[:, self.eos_id])
        if step < self.forced.shape[1]:
            force(log_probs, self.forced[sentences, step])
        return log_probs


class Decoding(Described, ABC):
    """A way of searching for outputs over a step function; calling it decodes a batch."""

    def __init__(
        self,
        *,
        length_penalty: float,
        max_length_ratio: float,
        max_length_offset: int,
        filters: Sequence[Filter],
    ) -> None:
        within("length_penalty", length_penalty, STRONGEST)
        within("max_length_ratio", max_length_ratio, MOST_RATIO)
        at_least("max_length_offset", max_length_offset, -MOST_TOKENS, MOST_TOKENS)
        self.length_penalty = length_penalty
        self.max_length_ratio = max_length_ratio
        self.max_length_offset = max_length_offset
        self.filters = list(filters)

    @abstractmethod
    def search(
        self, step: Step[S], state: S, logits: Tensor, problem: Problem
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses of each of at least one sentence, best first.

        Args:
            step: As in `__call__`.
            state: Has one row per sentence and was fed what stands before the search.
            logits: (B, V), of what follows the shared prefix.
            problem: What to search for.
        """

    @torch.no_grad()
    def __call__(
        self,
        step: Step[S],
        state: S,
        source_lengths: Tensor | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        *,
        max_lengths: Tensor | None = None,
        indices: Sequence[int] | None = None,
        vocabulary_size: int | None = None,
        prefill: Prefill[S] | None = None,
        bos_id: int | None = 1,
        eos_id: int = 2,
        pad_id: int = 0,
        never: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        """Decode B sentences; what one of them becomes does not depend on the others.

        Args:
            step: Advances the state by one token per row and returns the logits of the next.
            state: Has one row per sentence; used up afterwards.
            source_lengths: (B,), on the device of the model: hypotheses have at most
                max_length_ratio * length + max_length_offset tokens and never more than a million,
                EOS included, and always room for one more than the prefix.
            prefixes: What each hypothesis of a sentence must begin with (a prompt, for a language
                model); lengths may differ and be 0.
            max_lengths: (B,), limits on the same number that hold whatever `source_lengths` says.
                One of the two is needed.
            indices: Names of the sentences, such as positions in a file: Sampling draws by them,
                so they must not repeat or change with the batch; 0 .. B-1 when not given.
            vocabulary_size: Ids from here on are never generated, where the embedding table is
                larger than the vocabulary.
            prefill: Advances the state by several tokens per row at once, ids (N, T) -> logits
                (N, V) after the last; what all prefixes have is fed through it in one call, and
                token by token where there is none. The rest of longer prefixes is always fed token
                by token.
            bos_id: Fed first and never generated; may be the same as `eos_id`. None where nothing
                stands before the prefix: then the first token of the prefix is fed first, and no
                prefix may be empty.
            eos_id: What ends a hypothesis.
            pad_id: Never generated, unless it is the same as `eos_id`.
            never: Further ids that are never generated; with `eos_id` among them, hypotheses go on
                to their maximum length, unless the filters leave nothing else.

        Returns:
            Per sentence its hypotheses, best first, never empty.
        """
        given = source_lengths if source_lengths is not None else max_lengths
        if given is None:
            raise ValueError("source_lengths or max_lengths must be given; both are None")
        n_sentences, device = len(given), given.device
        texts = (
            [list(prefix) for prefix in prefixes] if prefixes is not None else [[]] * n_sentences
        )
        names = list(indices) if indices is not None else list(range(n_sentences))
        for name, values in (("prefixes", texts), ("indices", names)):
            if len(values) != n_sentences:
                raise ValueError(f"{name} has {len(values)} entries for {n_sentences} sentences")
        if n_sentences == 0:
            return []
        if bos_id is None and not all(texts):
            raise ValueError(
                f"prefixes: that of sentence {texts.index([])} is empty and bos_id is None, so "
                "there is nothing to begin with; give the prefix a token, or a bos_id"
            )
        problem = Problem(
            max_lengths=self._limits(source_lengths, max_lengths, texts),
            prefixes=texts,
            forced=_forced(texts, vocabulary_size, device),
            indices=names,
            vocabulary_size=vocabulary_size,
            banned=[*never, *(i for i in (pad_id, bos_id) if i is not None and i != eos_id)],
            eos_id=eos_id,
            pad_id=pad_id,
        )
        first = problem.shared_tokens  # (B, T)
        if bos_id is not None:
            first = F.pad(first, (1, 0), value=bos_id)
        if prefill is not None:
            logits = prefill(first, state)
        else:
            for newest in first.unbind(1):
                logits = step(newest, state)
        return self.search(step, state, logits, problem)

    def _limits(
        self,
        source_lengths: Tensor | None,
        max_lengths: Tensor | None,
        prefixes: list[list[int]],
    ) -> list[int]:
        needed = [len(prefix) + 1 for prefix in prefixes]
        if source_lengths is None:
            limits = None
        else:
            lengths = source_lengths.tolist()
            asked = (self.max_length_ratio * n + self.max_length_offset for n in lengths)
            limits = [
                max(min(int(limit), MOST_TOKENS), room)
                for limit, room in zip(asked, needed, strict=True)
            ]
        if max_lengths is None:
            assert limits is not None
            return limits
        hard: list[int] = max_lengths.tolist()
        for limit, room in zip(hard, needed, strict=True):
            if limit < room:
                raise ValueError(
                    f"max_lengths: {limit} leaves no token after a prefix of {room - 1}; "
                    "raise the limit or shorten the prefix"
                )
        return hard if limits is None else [min(pair) for pair in zip(limits, hard, strict=True)]


def _forced(prefixes: list[list[int]], vocabulary_size: int | None, device: torch.device) -> Tensor:
    """Return (B, longest prefix) ids, -1 after the end of a prefix."""
    size = math.inf if vocabulary_size is None else vocabulary_size
    for token in (token for prefix in prefixes for token in prefix):
        if not 0 <= token < size:
            raise ValueError(
                f"prefixes: id {token} is not between 0 and the vocabulary size, {size}; "
                "encode the prefix with the tokenizer of the target"
            )
    longest = max(len(prefix) for prefix in prefixes)
    rows = [prefix + [-1] * (longest - len(prefix)) for prefix in prefixes]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(prefixes), longest)


def score_dtype(logits: Tensor) -> torch.dtype:
    """Return what log probabilities are summed in: float32, or float64 where the model is."""
    return torch.promote_types(logits.dtype, torch.float32)


def survivors(alive: Tensor, sound: Tensor) -> Tensor:
    """Return `alive` on the host: the one time in a step that the host waits for the device.

    Args:
        alive: (M,), which rows or sentences go on.
        sound: (M,), which of them had a continuation of finite log probability.
    """
    alive, sound = torch.stack((alive, sound)).cpu()
    if not sound.all():
        raise NotFinite(
            "logits: a hypothesis has no continuation with a finite log probability; "
            "the weights have most likely diverged (look for nan in them and in train/loss)"
        )
    return alive


def widened(tokens: Tensor, length: int, longest: int, pad_id: int) -> Tensor:
    """Return tokens with room in the last dimension for `length` or more, `longest` at most.

    Room is made as it is needed: a limit of a million tokens costs nothing before they come.
    """
    room = min(max(2 * tokens.shape[-1], length, _ROOM), longest) - tokens.shape[-1]
    return F.pad(tokens, (0, room), value=pad_id)
