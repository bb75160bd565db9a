"""Toy step functions: a table that a test can write by hand and a small recurrent network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2


@dataclass
class TableState:
    """The state of a table model, which also checks what a state is promised.

    Attributes:
        sentences: (N,), the sentence of each row.
        history: (N, T), what each row was fed.
        row_counts: N at each step.
    """

    sentences: Tensor
    history: Tensor
    row_counts: list[int] = field(default_factory=list)

    def select(self, rows: Tensor) -> None:
        sentences = self.sentences[rows]
        if len(rows) == len(self.sentences):
            assert torch.equal(sentences, self.sentences)
        self.sentences, self.history = sentences, self.history[rows]


def start(n_sentences: int) -> TableState:
    return TableState(torch.arange(n_sentences), torch.zeros(n_sentences, 0, dtype=torch.int64))


def table_step(
    follow: Callable[[int, list[int]], list[float]], dtype: torch.dtype = torch.float64
) -> Callable[[Tensor, TableState], Tensor]:
    """Make a step of a function (sentence, tokens after BOS) -> probabilities of the next token."""

    def step(tokens: Tensor, state: TableState) -> Tensor:
        state.history = torch.cat((state.history, tokens[:, None]), dim=1)
        assert (state.history[:, 0] == BOS).all()
        state.row_counts.append(len(tokens))
        rows = zip(state.sentences.tolist(), state.history[:, 1:].tolist(), strict=True)
        return torch.tensor([follow(s, h) for s, h in rows], dtype=dtype).log()

    return step


@dataclass
class NetworkState:
    """The state of a recurrent network.

    Attributes:
        hidden: (N, D).
        row_counts: N at each step.
        prefilled: T of each call of `prefill`.
    """

    hidden: Tensor
    row_counts: list[int] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)

    def select(self, rows: Tensor) -> None:
        self.hidden = self.hidden[rows]


class Network:
    """A random recurrent network: what follows depends on all tokens so far and on the sentence."""

    def __init__(self, vocab_size: int, *, dtype: torch.dtype, seed: int, width: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.embedding = normal(vocab_size, width)
        self.recurrent = normal(width, width) / width**0.5
        self.output = 1.5 * normal(width, vocab_size) / width**0.5
        self.sources = normal(64, width)
        self.bias = torch.zeros(vocab_size, dtype=dtype)
        self.bias[EOS] = -1.0  # hypotheses of some length

    def start(self, sentences: list[int]) -> NetworkState:
        return NetworkState(self.sources[sentences])

    def step(self, tokens: Tensor, state: NetworkState) -> Tensor:
        state.hidden = torch.tanh(state.hidden @ self.recurrent + self.embedding[tokens])
        state.row_counts.append(len(tokens))
        # Summed row by row, so that a row's result is the same to the bit in every batch.
        logits: Tensor = (state.hidden[:, :, None] * self.output).sum(dim=1) + self.bias
        return logits

    def prefill(self, tokens: Tensor, state: NetworkState) -> Tensor:
        state.prefilled.append(tokens.shape[1])
        for column in tokens.unbind(1):
            logits = self.step(column, state)
        del state.row_counts[-tokens.shape[1] :]  # these were no steps of the search
        return logits

    def log_prob(
        self,
        sentence: int,
        tokens: list[int],
        *,
        given: int = 0,
        bos: bool = True,
        ends: bool = True,
    ) -> float:
        """Score tokens by teacher forcing, those after the first `given`."""
        state, total = self.start([sentence]), 0.0
        outputs = [*tokens, EOS] if ends else tokens
        inputs = [BOS, *outputs] if bos else outputs
        for i, newest in enumerate(inputs[:-1]):
            logits = self.step(torch.tensor([newest]), state)
            place = i if bos else i + 1  # of what comes next
            if place >= given:
                total += float(logits.log_softmax(dim=1)[0, outputs[place]])
        return total

    def every(
        self,
        sentence: int,
        allowed: list[int],
        max_length: int,
        prefix: Sequence[int] = (),
    ) -> Iterator[tuple[list[int], float, bool]]:
        """Yield (tokens, log probability, finished) of everything the search could end in."""

        def grow(
            state: NetworkState, newest: int, tokens: list[int], total: float
        ) -> Iterator[tuple[list[int], float, bool]]:
            if len(tokens) == max_length:
                yield tokens, total, False
                return
            log_probs = self.step(torch.tensor([newest]), state).log_softmax(dim=1)[0].tolist()
            yield tokens, total + log_probs[EOS], True
            for token in allowed:
                branch = NetworkState(state.hidden)
                yield from grow(branch, token, [*tokens, token], total + log_probs[token])

        state = self.start([sentence])
        *fed, newest = BOS, *prefix
        for token in fed:
            self.step(torch.tensor([token]), state)
        yield from grow(state, newest, list(prefix), 0.0)
