"""Beam search whose end is exact: it stops when nothing alive can still enter the n best.

Shapes: B sentences being decoded, W hypotheses alive of each, L longest hypothesis, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tx_lightning.decoding.filters import Filter
from tx_lightning.decoding.limits import MOST_HYPOTHESES, at_least
from tx_lightning.decoding.scores import length_penalty
from tx_lightning.decoding.search import (
    Decoding,
    Hypothesis,
    Problem,
    S,
    Step,
    score_dtype,
    survivors,
    widened,
)


class Candidates(NamedTuple):
    """The best continuations of each sentence, best first; of log probability -inf where none.

    Attributes:
        log_probs: (B, W).
        parents: (B, W), which of the sentence's hypotheses each continues.
        tokens: (B, W), with what.
        sound: (B,), whether each hypothesis alive had a continuation.
    """

    log_probs: Tensor
    parents: Tensor
    tokens: Tensor
    sound: Tensor


class Hypotheses(NamedTuple):
    """Hypotheses of each sentence, best first; of score -inf where there is none.

    Attributes:
        scores: (B, W).
        log_probs: (B, W).
        tokens: (B, W, L), anything after EOS.
    """

    scores: Tensor
    log_probs: Tensor
    tokens: Tensor

    def best(self, n: int, others: "Hypotheses") -> "Hypotheses":
        """Return the n best of these and the others."""
        scores, chosen = torch.cat((self.scores, others.scores), dim=1).topk(n, dim=1)
        log_probs = torch.cat((self.log_probs, others.log_probs), dim=1).gather(1, chosen)
        tokens = torch.cat((self.tokens, others.tokens), dim=1)
        return Hypotheses(scores, log_probs, take(tokens, chosen))

    def of(self, sentences: Tensor) -> "Hypotheses":
        """Return those of some sentences."""
        return Hypotheses(*(field[sentences] for field in self))


class Beam(Decoding):
    """Beam search.

    At each step the `beam_size` most probable continuations of a sentence are kept; those that end
    in EOS are set aside, the others live on. A hypothesis alive is dropped once it could not beat
    the worst of the `n_best` set aside even if all its further tokens were certain, and a sentence
    leaves the batch when none is alive. Within what a beam can see, the result is therefore exact:
    a beam of 1 is greedy decoding and a beam wide enough is exhaustive search.

    Hypotheses cut at the maximum length come after all finished ones.

    Args:
        beam_size: Hypotheses alive per sentence.
        n_best: Hypotheses returned per sentence, at most `beam_size`.
        length_penalty: The exponent a in score = log_prob / ((5 + length) / 6)^a, Wu et al. 2016,
            equation 14; 0 compares log probabilities, more favours long hypotheses.
        max_length_ratio: Most tokens, EOS included, per token of the source.
        max_length_offset: Added to that.
        filters: What may not come next, such as `NoRepeatNgram` and `MinLength`.
    """

    def __init__(
        self,
        *,
        beam_size: int = 5,
        n_best: int = 1,
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
        at_least("beam_size", beam_size, 1, MOST_HYPOTHESES)
        at_least("n_best", n_best, 1, MOST_HYPOTHESES)
        if n_best > beam_size:
            raise ValueError(
                f"n_best must be at most beam_size, {beam_size}; it is {n_best}: raise beam_size"
            )
        self.beam_size = beam_size
        self.n_best = n_best

    def search(
        self, step: Step[S], state: S, logits: Tensor, problem: Problem
    ) -> list[list[Hypothesis]]:
        device, n_sentences, width = problem.device, problem.n_sentences, self.beam_size
        longest, shared = max(problem.max_lengths), problem.shared_prefix
        sentences = torch.arange(n_sentences, device=device)  # (B,), those being decoded
        tokens = problem.shared_tokens[:, None]  # (B, W, L)
        log_probs = torch.zeros(n_sentences, 1, dtype=score_dtype(logits), device=device)  # (B, W)
        max_lengths = torch.tensor(problem.max_lengths, device=device)
        penalties = self._penalties(problem, shared, log_probs.dtype)  # (B, L + 1)
        last_penalties = self._last_penalties(problem, log_probs.dtype)  # (B, 1)
        none = log_probs.new_full((n_sentences, self.n_best), -math.inf)
        finished = Hypotheses(none, none, tokens.expand(-1, self.n_best, -1))
        results: list[tuple[Tensor, Hypotheses, Hypotheses]] = []

        for length in range(shared + 1, longest + 1):
            last = length - 1
            if length > tokens.shape[2]:
                tokens = widened(tokens, length, longest, problem.pad_id)
                further = widened(finished.tokens, length, longest, problem.pad_id)
                finished = finished._replace(tokens=further)
                penalties = self._penalties(problem, tokens.shape[2], log_probs.dtype)
            permitted = problem.permitted(
                logits,
                tokens[:, :, :last].flatten(0, 1),
                sentences.repeat_interleave(log_probs.shape[1]),
                self.filters,
            )
            best = candidates(log_probs, permitted, width)
            if width > log_probs.shape[1]:
                state.select(torch.arange(len(sentences), device=device).repeat_interleave(width))
            tokens = take(tokens, best.parents)
            tokens[:, :, last] = best.tokens

            ended = problem.chosen_eos(best.tokens, sentences[:, None], last)
            penalty = penalties[sentences, length, None]  # (B, 1)
            scores = best.log_probs / penalty
            set_aside = Hypotheses(scores.masked_fill(~ended, -math.inf), best.log_probs, tokens)
            finished = finished.best(self.n_best, set_aside)
            hopeless = best.log_probs / last_penalties[sentences] <= finished.scores[:, -1:]
            log_probs = best.log_probs.masked_fill(ended | hopeless, -math.inf)

            alive = (log_probs > -math.inf).any(dim=1) & (length < max_lengths[sentences])
            alive = survivors(alive, best.sound)
            rows = torch.arange(len(sentences), device=device)[:, None] * width + best.parents
            if not alive.all():
                left, kept = (which.nonzero()[:, 0].to(device) for which in (~alive, alive))
                cut = Hypotheses(log_probs / penalty, log_probs, tokens)
                results.append((sentences[left], finished.of(left), cut.of(left)))
                if len(kept) == 0:
                    break
                sentences, tokens, log_probs = sentences[kept], tokens[kept], log_probs[kept]
                finished, rows = finished.of(kept), rows[kept]
            if width > 1 or not alive.all():
                state.select(rows.flatten())
            logits = step(tokens[:, :, last].flatten(), state)
        return self._hypotheses(results, problem)

    def _penalties(self, problem: Problem, longest: int, dtype: torch.dtype) -> Tensor:
        """Return what a sentence's log probabilities are divided by at each length, (B, L + 1)."""
        device = problem.device
        by_length = [length_penalty(n, self.length_penalty) for n in range(longest + 1)]
        prefixes = torch.tensor([len(prefix) for prefix in problem.prefixes], device=device)
        lengths = torch.arange(longest + 1, device=device) - prefixes[:, None]
        return torch.tensor(by_length, dtype=dtype, device=device)[lengths.clamp(min=0)]

    def _last_penalties(self, problem: Problem, dtype: torch.dtype) -> Tensor:
        """Return the same at the maximum length of each sentence, (B, 1)."""
        pairs = zip(problem.max_lengths, problem.prefixes, strict=True)
        lengths = [most - len(prefix) for most, prefix in pairs]
        penalties = [[length_penalty(n, self.length_penalty)] for n in lengths]
        return torch.tensor(penalties, dtype=dtype, device=problem.device)

    def _hypotheses(
        self, results: list[tuple[Tensor, Hypotheses, Hypotheses]], problem: Problem
    ) -> list[list[Hypothesis]]:
        hypotheses: list[list[Hypothesis]] = [[] for _ in problem.max_lengths]
        for left, *kinds in results:
            for kind in kinds:  # finished ones first
                fields = (field.tolist() for field in kind)
                for sentence, *group in zip(left.tolist(), *fields, strict=True):
                    for score, log_prob, ids in zip(*group, strict=True):
                        if score > -math.inf:
                            found, ended = problem.read(ids, sentence)
                            hypotheses[sentence].append(Hypothesis(found, score, log_prob, ended))
        return [found[: self.n_best] for found in hypotheses]


