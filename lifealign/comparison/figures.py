"""Pictures of a comparison. Pure functions to matplotlib figures."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lifealign.comparison.ranking import FIGURES, Comparison
from lifealign.study.table import label

_DPI = 110
SHOWN = ("last", "bwt")


def draw_scores(comparison: Comparison, metric: str) -> Figure:
    """Last and BWT of every run as bars, the run that ranks first on top; a run without the figure has none."""
    runs = comparison.ranked
    figure = Figure(figsize=(8.0, 1.4 + 0.3 * len(runs)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(SHOWN), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, SHOWN, strict=True):
        values = [comparison.figure(run, metric, name) for run in runs]
        axes.barh(range(len(runs)), [np.nan if value is None else value for value in values], 0.7)
        axes.set_title(FIGURES[name], fontsize=10)
        axes.axvline(0, color="k", linewidth=0.6)
        _finish(axes, across="x")
    panels[0].set_yticks(range(len(runs)), [comparison.labels[run.name] for run in runs], fontsize=8, parse_math=False)
    panels[0].invert_yaxis()
    figure.suptitle(label(metric), fontsize=10)
    return figure


def draw_sensitivity(comparison: Comparison, metric: str) -> Figure:
    """Last over the one setting in which runs differ: a point a run, a line through the means of runs with the same value."""
    key = comparison.swept
    assert key is not None, "asked for only where there is one"
    figure = Figure(figsize=(5.4, 3.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = sensitivity(comparison, metric)
    axes.plot(*zip(*points, strict=True), "o", markersize=5) if points else None
    means = [(x, np.mean([y for _, y in same])) for x, same in groupby(points, key=lambda point: point[0])]
    axes.plot(*zip(*means, strict=True), color="tab:blue", linewidth=1.4) if means else None
    axes.set_xlabel(key, fontsize=9, parse_math=False)
    axes.set_ylabel(f"Last: {label(metric)}", fontsize=9)
    _finish(axes, across="both")
    return figure


def sensitivity(comparison: Comparison, metric: str) -> list[tuple[float, float]]:
    """(value of the setting, Last) of every run that has one, by value."""
    assert comparison.swept is not None, "asked for only where there is one"
    values = comparison.differing[comparison.swept]
    lasts = {run.name: comparison.figure(run, metric, "last") for run in comparison.runs}
    return sorted((values[name], last) for name, last in lasts.items() if last is not None)


def _finish(axes: Axes, across: str) -> None:
    axes.grid(alpha=0.25, axis=across)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
