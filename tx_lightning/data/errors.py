"""Errors about the user's data: one line each, with what exists instead of what was asked for."""

import difflib
from collections.abc import Sequence

import numpy as np

LARGEST = 2**62  # sums of such numbers fit into 64 bits
_LISTED = 10
_COMPARED = 1000
_LONGEST = 60  # characters of a name; a header line may hold a million


class DataError(ValueError):
    """The user's data cannot be used; the message is one line: what, where, and the remedy."""


def check_at_least(name: str, value: object, least: int, most: int = LARGEST) -> None:
    """Refuse an argument that is no integer from `least` to `most`.

    Raises:
        DataError: Says which argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DataError(f"{name} is {value!r}; it must be an integer")
    if value < least:
        raise DataError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise DataError(f"{name} is {value}; it must be at most {most:,}")


def check_texts(texts: object) -> None:
    """Refuse one text where several are expected: its letters are not meant.

    Raises:
        DataError: Says how to give one.
    """
    if isinstance(texts, str | bytes):
        raise DataError(
            f"a list of texts is expected, not the one text {_shortened(str(texts))!r}: give it as "
            "[text]"
        )


def listed(names: Sequence[str], wanted: str) -> str:
    """The names that exist, the nearest to `wanted` first, as `'train', 'val' and 3 more`."""
    short = [_shortened(name) for name in names[:_COMPARED]]
    near = difflib.get_close_matches(_shortened(wanted), short, n=3, cutoff=0.5)
    shown = (near + [name for name in short if name not in near])[:_LISTED]
    more = len(names) - len(shown)
    return ", ".join(map(repr, shown)) + (f" and {more} more" if more else "")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[:_LONGEST] + "..."