def candidates(log_probs: Tensor, continuations: Tensor, width: int) -> Candidates:
    """Return the `width` most probable continuations of each sentence.

    Args:
        log_probs: (B, W) of the hypotheses alive, -inf where there is none.
        continuations: (B * W, V), log probabilities of what may follow each.
        width: Candidates per sentence.
    """
    # The best of a sentence are among the best of its hypotheses, and these are small tensors.
    each = min(width, continuations.shape[1])
    values, ids = continuations.topk(each, dim=1)  # (B * W, C)
    values, ids = values.view(*log_probs.shape, each), ids.view(*log_probs.shape, each)
    sound = (values[:, :, 0] > -math.inf) | (log_probs == -math.inf)
    sums = (log_probs[:, :, None] + values).flatten(1)  # (B, W * C)
    missing = max(width - sums.shape[1], 0)
    sums, ids = F.pad(sums, (0, missing), value=-math.inf), F.pad(ids.flatten(1), (0, missing))
    best, chosen = sums.topk(width, dim=1)
    parents = (chosen // each).clamp(max=log_probs.shape[1] - 1)
    return Candidates(best, parents, ids.gather(1, chosen), sound.all(dim=1))


def take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen (B, W) of each sentence's rows, (B, *, L) -> (B, W, L)."""
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
