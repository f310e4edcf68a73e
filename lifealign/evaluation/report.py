"""The page a run leaves behind: heat maps, forgetting curves, samples, times and settings, in one file.

``index.html`` is self-contained: pictures are inlined, there is no script, and nothing is loaded from anywhere, so it
can be mailed, archived and printed. All text that comes from data or from a model is escaped by the template engine,
and a content policy in the page forbids the browser to load or run anything else.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from lifealign.evaluation.scores import (
    MetricInfo,
    ScoreBook,
    closing_rows,
    format_score,
    metric_info,
    progress_note,
)

_DPI = 110
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Sample:
    """One generation to show: the prompt of ``task``, answered after training through the task named ``after``."""

    task: str
    after: str
    prompt: str
    prediction: str
    reference: str


def write_report(
    folder: Path,
    book: ScoreBook,
    *,
    domains: Mapping[str, str],
    config_yaml: str,
    timing: Mapping[str, float],
    samples: Sequence[Sample],
    consolidation: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Write ``heatmap_METRIC.png``, ``forgetting_METRIC.png`` and ``index.html`` into ``folder``, replacing old ones.

    Args:
        folder: made where it is missing. Each file is replaced as a whole: a reader never sees half of one.
        book: the scores so far; an unfinished run, or one without scores, gives a page too.
        domains: a line that describes each task, by task name; tasks without one are listed by name alone.
        config_yaml: the resolved configuration. Secrets must be masked already.
        timing: seconds by step.
        samples: generations to show, in the order given.
        consolidation: rows of a table on memory consolidation; the columns are the rows' keys as they first appear.
        versions: version by package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for metric in book.metrics:
        plot = {"label": metric_info(metric).label}
        for kind, draw in (("heatmap", draw_heatmap), ("forgetting", draw_forgetting)):
            png = _png(draw(book, metric))
            _replace(folder / f"{kind}_{metric}.png", png)
            plot[kind] = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        plots.append(plot)

    page = _template().render(
        progress=progress_note(book),
        tasks=[(task, domains.get(task, "")) for task in book.tasks],
        rows=closing_rows(book),
        plots=plots,
        samples=samples,
        timing=[(step, _duration(seconds)) for step, seconds in timing.items()],
        consolidation=_table(consolidation),
        config_yaml=config_yaml,
        versions=versions,
    )
    # "replace": JSON may smuggle half a surrogate pair into a prompt, and a report must not fail over it.
    _replace(folder / "index.html", page.encode("utf-8", "replace"))


def draw_heatmap(book: ScoreBook, metric: str) -> Figure:
    """The score matrix as a picture: a row for each step of training, a column for each task; None is left blank."""
    info, cells = metric_info(metric), _array(book, metric)
    rows, columns = cells.shape
    figure, axes = _figure(width=max(4.5, 2.6 + 0.72 * columns), height=1.7 + 0.5 * rows)
    colours, norm = _colours(cells, info)
    decimals = _decimals(cells)
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(j, i, format_score(value, decimals), ha="center", va="center", fontsize=9, color="w" if dark else "k")
    _label_tasks(axes, book.tasks, axis="x", title="score on")
    _label_tasks(axes, book.tasks[:rows], axis="y", title="after training through")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the program's name and version the same scores give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("lifealign.evaluation").joinpath("report.html").read_text(encoding="utf-8"))


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Heads and text cells of rows that may lack some of the keys."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return {"heads": heads, "rows": [[_cell(row.get(head)) for head in heads] for row in rows]}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """``12.3 s`` under a minute, else ``h:mm:ss``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _replace(path: Path, content: bytes) -> None:
    """Write beside the file, then put in its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
