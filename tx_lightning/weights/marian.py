"""The vocabulary and the start of decoding as Marian (Junczys-Dowmunt et al. 2018) has them.

In Marian the last token is padding, and decoding starts with it: with a vector of zeros. What reads
Marian's folders relies on this; CTranslate2 drops the last row and starts from zeros whatever it
holds. A network that was trained here starts with the embedding of BOS, and has rows for padding
and BOS elsewhere. It is the same function in another representation:

- All embeddings e move by -b, the embedding of BOS, so that the start becomes 0. Then the input x
  of the first layer is x - c at every position, c being b times the scale. Two biases take this
  back: queries, keys and values are W (x - c) + (bias + W c), and the post-norm residual is
  norm((x - c) + (attention(x) + c)). The logits h e of a tied output all move by -h b, which their
  softmax does not see.
- The rows are those of all tokens but padding and BOS, in their order, and <pad> in place of BOS.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.weights.renumbering import PAD, padded_last
from tx_lightning.weights.rules import Tensors
from tx_lightning.weights.tokenizer_files import plain_settings, special_ids_of

NEVER = -1e4  # a logit of something that is not generated; half precision has it too


def has_layout(tokenizers: Tokenizers) -> bool:
    """Whether tokenizers can be written with Marian's vocabulary: one, for both sides."""
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
    """Tokenizers whose last token is <pad> by that name, None where they have another layout.

    Args:
        tokenizers: Those of a model that is written with its own rows.
        rows: Of the embedding table.
    """
    ids = special_ids_of(tokenizers.target)
    last = rows - 1
    if not has_layout(tokenizers) or (ids.pad, ids.bos) != (last, last):
        return None
    if tokenizers.target.vocab_size != rows:
        return None
    return _both(tokenizers, range(last))


def _kept(tokenizer: Tokenizer, ids: SpecialIds) -> list[int]:
    """The ids of all tokens that are not written as <pad>."""
    gone = {ids.pad, ids.bos} - {ids.eos}
    return [i for i in range(tokenizer.vocab_size) if i not in gone]


def with_layout(
    state: Tensors, tokenizers: Tokenizers, *, shared: bool, scale: float
) -> tuple[Tensors, Tokenizers, dict[int, int]]:
    """The state dict of an `EncoderDecoder` and its tokenizers in the layout of Marian.

    Returned with the new id of each token that has one.

    Args:
        state: Of a post-norm network without norms of embeddings, its output tied.
        tokenizers: Those of which `has_layout` is true.
        shared: Whether source and target have one embedding table.
        scale: What embeddings are multiplied by.
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
    """Let a self-attention and its residual be what they were when the input moves by -`by`."""
    weight = state[f"{attention}.input.weight"].double()
    for name, change in (("input", weight @ by), ("output", by)):
        bias = state[f"{attention}.{name}.bias"]
        state[f"{attention}.{name}.bias"] = (bias.double() + change).float()


def _renumbered(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
    """A tokenizer with the kept tokens as 0, 1, 2 and so on, and <pad> behind them."""
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
