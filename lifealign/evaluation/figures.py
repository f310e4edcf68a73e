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
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lifealign.evaluation.heat import Scale, score_scale, shaded, share_scale
from lifealign.evaluation.scores import MetricInfo, ScoreBook, metric_info

_DPI = 160
_MARKERS = "osD^vP*X"


def draw_heatmap(book: ScoreBook, metric: str) -> Figure:
    """The score matrix as a picture: a row for each step of training, a column for each task; None is left blank."""
    info, cells = metric_info(metric), score_array(book, metric)
    figure, axes = _draw_cells(cells, score_scale(cells, info))
    _label_tasks(axes, book.tasks, axis="x", title="score on")
    _label_tasks(axes, book.tasks[: len(cells)], axis="y", title="after training through")
    figure.suptitle(_title(info), fontsize=10)
    return figure


def draw_forgetting(book: ScoreBook, metric: str) -> Figure:
    """The score of each task after each step of training, from the step that trained it; a drop is forgetting."""
    info, cells = metric_info(metric), score_array(book, metric)
    rows = len(cells)
    # Narrow, and the legend below: on a phone the picture is as wide as the screen, and its words must still be legible.
    figure, axes = _figure(width=max(5.2, 1.2 + 0.5 * rows), height=4.2)
    for j, (task, marker) in enumerate(zip(book.tasks[:rows], cycle(_MARKERS))):
        # Tasks differ in marker as well as in colour, for print and for colour-blind readers.
        axes.plot(range(j, rows), cells[j:, j], marker=marker, markersize=5, linewidth=1.4, label=f"{j + 1} {task}")
    _label_tasks(axes, book.tasks[:rows], axis="x", title="after training through")
    axes.set_ylabel(info.label, fontsize=9)
    figure.suptitle(_title(info), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(title="score on", loc="outside lower center", ncols=3, frameon=False, fontsize=8)
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
    figure, axes = _draw_cells(cosines, (colormaps["RdBu"], Normalize(-1, 1)))
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # directions that no factor has
            axes.plot(directions, np.nanmedian(shares, axis=0), color="k", marker="o", markersize=3, linewidth=1.4)
        axes.set_yscale("log")
        axes.set_title(stage, fontsize=10, parse_math=False)
        axes.set_xlabel("singular direction", fontsize=9)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of the update's energy", fontsize=9)
    return figure


def draw_singular_values(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The singular values of what a stage changed: a line a factor, light to dark from the first layer to the last.

    Directions that truncation kept are filled, those that it cut are hollow.

    Args:
        records: of the factors in the order of the layers, each with ``singular_values`` and ``kept_rank``.
    """
    figure, axes = _figure(width=4.2, height=3.0)
    for number, record in enumerate(records):
        values, kept = np.asarray(record["singular_values"], dtype=np.float64), record["kept_rank"]
        directions, colour = np.arange(1, len(values) + 1), colormaps["viridis_r"]((number + 1) / (len(records) + 1))
        axes.plot(directions, values, color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(directions[:kept], values[:kept], "o", color=colour, markersize=3)
        axes.plot(directions[kept:], values[kept:], "o", color=colour, markersize=3, fillstyle="none")
    # Symmetric: a factor that did not change has values of 0, and they are to be seen.
    axes.set_yscale("symlog", linthresh=1e-6)
    axes.set_xlabel("singular direction; filled: kept", fontsize=9)
    axes.set_ylabel("singular value", fontsize=9)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    return figure


def draw_layers(cells: np.ndarray, layers: Sequence[str], columns: Sequence[str], *, title: str, share: bool) -> Figure:
    """A figure of every layer (rows) and stage (columns), (layers, stages); NaN is left blank.

    Args:
        share: whether the numbers are shares of a whole, 0 to 1, or numbers of directions.
    """
    rows, width = cells.shape
    scale = share_scale() if share else score_scale(cells, MetricInfo(title))
    figure, axes = _draw_cells(cells, scale, size=(3.4 + 0.55 * width, 1.6 + 0.3 * rows))
    axes.set_yticks(range(rows), layers, fontsize=8, parse_math=False)
    axes.set_xticks(range(width), columns, fontsize=8, parse_math=False, rotation=35, ha="right", rotation_mode="anchor")
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_cells(cells: np.ndarray, scale: Scale, size: tuple[float, float] | None = None) -> tuple[Figure, Axes]:
    """A matrix of numbers on their colours; NaN is left blank."""
    rows, columns = cells.shape
    width, height = size or (max(4.5, 2.6 + 0.72 * columns), 1.7 + 0.5 * rows)
    figure, axes = _figure(width, height)
    colours, norm = scale
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=norm, aspect="auto")
    for i, row in enumerate(shaded(cells, scale)):
        for j, cell in enumerate(row):
            if cell.text:
                axes.text(j, i, cell.text, ha="center", va="center", fontsize=9, color="w" if cell.dark else "k")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def score_array(book: ScoreBook, metric: str) -> np.ndarray:
    """The matrix as (rows recorded, tasks) float64, NaN where there is no score."""
    return np.array(book.matrix(metric), dtype=np.float64)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # A figure of its own, without pyplot: no global state, no window, safe in a training process.
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


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
