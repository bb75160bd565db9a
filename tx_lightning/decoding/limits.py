"""What the arguments of a search may be: one line with the argument, its value and the rule."""

import numpy as np

LARGEST = 2**62
MOST_HYPOTHESES = 100_000  # of a sentence
MOST_TOKENS = 1_000_000  # of a hypothesis
MOST_RATIO = 1_000.0  # tokens of a hypothesis per token of its source
STRONGEST = 10.0  # exponent of the length penalty, so that quotients stay within float32


def at_least(name: str, value: object, least: int, most: int) -> None:
    """Refuse an argument that is no integer from `least` to `most`.

    Raises:
        ValueError: Says which argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer; it is {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; it is {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}; it is {value}")


def within(name: str, value: object, most: float) -> None:
    """Refuse an argument that is no number from 0 to `most`; NaN is none.

    Raises:
        ValueError: Says which argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name} must be a number; it is {value!r}")
    if not value <= most:
        raise ValueError(f"{name} must be from 0 to {most:g}; it is {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0; it is {value}")
