"""What a model that fills gaps guessed, for scores and for tables.

Shapes: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tx_lightning.data.tokenizers import Tokenizer

_LOGITS = 1 << 24  # held at once


def best_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the likeliest token at each place, (N,), never holding all logits.

    Args:
        hidden: (N, D).
        weight: (V, D), the output projection.
        bias: (V,), added to the logits.
    """
    rows = max(1, _LOGITS // len(weight))
    parts = [F.linear(part, weight, bias).argmax(-1) for part in hidden.split(rows)]
    return torch.cat(parts)


def marked_text(
    tokenizer: Tokenizer, ids: Sequence[int], marks: Mapping[int, str], *, spaced: bool
) -> str:
    """Write tokens as text, with something else at some places.

    Args:
        tokenizer: Of the tokens.
        ids: Tokens without BOS, EOS and padding. At a marked place stands what the mark is put
            for: it decides whether a space comes before it.
        marks: What is written at each marked place.
        spaced: Put a space before each mark.
    """
    starts = tokenizer.word_starts()
    text = ""
    for place, token_id in enumerate(ids):
        if place in marks and spaced:
            text += f" {marks[place]}"
            continue
        token = tokenizer.tokens([token_id])[0].replace("▁", " ")
        if starts[token_id] and not token[:1].isspace():
            token = f" {token}"
        elif not starts[token_id]:
            token = token.removeprefix("##")
        space = " " if token[:1] == " " and len(token) > 1 else ""
        text += f"{space}{marks[place]}" if place in marks else token
    return text.strip()
