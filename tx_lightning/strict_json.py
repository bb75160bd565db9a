"""JSON as the standard has it: NaN and infinity, which Python writes by default, are null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    sort_keys: bool = False,
    separators: tuple[str, str] | None = None,
) -> str:
    """Return a value as JSON that every parser accepts.

    Args:
        value: Mappings, lists, strings, numbers, booleans and None.
        indent: As in `json.dumps`, like the other options.
        ensure_ascii: Whether to escape what is not ASCII.
        sort_keys: Whether to sort the keys of objects.
        separators: Between items, and between key and value.
    """

    def dumps(value: Any) -> str:
        return json.dumps(
            value,
            allow_nan=False,
            indent=indent,
            ensure_ascii=ensure_ascii,
            sort_keys=sort_keys,
            separators=separators,
        )

    try:
        return dumps(value)
    except ValueError:  # a number is not finite; looking for it beforehand would cost more
        return dumps(finite(value))


def finite(value: Any) -> Any:
    """Return a copy of nested values with None in place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
