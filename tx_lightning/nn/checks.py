"""Checks of constructor arguments: one line with the argument, its value and the rule."""

from typing import TypeGuard

import numpy as np

LARGEST = 2**31 - 1  # of a size
MOST_LAYERS = 10_000


def check_size(name: str, value: object, least: int = 1, most: int = LARGEST) -> None:
    """Refuse what is no integer from `least` to `most`.

    Raises:
        ValueError: Says which argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer; it is {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; it is {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}; it is {value}")


def check_share(name: str, value: object) -> None:
    """Refuse what is no share below 1, as of dropout.

    Raises:
        ValueError: Says which argument.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number)
        or not 0 <= value < 1
    ):
        raise ValueError(f"{name} must be at least 0 and below 1; it is {value!r}")


def check_range(name: str, value: object, least: float, most: float) -> None:
    """Refuse what is no number from `least` to `most`; NaN is none.

    Raises:
        ValueError: Says which argument.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number)
        or not least <= value <= most
    ):
        raise ValueError(f"{name} must be from {least:g} to {most:g}; it is {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
