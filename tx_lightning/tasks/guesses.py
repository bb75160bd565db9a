"""What a model that fills gaps was given and guessed, for scores and for tables.

Shapes: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tx_lightning.data.tokenizers import Tokenizer
from tx_lightning.tasks.task import without_padding

_LOGITS = 1 << 24  # held at once


def best_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the likeliest token at each place, (N,), never holding all logits.

    Args:
        hidden: (N, D).
        weight: (V, D), the output projection.
        bias: (V,), added to the logits.
    """
    rows = max(1, _LOGITS // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):  # or rounded logits would be equal
        w, b = weight.float(), None if bias is None else bias.float()
        parts = [F.linear(part.float(), w, b).argmax(-1) for part in hidden.split(rows)]
    return torch.cat(parts)


def gap_names(tokenizer: Tokenizer, vocab_size: int) -> dict[int, str]:
    """How ids at the end of the embedding table are shown: ``<0>`` the last, ``<1>`` before it."""
    return {i: f"<{vocab_size - 1 - i}>" for i in range(tokenizer.vocab_size, vocab_size)}


def shown_tokens(tokenizer: Tokenizer, ids: Sequence[int], names: Mapping[int, str]) -> list[str]:
    """Each token as a reader would write it, without padding; some ids have names of their own."""
    real = without_padding(ids, tokenizer.pad_id)
    return [names[i] if i in names else tokenizer.tokens([i])[0] for i in real]


def marked_text(tokenizer: Tokenizer, ids: Sequence[int], marks: Mapping[int, str]) -> str:
    """Write tokens as text, with something else at some places.

    Args:
        tokenizer: Of the tokens.
        ids: Tokens without BOS, EOS and padding. Whether there is a space before a mark is up to
            the token that it stands for; there is one where that is no token of the tokenizer.
        marks: What is written at each marked place.
    """
    starts = tokenizer.word_starts()
    text = ""
    for place, i in enumerate(ids):
        token = tokenizer.tokens([i])[0].replace("▁", " ") if i < len(starts) else " <>"
        if i < len(starts) and not starts[i]:
            token = token.removeprefix("##")  # of WordPiece
        elif not token[:1].isspace():
            token = f" {token}"
        blank = " " if len(token) > 1 and token[0] == " " else ""
        text += blank + marks[place] if place in marks else token
    return text.strip()
