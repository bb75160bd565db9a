"""Attention maps as pictures: layers down, heads across, in as many pictures as they need.

Shapes: L layers, H heads, T queries, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from tx_lightning.callbacks.pictures import new_figure, visible_token, width_of, write
from tx_lightning.tasks.task import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TOKENS = 100  # of a side in a picture; a longer sentence is cut there
LARGEST = 2000  # pixels of a picture, across and down
# Points of a text; pixels of everything else.
_LABEL, _TITLE = 8, 9
_CELL = 18  # at most, unless a map has so few that its own title would not fit
_MAP = (120, 40)  # at least, across and down
_GAP = 26  # between maps, with a title in it
_TOP, _RIGHT, _AXIS, _PAD = 52, 80, 20, 6  # the titles; the colour bar; the name of an axis
_END = "tab:red"


@dataclass(frozen=True)
class _Layout:
    """Where the maps of a picture are, in pixels from its lower left corner.

    Attributes:
        left: Where the first map begins.
        bottom: Where the last map ends.
        width: Of a map.
        height: Of a map.
    """

    left: float
    bottom: float
    width: float
    height: float

    def size(self, down: int, across: int) -> tuple[float, float]:
        """The width and height of a picture of so many maps."""
        return (
            self.left + across * (self.width + _GAP) - _GAP + _RIGHT,
            self.bottom + down * (self.height + _GAP) - _GAP + _TOP,
        )


Page = list[list[tuple[int, int]]]  # the rows of a picture: of each map the layer and the head


def draw(
    weights: Tensor,
    labels: Labels,
    layers: Sequence[int],
    heads: Sequence[int],
    title: str,
    *,
    reads: bool = False,
    ends: Sequence[int] = (),
) -> "list[Figure]":
    """Draw the maps of one sentence, a row for each layer and a column for each head.

    A picture is at most 2,000 pixels wide and high. Heads that do not fit into a row go to the
    next, and what does not fit into a picture to another.

    Args:
        weights: (L, H, T, S).
        labels: T and S tokens, written at the left and below.
        layers: Their L numbers.
        heads: Their H numbers.
        title: Written above.
        reads: Whether a query is a decoder that has read its token and chooses the next.
        ends: Tokens after which another document begins; weights across such an end are marked.
    """
    rows, columns = ([visible_token(token) for token in side[:MOST_TOKENS]] for side in labels)
    weights = weights[:, :, : len(rows), : len(columns)]
    if reads:
        rows = [f"having read {row}" for row in rows]
    longest = max(map(len, labels))
    if longest > MOST_TOKENS:
        title = f"{title}, the first {MOST_TOKENS} of {longest} tokens"
    ends = [end for end in ends if end < min(len(rows), len(columns)) - 1]
    layout = _layout(rows, columns)
    pages = _pages(layout, len(layers), len(heads))
    figures = []
    for number, page in enumerate(pages, 1):
        part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
        size = layout.size(len(page), len(page[0]))
        width, height = max(size[0], width_of(title + part, _TITLE) + 2 * _PAD), size[1]
        figure = new_figure(width, height)
        for i, row in enumerate(page):
            y = layout.bottom + (len(page) - 1 - i) * (layout.height + _GAP)
            for j, (layer, head) in enumerate(row):
                x = layout.left + j * (layout.width + _GAP)
                axes = figure.add_axes(
                    (x / width, y / height, layout.width / width, layout.height / height)
                )
                image = weights[layer, head].numpy()
                axes.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto")
                axes.set_title(f"layer {layers[layer]}, head {heads[head]}", fontsize=8, pad=3)
                axes.set_axis_off()
                _mark_ends(axes, ends, len(rows))
                lowest = i == len(page) - 1 or j >= len(page[i + 1])
                _label(axes, rows if j == 0 else [], columns if lowest else [], layout)
        _frame(figure, layout, size, title + part, marked=bool(ends))
        figures.append(figure)
    return figures


def _label(axes: "Axes", rows: Sequence[str], columns: Sequence[str], layout: _Layout) -> None:
    """Write the tokens beside and below a map; texts are drawn in a tenth of the time of ticks."""
    (right, left), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    n_columns, n_rows = abs(left - right), abs(top - bottom)
    for t, row in enumerate(rows):
        at = -0.5 - _PAD * n_columns / layout.width
        write(axes, at, t, row, size=_LABEL, ha="right")
    for s, column in enumerate(columns):
        at = n_rows - 0.5 + _PAD * n_rows / layout.height
        upright = width_of(column, _LABEL) + 3 < layout.width / n_columns
        turn = 0 if upright else 90
        write(axes, s, at, column, size=_LABEL, ha="center", va="top", rotation=turn)


def _layout(rows: Sequence[str], columns: Sequence[str]) -> _Layout:
    left = _AXIS + max(width_of(row, _LABEL) for row in rows) + 2 * _PAD
    bottom = _AXIS + max(width_of(column, _LABEL) for column in columns) + 2 * _PAD
    across = min(_CELL, (LARGEST - left - _RIGHT) / len(columns))
    down = min(_CELL, (LARGEST - bottom - _TOP) / len(rows))
    return _Layout(
        left, bottom, max(_MAP[0], across * len(columns)), max(_MAP[1], down * len(rows))
    )


def _pages(layout: _Layout, n_layers: int, n_heads: int) -> list[Page]:
    """The maps of each picture, about equally many in each; of a layer all heads, if they fit."""
    across = max([n for n in range(1, n_heads + 1) if layout.size(1, n)[0] <= LARGEST] or [1])
    heads = _parts(n_heads, across)
    n_rows = n_layers * len(heads)
    down = max([n for n in range(1, n_rows + 1) if layout.size(n, 1)[1] <= LARGEST] or [1])
    if len(heads) <= down:
        return [
            [[(layer, head) for head in part] for layer in layers for part in heads]
            for layers in _parts(n_layers, down // len(heads))
        ]
    return [
        [[(layer, head) for head in heads[place]] for place in places]
        for layer in range(n_layers)
        for places in _parts(len(heads), down)
    ]


def _parts(n: int, most: int) -> list[range]:
    """0 to n in parts of at most so many, the first of them the largest."""
    n_parts = -(-n // most)
    bounds = [-(-n * part // n_parts) for part in range(n_parts + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def _frame(
    figure: "Figure", layout: _Layout, size: tuple[float, float], title: str, *, marked: bool
) -> None:
    """Write what is around the maps: title, names of the axes, colours."""
    from matplotlib.cm import ScalarMappable

    right, top = size
    width, height = figure.get_size_inches() * figure.dpi
    middle = (layout.left + right - _RIGHT) / 2 / width
    write(figure, _PAD / width, 1 - 14 / height, title, size=_TITLE)
    write(figure, middle, _AXIS / 2 / height, "key", size=_TITLE, ha="center")
    center = (layout.bottom + top - _TOP) / 2 / height
    write(figure, _AXIS / 2 / width, center, "query", size=_TITLE, ha="center", rotation=90)
    x, y = right - _RIGHT + 14, layout.bottom
    tall = min(200, top - _TOP - y)
    bar = figure.add_axes((x / width, y / height, 12 / width, tall / height))
    colours = figure.colorbar(ScalarMappable(cmap="viridis"), cax=bar, ticks=[0, 0.5, 1])
    colours.ax.tick_params(labelsize=_LABEL)
    write(figure, x / width, (y + tall + 10) / height, "weight", size=_LABEL)
    if marked:
        note = (
            "red: the end of a document; weights left of a red corner and below it cross that end"
        )
        write(figure, _PAD / width, 4 / height, note, size=_LABEL, va="bottom", color=_END)


def _mark_ends(axes: "Axes", ends: Sequence[int], n_rows: int) -> None:
    """Draw the upper and right border of where queries see keys before a document's end."""
    for end in ends:
        axes.plot(
            [-0.5, end + 0.5, end + 0.5], [end + 0.5, end + 0.5, n_rows - 0.5], color=_END, lw=1
        )
