"""The JSON of a tokenizer with other ids: some tokens are left out, and padding is the last."""

from collections.abc import Sequence
from typing import Any

PAD = "<pad>"


def padded_last(settings: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A tokenizer with some of its tokens, numbered from 0, and <pad> behind them.

    <pad> is an added token: no piece of a text is it, whatever the model.

    Args:
        settings: The JSON of a tokenizer.
        kept: Ids of the tokens that stay, ascending.
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
    # The post-processor names ids; it is made anew when the files are written.
    return {**settings, "model": model, "added_tokens": added, "post_processor": None}
