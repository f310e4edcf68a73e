"""The page a run leaves behind: heat maps, forgetting curves, samples, times and settings, in one file.

``index.html`` is self-contained: pictures are inlined, there is no script, and nothing is loaded from anywhere, so it
can be mailed, archived and printed. All text that comes from data or from a model is escaped by the template engine,
and a content policy in the page forbids the browser to load or run anything else.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lifealign.evaluation.figures import draw_forgetting, draw_heatmap, draw_probes, png
from lifealign.evaluation.scores import ScoreBook, closing_rows, metric_info, progress_note
from lifealign.evaluation.stability import stability
from lifealign.runtime.files import write_bytes


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
    probes: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``heatmap_METRIC.png``, ``forgetting_METRIC.png`` and ``index.html`` into ``folder``, replacing old ones.

    With probes, ``stability.png`` as well.

    Args:
        folder: made where it is missing. Each file is replaced as a whole: a reader never sees half of one.
        book: the scores so far; an unfinished run, or one without scores, gives a page too.
        domains: a line that describes each task, by task name; tasks without one are listed by name alone.
        config_yaml: the resolved configuration. Secrets must be masked already.
        timing: seconds by step.
        samples: generations to show, in the order given.
        consolidation: rows of a table on memory consolidation; the columns are the rows' keys as they first appear.
        versions: version by package.
        probes: scores of old tasks taken while new ones were learned, as ``metrics.jsonl`` holds them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for metric in book.metrics:
        plot = {"label": metric_info(metric).label}
        for kind, draw in (("heatmap", draw_heatmap), ("forgetting", draw_forgetting)):
            picture = png(draw(book, metric))
            write_bytes(folder / f"{kind}_{metric}.png", picture)
            plot[kind] = _inlined(picture)
        plots.append(plot)
    gap = stability(probes) if probes else None
    if gap is not None:
        picture = png(draw_probes(probes, gap["metric"]))
        write_bytes(folder / "stability.png", picture)
        gap["picture"] = _inlined(picture)

    page = _template().render(
        progress=progress_note(book),
        tasks=[(task, domains.get(task, "")) for task in book.tasks],
        rows=closing_rows(book),
        plots=plots,
        gap=gap,
        samples=samples,
        timing=[(step, _duration(seconds)) for step, seconds in timing.items()],
        consolidation=_table(consolidation),
        config_yaml=config_yaml,
        versions=versions,
    )
    # "replace": JSON may smuggle half a surrogate pair into a prompt, and a report must not fail over it.
    write_bytes(folder / "index.html", page.encode("utf-8", "replace"))


def _inlined(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


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
