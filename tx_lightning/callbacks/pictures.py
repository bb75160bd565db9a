"""Text in pictures: every character can be read, and how wide a text is drawn is known before."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
LONGEST = 16  # characters of a label
_FONT = "DejaVu Sans"  # part of matplotlib
_BLANK = "▁"  # stands for a space in tokens


def visible(text: str) -> str:
    """Return a text as it can be drawn in one line, at most 16 characters.

    What has no shape of its own, as a line break, is written as an escape sequence, and so is what
    no font of this machine has.
    """
    shown = "".join(c if c.isprintable() and _font_with(c) else _escaped(c) for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def visible_token(token: str) -> str:
    """Return a token as `visible`, one without letters and digits in quotes, or it gets lost."""
    text = visible(token)
    if any(c.isalnum() for c in token):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def new_figure(width: float, height: float) -> "Figure":
    """An empty picture of so many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)  # no window, no global state of pyplot
    return figure


def write(
    parent: "Axes | Figure",
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    ha: str = "left",
    va: str = "center",
    rotation: float = 0,
    color: str = "black",
) -> None:
    """Write a text as it is: a $ is a $."""
    parent.text(
        x,
        y,
        text,
        fontsize=size,
        ha=ha,
        va=va,
        rotation=rotation,
        color=color,
        fontfamily=_families(text),
        parse_math=False,
    )


@cache
def width_of(text: str, size: float) -> float:
    """How many pixels wide `write` draws a text."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, DPI)  # type: ignore[no-untyped-call]
    font = FontProperties(family=_families(text), size=size)
    width, _, _ = renderer.get_text_width_height_descent(text, font, ismath=False)  # type: ignore[no-untyped-call]
    return float(width)


def save(figure: "Figure", path: Path) -> None:
    """Write a picture as a file, in its size whatever the user's settings of matplotlib say."""
    figure.savefig(path, dpi=DPI)


def _families(text: str) -> list[str]:
    """The fonts that have the characters of a text, matplotlib's own first."""
    found = (_font_with(character) for character in text)
    return list(dict.fromkeys([_FONT, *(name for name in found if name)]))


@cache
def _font_with(character: str) -> str:
    """Name a font of this machine that has a character; empty where none has."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    if get_font(findfont(_FONT)).get_char_index(ord(character)):
        return _FONT
    for entry in sorted(fontManager.ttflist, key=lambda entry: entry.name):
        if entry.name.startswith(("LastResort", "Last Resort", "STIX", "cm")):
            continue  # boxes for all there is, and formulas
        try:
            if get_font(entry.fname).get_char_index(ord(character)):
                return entry.name
        except (OSError, RuntimeError):
            continue  # of a format that cannot be drawn, as many with colours
    return ""
