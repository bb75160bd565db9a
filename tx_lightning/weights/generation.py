"""Convert generation_config.json to our `Decoding` and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.decoding import (
    Beam,
    BeginWith,
    Decoding,
    Filter,
    Greedy,
    MinLength,
    NoRepeatNgram,
    Sampling,
)
from tx_lightning.weights.configuration import Arguments, Configuration

Notes = list[str]

# Fields about the search; generation_config.json takes precedence over config.json.
SEARCH = (
    "forced_bos_token_id",
    "no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "max_length",
    "max_new_tokens",
    "num_beams",
    "length_penalty",
)
_MOST_BEAMS = 1000
# transformers divides by length^p. With p = _EXPONENT * a, lengths 10 and 40 have the same ratio of
# penalties as with ((5 + length) / 6)^a.
_EXPONENT = math.log((5 + 40) / (5 + 10)) / math.log(40 / 10)


def read_search(config: Configuration, longest: int | None) -> tuple[Arguments, Notes]:
    """Convert the supported fields to arguments of a `Translation`.

    Args:
        config: The fields.
        longest: Positions of the decoder, None for no limit.

    Returns:
        `decoding` and `test_decoding` as class path and arguments, and notes for the user.
    """
    filters = []
    if config["forced_bos_token_id"] is not None:
        filters.append(_filter("BeginWith", ids=[config.token_id("forced_bos_token_id")]))
    if size := config.optional("no_repeat_ngram_size", least=0):
        filters.append(_filter("NoRepeatNgram", size=size))
    # min_length and max_length of transformers include the decoder start token.
    least = max(
        (config.optional("min_length", least=0) or 1) - 1,
        config.optional("min_new_tokens", least=0) or 0,
    )
    if least:
        filters.append(_filter("MinLength", length=least))
    most = config.optional("max_length", least=2)
    limits = [] if most is None else [most - 1]
    if (new := config.optional("max_new_tokens")) is not None:
        limits = [new]
    if longest is not None:
        limits.append(longest)
    searches = {"decoding": "Greedy", "test_decoding": "Beam"}
    options: dict[str, Arguments] = {name: {"filters": filters} for name in searches}
    for option in options.values() if limits else ():
        option.update(max_length_ratio=0.0, max_length_offset=min(limits))
    beams = config.optional("num_beams", most=_MOST_BEAMS)
    penalty = 1.0 if config["length_penalty"] is None else config.number("length_penalty")
    notes = []
    if beams is not None and beams > 1:
        options["test_decoding"]["beam_size"] = beams
        if penalty == 0:
            options["test_decoding"]["length_penalty"] = 0.0
        else:
            notes.append(
                f"length_penalty {penalty:g} is ignored: transformers divides by "
                f"length^{penalty:g}, Beam by ((5 + length) / 6)^{Beam().length_penalty:g}"
            )
    found = {
        name: {"class_path": f"tx_lightning.decoding.{search}", "init_args": options[name]}
        for name, search in searches.items()
    }
    return found, notes


def _filter(name: str, **arguments: Any) -> Arguments:
    return {"class_path": f"tx_lightning.decoding.{name}", "init_args": arguments}


def write_translation(
    decoding: Decoding,
    ids: SpecialIds,
    unused: Sequence[int],
    longest: int,
    places: Mapping[int, int],
) -> tuple[Arguments, Notes]:
    """Build generation_config.json of a translation model, and notes on what it cannot express.

    Args:
        decoding: The search of the checkpoint.
        ids: The exported special ids of the target side.
        unused: Rows of the embedding table without a token.
        longest: Positions of the decoder.
        places: Map from our token ids to the exported ones.
    """
    settings, notes = _strategy(decoding)
    most = decoding.max_length_offset
    if decoding.max_length_ratio > 0:
        most = min(int(decoding.max_length_ratio * longest) + most, longest)
        notes.append(
            f"the length limit is {most:,} tokens: transformers has no limit relative to the "
            f"source, here {decoding.max_length_ratio:g} x source + {decoding.max_length_offset}"
        )
    settings["max_length"] = max(min(most, longest), 1) + 1  # includes the decoder start token
    filters, more = _filters(decoding.filters, ids, places, starts=1)
    never = {i for i in (ids.pad, ids.bos) if i != ids.eos}
    return {
        "decoder_start_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        **settings,
        **filters,
        **_suppressed(never, unused),
    }, notes + more


def write_continuation(
    decoding: Decoding, ids: SpecialIds, unused: Sequence[int], longest: int
) -> tuple[Arguments, Notes]:
    """Build generation_config.json of a language model, and notes on what it cannot express.

    Args:
        decoding: The search of the checkpoint.
        ids: The special ids.
        unused: Rows of the embedding table without a token.
        longest: Positions: maximum length of prompt and continuation.
    """
    settings, notes = _strategy(decoding)
    filters, more = _filters(decoding.filters, ids, {}, starts=0)
    special = (ids.pad, ids.bos, ids.unk, ids.mask)
    never = {i for i in special if i is not None and i != ids.eos}
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        **settings,
        "max_length": longest,
        **filters,
        **_suppressed(never, unused),
    }, notes + more


def _suppressed(never: set[int], unused: Sequence[int]) -> Arguments:
    banned = sorted({*never, *unused})
    return {"suppress_tokens": banned} if banned else {}


def _strategy(decoding: Decoding) -> tuple[Arguments, Notes]:
    """Convert the search itself."""
    if isinstance(decoding, Beam) and type(decoding) is Beam:
        if decoding.beam_size == 1:
            return {"do_sample": False, "num_beams": 1}, []
        penalty = round(_EXPONENT * decoding.length_penalty, 2)
        settings = {
            "do_sample": False,
            "num_beams": decoding.beam_size,
            "early_stopping": "never",  # as here: stop only when no better hypothesis is possible
            "length_penalty": penalty,
        }
        if decoding.n_best > 1:
            settings["num_return_sequences"] = decoding.n_best
        if penalty == 0:
            return settings, []
        ours = f"{decoding.length_penalty:g}"
        note = (
            f"length_penalty {ours} is written as {penalty:g}: transformers divides by "
            f"length^{penalty:g}, not by ((5 + length) / 6)^{ours}"
        )
        return settings, [note]
    if isinstance(decoding, Sampling) and type(decoding) is Sampling:
        settings = {
            "do_sample": True,
            "num_beams": 1,
            "temperature": decoding.temperature,
            "top_k": 0
            if decoding.top_k is None
            else decoding.top_k,  # the default of transformers is 50
            "top_p": 1.0 if decoding.top_p is None else decoding.top_p,
        }
        if decoding.min_p is not None:
            settings["min_p"] = decoding.min_p
        if decoding.n_samples > 1:
            settings["num_return_sequences"] = decoding.n_samples
        return settings, ["samples differ: transformers draws other random numbers"]
    if type(decoding) is Greedy:
        return {"do_sample": False, "num_beams": 1}, []
    name = type(decoding).__name__
    return {"do_sample": False, "num_beams": 1}, [
        f"{name} is written as greedy search: transformers has no such search"
    ]


def _filters(
    filters: Sequence[Filter], ids: SpecialIds, places: Mapping[int, int], starts: int
) -> tuple[Arguments, Notes]:
    """Convert filters.

    Args:
        filters: The filters.
        ids: The exported special ids.
        places: Map from our token ids to the exported ones; empty if no first token can be forced.
        starts: Number of start tokens that transformers counts and we do not.
    """
    settings: Arguments = {}
    left_out = []
    for one in filters:
        if isinstance(one, MinLength) and type(one) is MinLength:
            length = one.length + starts if one.length else 0
            settings["min_length"] = max(length, settings.get("min_length", 0))
        elif (
            isinstance(one, NoRepeatNgram)
            and type(one) is NoRepeatNgram
            and not (
                one.size == 1 and starts and ids.bos == ids.eos
            )  # transformers counts the start token
        ):
            size = settings.get("no_repeat_ngram_size", one.size)
            settings["no_repeat_ngram_size"] = min(one.size, size)
        elif (
            isinstance(one, BeginWith)
            and type(one) is BeginWith
            and (len(one.ids) == 1 and one.ids[0] in places)
            and "forced_bos_token_id" not in settings
        ):
            settings["forced_bos_token_id"] = places[one.ids[0]]
        else:
            left_out.append(
                f"the filter {type(one).__name__} is not exported: transformers has no equivalent"
            )
    return settings, left_out
