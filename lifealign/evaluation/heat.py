"""Numbers on colours: which colour a cell of a heat map has, and how its number is written. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, Normalize, to_hex

from lifealign.evaluation.scores import MetricInfo, format_score

Scale = tuple[Colormap, Normalize]
"""Colours, and what takes a number to its place among them."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map; one without a number has neither text nor colour."""

    text: str = ""
    colour: str = ""  # #rrggbb
    dark: bool = False  # whether white reads better on it than black


def score_scale(cells: np.ndarray, info: MetricInfo) -> Scale:
    """Two hues around 0 for scores of both signs, else one that darkens as scores get better."""
    known = cells[np.isfinite(cells)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    reverse = "" if info.higher_is_better else "_r"
    if low < 0 < high:
        reach = max(-low, high)
        return colormaps["RdBu" + reverse], Normalize(-reach, reach)
    # A little room: equal scores get a middle shade, not an end of the scale.
    room = 0.1 * (high - low) or 1.0
    return colormaps["YlGnBu" + reverse], Normalize(low - room, high + room)


def share_scale() -> Scale:
    """For shares of a whole, 0 to 1; the same in every picture."""
    return colormaps["OrRd"], Normalize(0, 1)


def shaded(cells: np.ndarray, scale: Scale, decimals: int | None = None) -> list[list[Cell]]:
    """A cell for each number of a matrix; NaN becomes an empty one.

    Args:
        decimals: as many as tell the numbers apart, unless told.
    """
    places = _decimals(cells) if decimals is None else decimals
    return [[_cell(value, scale, places) for value in row] for row in cells.tolist()]


def _cell(value: float, scale: Scale, decimals: int) -> Cell:
    if not np.isfinite(value):
        return Cell()
    colours, norm = scale
    red, green, blue, _ = colours(norm(value))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    return Cell(format_score(value, decimals), to_hex((red, green, blue)), dark)


def _decimals(cells: np.ndarray) -> int:
    """Enough to tell the cells apart: two, or up to four where all scores are small, as early reward margins are."""
    largest = np.nanmax(np.abs(cells), initial=0.0)
    return 2 if largest >= 0.1 or largest == 0 else 3 if largest >= 0.01 else 4
