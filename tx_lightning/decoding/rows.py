"""Search in which no row looks at another: what greedy decoding and sampling share.

Shapes: B sentences, R rows per sentence, N rows still being decoded, T steps, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

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

# log probabilities (N, V) with -inf where banned, rows (N,) of B * R, step -> next tokens (N,)
Choice = Callable[[Tensor, Tensor, int], Tensor]


class RowSearch(Decoding):
    """Each row chooses its next token by itself and leaves the batch once it has ended."""

    @property
    @abstractmethod
    def rows_per_sentence(self) -> int:
        """R, the hypotheses of each sentence."""

    @abstractmethod
    def choice(self, problem: Problem) -> Choice:
        """Return the function that chooses the next tokens in one call."""

    def search(
        self, step: Step[S], state: S, logits: Tensor, problem: Problem
    ) -> list[list[Hypothesis]]:
        copies, choose, device = self.rows_per_sentence, self.choice(problem), problem.device
        max_lengths = torch.tensor(problem.max_lengths, device=device)
        n_rows, longest = problem.n_sentences * copies, max(problem.max_lengths)
        rows = torch.arange(0, n_rows, copies, device=device)  # (N,), those being decoded
        shared = problem.shared_prefix
        # (B * R, L), every row, also those that left
        tokens = problem.shared_tokens.repeat_interleave(copies, dim=0)
        log_probs = torch.zeros(len(rows), dtype=score_dtype(logits), device=device)
        ended: list[tuple[Tensor, Tensor]] = []  # rows, log probabilities

        for length in range(shared + 1, longest + 1):
            last = length - 1
            if length > tokens.shape[1]:
                tokens = widened(tokens, length, longest, problem.pad_id)
            sentences = rows // copies
            permitted = problem.permitted(logits, tokens[rows, :last], sentences, self.filters)
            if last == shared and copies > 1:  # until here the rows of a sentence are one
                parents = torch.arange(len(rows), device=device).repeat_interleave(copies)
                state.select(parents)
                tokens = tokens[rows][parents]
                permitted, log_probs = permitted[parents], log_probs[parents]
                rows = torch.arange(n_rows, device=device)
                sentences = sentences[parents]
            newest = choose(permitted, rows, last)
            chosen = permitted.gather(1, newest[:, None])[:, 0]
            log_probs = log_probs + chosen
            tokens[rows, last] = newest
            eos = problem.chosen_eos(newest, sentences, last)
            alive = survivors(~eos & (length < max_lengths[sentences]), chosen.isfinite())
            if not alive.all():
                left, kept = (which.nonzero()[:, 0].to(device) for which in (~alive, alive))
                ended.append((rows[left], log_probs[left]))
                if len(kept) == 0:
                    break
                state.select(kept)
                rows, newest, log_probs = rows[kept], newest[kept], log_probs[kept]
            logits = step(newest, state)
        return self._hypotheses(tokens, ended, problem)

    def _hypotheses(
        self, tokens: Tensor, ended: list[tuple[Tensor, Tensor]], problem: Problem
    ) -> list[list[Hypothesis]]:
        rows = torch.cat([rows for rows, _ in ended]).tolist()
        log_probs = torch.cat([log_probs for _, log_probs in ended]).tolist()
        ids = tokens.tolist()
        hypotheses: list[list[Hypothesis]] = [[] for _ in problem.max_lengths]
        for row, log_prob in sorted(zip(rows, log_probs, strict=True)):
            sentence = row // self.rows_per_sentence
            found, finished = problem.read(ids[row], sentence)
            length = len(found) - len(problem.prefixes[sentence]) + finished
            score = log_prob / length_penalty(length, self.length_penalty)
            hypotheses[sentence].append(Hypothesis(found, score, log_prob, finished))
        return [sorted(found, key=lambda h: h.score, reverse=True) for found in hypotheses]
