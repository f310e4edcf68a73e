"""Pictures of a study. Pure functions to matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from lifealign.study.compare import Table
from lifealign.study.grid import ANY, Grid
from lifealign.study.options import SweepOptions
from lifealign.study.table import label

SHOWN = {"last": "Last", "bwt": "BWT"}
_MARKERS = "osD^vP*X"


def draw_methods(grid: Grid, tables: Sequence[Table], metric: str) -> Figure:
    """Last and BWT of every method, a bar a regime, with standard deviations over seeds."""
    methods = [method for method in grid.methods if not _is_swept(grid, method)]
    figure, panels = _panels(width=max(5.0, 1.2 + 0.25 * len(methods) * (len(tables) + 1)))
    for axes, (name, title) in zip(panels, SHOWN.items(), strict=True):
        for number, table in enumerate(tables):
            means, deviations = _series(table, methods, metric, name)
            places = np.arange(len(methods)) + (number - (len(tables) - 1) / 2) * 0.8 / len(tables)
            axes.bar(places, means, 0.8 / len(tables), yerr=deviations, capsize=2, label=table.regime)
        names = [grid.options.methods[method].shown or method for method in methods]
        axes.set_xticks(range(len(methods)), names, rotation=35, ha="right", fontsize=8, parse_math=False)
        _finish(axes, title, metric)
    _legend(panels[-1], len(tables))
    return figure


def draw_sweep(grid: Grid, tables: Sequence[Table], name: str, sweep: SweepOptions, metric: str) -> Figure | None:
    """Last and BWT over the values of one option, a line a regime, with standard deviations over seeds.

    The method that is varied stands at its own value. None where fewer than two values were run.
    """
    shown = ["null" if value is None else str(value) for value in sweep.values]
    lines = [[_ran(grid, table, name, sweep, value) for value in sweep.values] for table in tables]
    kept = [i for i in range(len(shown)) if any(line[i] for line in lines)]
    if len(kept) < 2:
        return None
    figure, panels = _panels(width=8.0)
    for axes, (figure_name, title) in zip(panels, SHOWN.items(), strict=True):
        for table, line, marker in zip(tables, lines, _MARKERS, strict=False):
            means, deviations = _series(table, [line[i] for i in kept], metric, figure_name)
            axes.errorbar(range(len(kept)), means, yerr=deviations, marker=marker, capsize=2, label=table.regime)
        axes.set_xticks(range(len(kept)), [shown[i] for i in kept], fontsize=8)
        axes.set_xlabel(sweep.shown or name, fontsize=9)
        _finish(axes, title, metric)
    _legend(panels[-1], len(tables))
    return figure


def _ran(grid: Grid, table: Table, name: str, sweep: SweepOptions, value: Any) -> str | None:
    """Label of the method that ran with this value of an option in a table's regime; None where none did."""
    have = {method for method, _ in table.results}
    label = f"{name}_{'null' if value is None else value}"
    if label in have or sweep.method not in have:
        return label if label in have else None
    places = ((table.sequence, sweep.method, regime) for regime in (table.regime, ANY))
    own = OmegaConf.select(next(grid.configs[place] for place in places if place in grid.configs), sweep.key)
    return sweep.method if own == value else None


def _is_swept(grid: Grid, method: str) -> bool:
    return any(method.startswith(f"{name}_") for name in grid.options.sweeps)


def _series(table: Table, methods: Sequence[str | None], metric: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, (methods,) each; NaN where there is no score, or one seed and so no deviation."""
    summaries = [None if method is None else table.summary(method, metric, figure) for method in methods]
    means = [np.nan if summary is None else summary.mean for summary in summaries]
    deviations = [np.nan if summary is None or summary.deviation is None else summary.deviation for summary in summaries]
    return np.array(means), np.array(deviations)


def _panels(width: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(2 * width if width < 8 else width, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, len(SHOWN), squeeze=False)[0]


def _finish(axes: Axes, title: str, metric: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label(metric), fontsize=9)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="k", linewidth=0.6) if title == "BWT" else None


def _legend(axes: Axes, lines: int) -> None:
    if lines > 1:
        axes.legend(title="regime", frameon=False, fontsize=8)
