"""Prompts to texts: continue them with a language model, in batches of similar length.

Shapes: N rows being continued, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tx_lightning.data.tokenizers import Tokenizer
from tx_lightning.decoding import Decoding, Hypothesis
from tx_lightning.decoding.limits import LARGEST, MOST_TOKENS, at_least
from tx_lightning.decoding.rows import RowSearch
from tx_lightning.models import LanguageModel, LanguageModelState

PastContext = Literal["refuse", "slide"]
UNFINISHED = "�"  # what the bytes of a character decode to while some of them are missing


@dataclass(frozen=True)
class Continuation:
    """One way in which a prompt goes on.

    Attributes:
        text: What follows the prompt, without it.
        score: What continuations of a prompt are ranked by: the length-normalized log-probability.
        log_prob: Log-probability of the tokens in nats, including the end of the text if it came.
        tokens: Ids, without the prompt and the end of the text.
        finished: Whether the end of the text came, rather than the limit on new tokens.
    """

    text: str
    score: float
    log_prob: float
    tokens: list[int]
    finished: bool


class PromptError(ValueError):
    """A prompt cannot be continued.

    Attributes:
        index: Its place among the prompts.
        reason: Why, and what can be done.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"prompt {index}: {reason}")
        self.index = index
        self.reason = reason


def continue_texts(
    network: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    past_context: PastContext = "refuse",
    stride: int = 1,
    new_document: bool = False,
    stop_at_end: bool = True,
    first_index: int = 0,
    batch_tokens: int = 16384,
    observe: Callable[[str], None] | None = None,
) -> list[list[Continuation]]:
    """Continue texts: for each, in order, its continuations, the best first.

    Args:
        network: In evaluation mode while this runs.
        tokenizer: The one that the network was trained with.
        prompts: Texts to go on from.
        decoding: How to search.
        max_new_tokens: As in `continue_ids`, and so are those not named here.
        past_context: What happens to a text longer than the network's context.
        stride: How many of the oldest tokens are forgotten at once.
        new_document: Put the end of a text before the prompt, so that a text begins there; the
            prompt may then be empty.
        stop_at_end: End where the network ends the text.
        first_index: The place of the first prompt in a longer input.
        batch_tokens: Tokens that are held at once.
        observe: Told the text of the only prompt's only continuation while it comes.

    Raises:
        PromptError: When a prompt is empty, or does not fit and the past is not to be forgotten.
    """
    start = [tokenizer.eos_id] if new_document else []
    return continue_ids(
        network,
        tokenizer,
        [start + ids for ids in tokenizer.encode_batch(prompts)],
        decoding,
        max_new_tokens=max_new_tokens,
        past_context=past_context,
        stride=stride,
        stop_at_end=stop_at_end,
        first_index=first_index,
        batch_tokens=batch_tokens,
        observe=observe,
    )


