"""Vocabulary and decoder start as in Marian (Junczys-Dowmunt et al. 2018).

In Marian the last token is padding. It also starts decoding, and its embedding is 0. CTranslate2's
converter relies on this: it drops the last row and starts decoding from zeros. A network trained
here starts from the embedding of BOS and has separate rows for padding and BOS. This module
rewrites it without changing its output:

- Subtract b, the embedding of BOS, from all embeddings, so that the start becomes 0. The input x of
  the first layer then becomes x - c, where c is b times the embedding scale. Two biases compensate:
  queries, keys and values are W (x - c) + (bias + W c), and the post-norm residual is
  norm((x - c) + (attention(x) + c)). The logits h e of the tied output all change by -h b, to which
  softmax is invariant.
- Keep the rows of all tokens except padding and BOS, in order, and append <pad> as the start.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.weights.renumbering import PAD, padded_last
from tx_lightning.weights.rules import Tensors
from tx_lightning.weights.tokenizer_files import plain_settings, special_ids_of

NEVER = -1e4  # bias of a token that must not be generated; within the range of float16


def has_layout(tokenizers: Tokenizers) -> bool:
    """Return whether tokenizers can be rewritten: one vocabulary for both sides, UNK kept."""
    ids, source = special_ids_of(tokenizers.target), special_ids_of(tokenizers.source)
    kept = _kept(tokenizers.target, ids)
    needed = {ids.eos, ids.unk, *ids.prefix}
    entries = tokenizers.target.entries()
    return (
        tokenizers.shared
        and ids == source
        and needed <= set(kept)
        and PAD not in {entries[i] for i in kept}
    )


def with_plain_padding(tokenizers: Tokenizers, rows: int) -> Tokenizers | None:
    """Return tokenizers whose last token is named <pad>; None if it is not padding and start.

    Args:
        tokenizers: The tokenizers of a model whose rows are kept.
        rows: Rows of the embedding table.
    """
    ids = special_ids_of(tokenizers.target)
    last = rows - 1
    if not has_layout(tokenizers) or (ids.pad, ids.bos) != (last, last):
        return None
    if tokenizers.target.vocab_size != rows:
        return None
    return _both(tokenizers, range(last))


def _kept(tokenizer: Tokenizer, ids: SpecialIds) -> list[int]:
    """Return the ids of all tokens except padding and BOS; EOS stays even if it is BOS."""
    gone = {ids.pad, ids.bos} - {ids.eos}
    return [i for i in range(tokenizer.vocab_size) if i not in gone]


def with_layout(
    state: Tensors, tokenizers: Tokenizers, *, shared: bool, scale: float
) -> tuple[Tensors, Tokenizers, dict[int, int]]:
    """Rewrite the state dict of an `EncoderDecoder` and its tokenizers.

    Args:
        state: The state dict: post-norm, no embedding norm, tied output.
        tokenizers: The tokenizers, for which `has_layout` is true.
        shared: Whether source and target share one embedding table.
        scale: The factor of the embeddings.

    Returns:
        State dict, tokenizers, and a map from old to new token ids.
    """
    ids = special_ids_of(tokenizers.target)
    kept = _kept(tokenizers.target, ids)
    state = dict(state)
    table = state["target_embedding.tokens.weight"]
    start = table[ids.bos].double()
    rows = torch.cat([table[kept].double() - start, torch.zeros(1, len(start))]).float()
    bias = state.get("output.bias", table.new_zeros(len(table)))
    last = bias.new_tensor([NEVER]) if ids.bos == ids.eos else bias[ids.bos, None]
    state["target_embedding.tokens.weight"] = state["output.weight"] = rows
    state["output.bias"] = torch.cat([bias[kept], last])
    if shared:
        state["source_embedding.tokens.weight"] = rows
    else:
        source = state["source_embedding.tokens.weight"]
        state["source_embedding.tokens.weight"] = torch.cat(
            [source[kept], torch.zeros_like(rows[:1])]
        )
    for stack in ("encoder", "decoder") if shared else ("decoder",):
        _move(state, f"{stack}.layers.0.self_attention", start * scale)
    return state, _both(tokenizers, kept), {old: new for new, old in enumerate(kept)}


def _both(tokenizers: Tokenizers, kept: Sequence[int]) -> Tokenizers:
    if tokenizers.source is tokenizers.target:
        return Tokenizers.one(_renumbered(tokenizers.target, kept))
    return Tokenizers(_renumbered(tokenizers.source, kept), _renumbered(tokenizers.target, kept))


def _move(state: Tensors, attention: str, by: Tensor) -> None:
    """Compensate in a self-attention and its residual for an input that changes by -`by`."""
    weight = state[f"{attention}.input.weight"].double()
    for name, change in (("input", weight @ by), ("output", by)):
        bias = state[f"{attention}.{name}.bias"]
        state[f"{attention}.{name}.bias"] = (bias.double() + change).float()


def _renumbered(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
    """Renumber the kept tokens from 0 and append <pad>."""
    ids, places = special_ids_of(tokenizer), {old: new for new, old in enumerate(kept)}
    last = len(kept)
    settings = padded_last(plain_settings(tokenizer), kept)
    names = {places[i]: tokenizer.tokens([i])[0] for i in tokenizer.special_ids if i in places}
    found = Tokenizer.foreign(
        json.dumps(settings, ensure_ascii=False),
        SpecialIds(
            pad=last,
            bos=last,
            eos=places[ids.eos],
            unk=places[ids.unk],
            mask=None if ids.mask is None else places.get(ids.mask),
            prefix=tuple(places[i] for i in ids.prefix),
        ),
        dict(sorted({**names, last: PAD}.items())),
    )
    assert found.entries() == [*(tokenizer.entries()[i] for i in kept), PAD]
    return found
