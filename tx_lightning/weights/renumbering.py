"""Renumber the tokens in the JSON of a tokenizer."""

from collections.abc import Sequence
from typing import Any

PAD = "<pad>"


def padded_last(settings: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Keep some tokens, renumber them from 0 and append <pad>.

    <pad> is an added token, so that no model produces it from text.

    Args:
        settings: The JSON of a tokenizer.
        kept: Ids of the tokens to keep, ascending.
    """
    places = {old: new for new, old in enumerate(kept)}
    model = dict(settings["model"])
    if model["type"] == "Unigram":
        pieces = model["vocab"]
        model["vocab"] = [pieces[i] for i in kept if i < len(pieces)]
        model["unk_id"] = places.get(model["unk_id"])
    else:
        model["vocab"] = {t: places[i] for t, i in model["vocab"].items() if i in places}
    added = [{**t, "id": places[t["id"]]} for t in settings["added_tokens"] if t["id"] in places]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": len(kept), "content": PAD, **flags, "special": True})
    # The post-processor contains ids; `tokenizer_documents` builds a new one.
    return {**settings, "model": model, "added_tokens": added, "post_processor": None}