@torch.inference_mode()
def continue_ids(
    network: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    past_context: PastContext = "refuse",
    stride: int = 1,
    stop_at_end: bool = True,
    first_index: int = 0,
    batch_tokens: int = 16384,
    observe: Callable[[str], None] | None = None,
) -> list[list[Continuation]]:
    """Continue rows of ids: for each, in order, its continuations, the best first.

    What a prompt becomes does not depend on the others. Ids that mean no text are not generated.

    Args:
        network: In evaluation mode while this runs.
        tokenizer: The one that the network was trained with.
        prompts: Ids to go on from.
        decoding: How to search.
        max_new_tokens: Most tokens that are added to each, the end of the text included.
        past_context: What happens to a text longer than the network's context: `refuse` raises
            before anything is generated; `slide` forgets the oldest tokens, and of a longer prompt
            all but its end.
        stride: How many of the oldest tokens are forgotten at once. With 1 the network sees as much
            as it can, at the price of reading the whole context for each token; half of the context
            is cheap.
        stop_at_end: End where the network ends the text. Otherwise it may not end: all
            max_new_tokens come.
        first_index: The place of the first prompt in a longer input: what is sampled for a prompt
            depends on its place, and not on how the input is cut.
        batch_tokens: Tokens of prompts and continuations, with padding, that are held at once for
            one sample of each.
        observe: Told the text of the only prompt's only continuation while it comes: first nothing,
            once the prompt is accepted, then piece by piece, never a part of a character.

    Raises:
        PromptError: When a prompt is empty, or does not fit and the past is not to be forgotten.
    """
    at_least("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    at_least("batch_tokens", batch_tokens, 1, LARGEST)
    context = network.context_length
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must be between 1 and the {context} tokens of the context; it is {stride}"
        )
    if observe is not None and not (len(prompts) == 1 and is_one_row(decoding)):
        raise ValueError("observe needs one prompt and a search of one row, Greedy or Sampling")
    for i, prompt in enumerate(prompts):
        _check(i, len(prompt), max_new_tokens, context, past_context)
    prefixes = [prompt[-context:] for prompt in prompts]
    special = (tokenizer.bos_id, tokenizer.unk_id, tokenizer.mask_id)
    never = [i for i in special if i is not None and i != tokenizer.eos_id]
    if not stop_at_end:
        never.append(tokenizer.eos_id)
    stream = None if observe is None else _Stream(observe, tokenizer, prefixes[0])

    def step(tokens: Tensor, state: LanguageModelState) -> Tensor:
        if stream is not None:
            stream.add(int(tokens[0]))
        return network.step(tokens, state)

    results: list[list[Continuation]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prefixes[i]))
    training, _ = network.training, network.eval()
    while order:
        held = min(len(prefixes[order[0]]) + max_new_tokens, context)
        rows = max(1, batch_tokens // held)
        chosen, order = order[:rows], order[rows:]
        given = [prefixes[i] for i in chosen]
        found = decoding(
            step,
            network.start(len(chosen), stride if past_context == "slide" else None),
            None,
            given,
            max_lengths=torch.tensor(
                [len(prefix) + max_new_tokens for prefix in given],
                device=network.output_weight.device,
            ),
            indices=[first_index + i for i in chosen],
            vocabulary_size=tokenizer.vocab_size,
            prefill=network.prefill,
            bos_id=None,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            never=never,
        )
        for i, hypotheses in zip(chosen, found, strict=True):
            results[i] = [_continuation(tokenizer, prefixes[i], h) for h in hypotheses]
    network.train(training)
    if stream is not None:
        stream.tell(results[0][0].text)
    return results


def is_one_row(decoding: Decoding) -> bool:
    """Whether a search chooses one token of a prompt after the other and takes none back."""
    return isinstance(decoding, RowSearch) and decoding.rows_per_sentence == 1


def _check(index: int, length: int, new: int, context: int, past_context: PastContext) -> None:
    """Refuse a prompt of `length` tokens that cannot be continued by `new` ones."""
    if length == 0:
        raise PromptError(
            index,
            "it is empty, and there is nothing to continue: write something, or begin a text with "
            "new_document=true",
        )
    if past_context == "slide":
        return
    if length > context:
        raise PromptError(
            index,
            f"it has {length} tokens, and the context of the network {context}: shorten it, or "
            "have its beginning forgotten with past_context=slide",
        )
    if length + new - 1 > context:  # the last one is not read again
        raise PromptError(
            index,
            f"its {length} tokens and {new} new ones are more than the context of {context} "
            f"tokens: set max_new_tokens to {context - length + 1} at most, or have the oldest "
            "forgotten with past_context=slide",
        )


def _continuation(tokenizer: Tokenizer, prefix: list[int], found: Hypothesis) -> Continuation:
    tokens = found.tokens[len(prefix) :]
    text = _text_after(tokenizer, prefix, tokens)
    return Continuation(text, found.score, found.log_prob, tokens, found.finished)


def _text_after(tokenizer: Tokenizer, prefix: list[int], tokens: list[int]) -> str:
    """What tokens say after a prefix, spaces included that they would lose at the start of a text.

    Where a tokenizer writes the prefix in another way once something follows, they stand alone.
    """
    before, alone, whole = tokenizer.decode_batch([prefix, tokens, prefix + tokens])
    return whole[len(before) :] if whole.startswith(before) else alone


class _Stream:
    """Tells the text of tokens while they come, as far as it is certain."""

    def __init__(
        self, observe: Callable[[str], None], tokenizer: Tokenizer, prefix: list[int]
    ) -> None:
        self._observe = observe
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._tokens: list[int] = []
        self._told = 0
        observe("")

    def add(self, token: int) -> None:
        """Take the newest token."""
        self._tokens.append(token)
        text = _text_after(self._tokenizer, self._prefix, self._tokens)
        if not text.endswith(UNFINISHED):
            self.tell(text)

    def tell(self, text: str) -> None:
        """Tell what was not told yet of the text so far."""
        if len(text) > self._told:
            self._observe(text[self._told :])
            self._told = len(text)
