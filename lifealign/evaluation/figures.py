"""Pictures of a run: score matrices, forgetting, what tasks added to the memory. Pure functions to matplotlib figures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from lifealign.evaluation.scores import MetricInfo, ScoreBook, format_score, metric_info

_DPI = 110
_MARKERS = "osD^vP*X"


def draw_heatmap(book: ScoreBook, metric: str) -> Figure:
    """The score matrix as a picture: a row for each step of training, a column for each task; None is left blank."""
    info, cells = metric_info(metric), _array(book, metric)
    figure, axes = _draw_cells(cells, *_colours(cells, info))
    _label_tasks(axes, book.tasks, axis="x", title="score on")
    _label_tasks(axes, book.tasks[: len(cells)], axis="y", title="after training through")
    figure.suptitle(_title(info), fontsize=10)
    return figure


def draw_forgetting(book: ScoreBook, metric: str) -> Figure:
    """The score of each task after each step of training, from the step that trained it; a drop is forgetting."""
    info, cells = metric_info(metric), _array(book, metric)
    rows = len(cells)
    figure, axes = _figure(width=3.6 + 0.72 * rows, height=3.4)
    for j, (task, marker) in enumerate(zip(book.tasks[:rows], cycle(_MARKERS))):
        # Tasks differ in marker as well as in colour, for print and for colour-blind readers.
        axes.plot(range(j, rows), cells[j:, j], marker=marker, markersize=5, linewidth=1.4, label=f"{j + 1} {task}")
    _label_tasks(axes, book.tasks[:rows], axis="x", title="after training through")
    axes.set_ylabel(info.label, fontsize=9)
    figure.suptitle(_title(info), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(title="score on", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_probes(probes: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """The score of old tasks step by step while new ones are learned; a line where each new task begins."""
    figure, axes = _figure(width=8.0, height=3.4)
    for task, marker in zip(dict.fromkeys(probe["on"] for probe in probes), cycle(_MARKERS)):
        own = [probe for probe in probes if probe["on"] == task]
        values = [probe[metric] for probe in own]
        axes.plot([probe["step"] for probe in own], values, marker=marker, markersize=3, linewidth=1.2, label=task)
    for task in dict.fromkeys(probe["task"] for probe in probes):
        axes.axvline(next(probe["step"] for probe in probes if probe["task"] == task), color="k", alpha=0.3, linewidth=0.8)
    axes.set_xlabel("optimiser step; vertical lines: a new task begins", fontsize=9)
    axes.set_ylabel(metric_info(metric).label, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(title="old task", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_conflict(cosines: np.ndarray, tasks: Sequence[str]) -> Figure:
    """Cosines between what tasks added to an adapter, (tasks, tasks): below 0 one takes back what the other gave."""
    figure, axes = _draw_cells(cosines, colormaps["RdBu"], Normalize(-1, 1))
    _label_tasks(axes, tasks, axis="x", title="")
    _label_tasks(axes, tasks, axis="y", title="")
    figure.suptitle("Cosine between what two tasks added", fontsize=10)
    return figure


def draw_spectrum(spectra: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """The share of an update's energy in each singular direction: a panel a stage, a line a factor, their median thick.

    Args:
        spectra: the singular values of each factor, by stage; a factor that did not change has no line.
    """
    figure = Figure(figsize=(4.2 * max(1, len(spectra)), 3.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(spectra)), squeeze=False)[0]
    for axes, (stage, factors) in zip(panels, spectra.items(), strict=False):
        shares = np.full((len(factors), max(map(len, factors), default=0)), np.nan)
        for row, values in zip(shares, factors, strict=True):
            squares = np.square(values)
            row[: len(squares)] = squares / squares.sum() if squares.any() else np.nan
        directions = range(1, shares.shape[1] + 1)
        axes.plot(directions, shares.T, color="tab:blue", alpha=max(0.05, 1 / max(1, len(shares))), linewidth=0.8)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # directions that no factor has
            axes.plot(directions, np.nanmedian(shares, axis=0), color="k", marker="o", markersize=3, linewidth=1.4)
        axes.set_yscale("log")
        axes.set_title(stage, fontsize=10, parse_math=False)
        axes.set_xlabel("singular direction", fontsize=9)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of the update's energy", fontsize=9)
    return figure


def _draw_cells(cells: np.ndarray, colours: Colormap, norm: Normalize) -> tuple[Figure, Axes]:
    """A matrix of numbers on their colours; NaN is left blank."""
    rows, columns = cells.shape
    figure, axes = _figure(width=max(4.5, 2.6 + 0.72 * columns), height=1.7 + 0.5 * rows)
    decimals = _decimals(cells)
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(j, i, format_score(value, decimals), ha="center", va="center", fontsize=9, color="w" if dark else "k")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _array(book: ScoreBook, metric: str) -> np.ndarray:
    """The matrix as (rows recorded, tasks) float64, NaN where there is no score."""
    return np.array(book.matrix(metric), dtype=np.float64)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # A figure of its own, without pyplot: no global state, no window, safe in a training process.
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _colours(cells: np.ndarray, info: MetricInfo) -> tuple[Colormap, Normalize]:
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


def _decimals(cells: np.ndarray) -> int:
    """Enough to tell the cells apart: two, or up to four where all scores are small, as early reward margins are."""
    largest = np.nanmax(np.abs(cells), initial=0.0)
    return 2 if largest >= 0.1 or largest == 0 else 3 if largest >= 0.01 else 4


def _label_tasks(axes: Axes, tasks: Sequence[str], *, axis: str, title: str) -> None:
    """Numbered task names along one axis; ``parse_math`` off, since a ``$`` in a name is no formula."""
    names = [f"{number} {task}" for number, task in enumerate(tasks, start=1)]
    turn = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if axis == "x" else {}
    getattr(axes, f"set_{axis}ticks")(range(len(tasks)), names, fontsize=8, parse_math=False, **turn)
    getattr(axes, f"set_{axis}label")(title, fontsize=9)


def _title(info: MetricInfo) -> str:
    return f"{info.label}: {'higher' if info.higher_is_better else 'lower'} is better"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the program's name and version the same scores give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
