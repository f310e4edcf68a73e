"""The page a run leaves behind: scores, forgetting, memory, answers that changed, data, times and settings, in one file.

``index.html`` is self-contained: pictures are inlined, there is no script, and nothing is loaded from anywhere, so it
can be mailed, archived and printed. All text that comes from data or from a model is escaped by the template engine,
and a content policy in the page forbids the browser to load or run anything else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lifealign.evaluation.figures import (
    draw_forgetting,
    draw_heatmap,
    draw_layers,
    draw_probes,
    draw_singular_values,
    png,
    score_array,
)
from lifealign.evaluation.heat import score_scale, shaded, share_scale
from lifealign.evaluation.samples import Change
from lifealign.evaluation.scores import MetricInfo, ScoreBook, closing_rows, metric_info, progress_note
from lifealign.evaluation.stability import stability
from lifealign.memory.contributions import Summary, by_layer, summarise
from lifealign.runtime.files import write_bytes

LAYER_FIGURES: dict[str, tuple[str, Callable[[Summary], float | None], bool]] = {
    "kept_rank": ("Singular directions kept, mean over the factors of a layer", lambda summary: summary.kept_rank, False),
    "conflict": ("Share of a layer's update in the span of earlier ones", lambda summary: summary.history_share, True),
}
"""What is shown of each layer and stage: its title, where it is found, and whether it is a share of a whole."""

Row = Mapping[str, Any]


def write_report(
    folder: Path,
    book: ScoreBook,
    *,
    data: Sequence[Row],
    config_yaml: str,
    timing: Mapping[str, float],
    changes: Sequence[Change],
    consolidation: Sequence[Row],
    versions: Mapping[str, str],
    memory: Sequence[Row] = (),
    probes: Sequence[Row] = (),
) -> None:
    """Write ``index.html`` into ``folder``, and its pictures beside it, replacing old ones.

    ``heatmap_METRIC.png`` and ``forgetting_METRIC.png``; with a memory ``memory_kept_rank.png``, ``memory_conflict_share.png``
    and ``memory_values_ENTRY.png``; with probes ``stability.png``.

    Args:
        folder: made where it is missing. Each file is replaced as a whole: a reader never sees half of one.
        book: the scores so far; an unfinished run, or one without scores, gives a page too.
        data: rows of a table on the tasks' data, a task each; the columns are the rows' keys as they first appear.
        config_yaml: the resolved configuration. Secrets must be masked already.
        timing: seconds by step, those of the whole run as ``total``.
        changes: answers to show, in the order given.
        consolidation: rows of a table on memory consolidation, likewise.
        versions: version by package.
        memory: entries of the ledger; those that were not consolidated are passed over.
        probes: scores of old tasks taken while new ones were learned, as ``metrics.jsonl`` holds them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gap = stability(probes)
    if gap is not None:
        gap["picture"] = _picture(folder / "stability.png", draw_probes(probes, gap["metric"]))
    page = _template().render(
        progress=progress_note(book),
        rows=closing_rows(book),
        plots=[_plot(folder, book, metric) for metric in book.metrics],
        gap=gap,
        consolidation=_table(consolidation),
        memory=_memory(folder, [entry for entry in memory if entry["consolidated"]]),
        steps=_by_step(changes),
        data=_table(data),
        timing=[(step, _duration(seconds)) for step, seconds in timing.items()],
        config_yaml=config_yaml,
        versions=versions,
    )
    # "replace": JSON may smuggle half a surrogate pair into a prompt, and a report must not fail over it.
    write_bytes(folder / "index.html", page.encode("utf-8", "replace"))


def _plot(folder: Path, book: ScoreBook, metric: str) -> dict[str, Any]:
    """A metric's heat map, as a table and as a file, and its forgetting curves."""
    info, cells = metric_info(metric), score_array(book, metric)
    write_bytes(folder / f"heatmap_{metric}.png", png(draw_heatmap(book, metric)))
    names = [f"{number} {task}" for number, task in enumerate(book.tasks[: len(cells)], start=1)]
    return {
        "label": info.label if info.higher_is_better else f"{info.label} ↓",
        "columns": range(1, len(book.tasks) + 1),
        "rows": list(zip(names, shaded(cells, score_scale(cells, info)), strict=True)),
        "forgetting": _picture(folder / f"forgetting_{metric}.png", draw_forgetting(book, metric)),
    }


def _memory(folder: Path, entries: Sequence[Row]) -> dict[str, Any]:
    """What consolidation did to each layer, and the spectra of what each stage changed; empty without entries."""
    if not entries:
        return {}
    stages = [f"{entry['task']} {entry['stage']}" for entry in entries]
    summaries = [{layer: summarise(own) for layer, own in by_layer(entry["factors"]).items()} for entry in entries]
    layers, tables = list(summaries[0]), []
    for name, (title, figure_of, share) in LAYER_FIGURES.items():
        cells = np.array([[figure_of(found[layer]) for found in summaries] for layer in layers], dtype=np.float64)
        picture = f"memory_{name}_share.png" if share else f"memory_{name}.png"
        write_bytes(folder / picture, png(draw_layers(cells, layers, stages, title=title, share=share)))
        scale = share_scale() if share else score_scale(cells, MetricInfo(title))
        tables.append({"title": title, "rows": list(zip(layers, shaded(cells, scale, 2 if share else 1), strict=True))})
    spectra = [
        (stage, _picture(folder / f"memory_values_{entry['name']}.png", draw_singular_values(_in_order(entry), stage)))
        for stage, entry in zip(stages, entries, strict=True)
    ]
    return {"stages": stages, "tables": tables, "spectra": spectra}


def _in_order(entry: Row) -> list[dict[str, Any]]:
    """The records of an entry's factors, by layer."""
    return [record for records in by_layer(entry["factors"]).values() for record in records]


def _by_step(changes: Sequence[Change]) -> list[tuple[str, list[tuple[Change, Any, Any]]]]:
    """The changes of each step of training, each with its two answers marked up; a task that comes again is a new step."""
    steps: list[tuple[str, list[tuple[Change, Any, Any]]]] = []
    for change in changes:
        if not steps or steps[-1][0] != change.trained:
            steps.append((change.trained, []))
        steps[-1][1].append((change, *change.marked()))
    return steps


def _picture(path: Path, figure: Figure) -> str:
    """Write a picture, and give it as an address that holds it."""
    content = png(figure)
    write_bytes(path, content)
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("lifealign.evaluation").joinpath("report.html").read_text(encoding="utf-8"))


def _table(rows: Sequence[Row]) -> dict[str, list[Any]]:
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
