"""``study.md``: what was run, and its tables and figures, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lifealign.evaluation.scores import format_score, metric_info
from lifealign.study.compare import Table
from lifealign.study.grid import ANY, Grid
from lifealign.study.paper import TABLES
from lifealign.study.results import SELECTOR, SLMC_FIGURES, STEP_FIGURES
from lifealign.study.statistics import Summary, places
from lifealign.study.table import (
    COST,
    DASH,
    FIGURES,
    LEARNED,
    LOGS,
    STABILITY,
    decimals,
    interval_text,
    label,
    metrics,
)
from lifealign.study.tuning import merit

GAPS = {"worst": "Worst accuracy since learned (%)", "end": "Last looked at (%)", "gap": "Gap"}
COSTS = {"wall_seconds": "Wall clock (s)", "peak_memory_mib": "Peak memory (MiB)", "steps": "Optimiser steps"}

HOW_TO_READ = """\
Cells are mean ± standard deviation over seeds, with the standard error in brackets; **bold** is the best mean of a column and
*italics* the second best, upper bounds and rows without a figure left out. ↓: lower is better, and a positive BWT is then
forgetting. *BWT, learned tasks* is over the tasks whose accuracy after their own training was above 50 % by a one-sided
binomial test at 5 % in that cell, *Learned* in number. So each row is over tasks of its own and has no rank, and it is a little
low: an accuracy that was above chance by luck falls back without any forgetting. Differences are over the tasks that both
learned. For accuracy, mean log σ(r) and margin, differences come with 95 % bootstrap intervals, paired: seeds are drawn anew,
and the held-out pairs within each task; what seeds add is widened as Student's t has it for so few. For other metrics only
seeds could be drawn, so there is an interval where there are five or more. † marks those that exclude 0; with as many
differences as there are here, some do by chance. Of a single seed an interval is over held-out pairs alone, and nothing is
marked. Methods that a buffer does not concern stand in every regime's table with the same cells. Wall clock includes start-up
and evaluation, with the number of cells at once given above."""


@dataclass(frozen=True)
class Facts:
    """What the top of the page says of the study."""

    command: str
    origins: Sequence[str]  # a line for each code, day and machine that cells ran on
    finished: int
    planned: int
    troubles: Sequence[str]  # a line for each cell that failed, or could not be run


def page(
    grid: Grid,
    facts: Facts,
    found: Sequence[Table],
    tuning: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
) -> str:
    """The whole page.

    Args:
        found: a table for each sequence and regime; those without finished cells are left out.
        tuning: rows of ``tuning.json``.
        tasks: for each its name, its numbers of pairs and what trivial cues score on the held-out ones, in percent.
        figures: names of picture files beside the page.
    """
    parts = [f"# {grid.options.title}", *_top(grid, facts), HOW_TO_READ, *(f"![{name}]({name})" for name in figures)]
    for table in found:
        if table.results:
            parts += _section(grid, table)
    parts += [*_tuning(grid, tuning), *_tasks(tasks)]
    return "\n\n".join(parts) + "\n"


def _top(grid: Grid, facts: Facts) -> Iterator[str]:
    yield f"```sh\n{facts.command}\n```"
    yield "\n".join(
        (
            *(f"- {origin}" for origin in facts.origins),
            f"- {grid.options.parallel} cells at once",
            f"- Text metrics: {_generation(grid)}",
            f"- **{facts.finished} of {facts.planned} cells finished**; seeds {', '.join(map(str, grid.options.seeds))}",
        )
    )
    if facts.troubles:
        head = "Not finished; the next call tries all but those again that diverged (exit code 3):"
        yield "\n".join([head, "", *(f"- {line}" for line in facts.troubles)])


def _generation(grid: Grid) -> str:
    options = next(iter(grid.configs.values())).evaluation
    prompts = "all prompts" if options.max_generations is None else f"the first {options.max_generations} prompts"
    return f"answers to {prompts} of a task, cut at {options.max_new_tokens} tokens, beside whole references"


def _section(grid: Grid, table: Table) -> Iterator[str]:
    regime = "" if table.regime in (ANY, "default") else f", regime `{table.regime}`"
    yield f"## `{table.sequence}`{regime}"
    for metric in metrics(table.frame):
        yield f"### {label(metric)}"
        yield _scores(grid, table, metric)
        if grid.options.compared in _present(grid, table):
            yield _differences(grid, table, metric)
    yield from _beside_the_paper(grid, table)
    if STABILITY in set(table.frame.metric):
        yield "### Old tasks while a new one is learned"
        yield _means(grid, table, STABILITY, GAPS, 2)
    yield "### Cost"
    yield _means(grid, table, COST, COSTS, 0)
    logs = _means(grid, table, LOGS, {figure: shown for shown, figure in SLMC_FIGURES.items()} | _steps(), 3)
    yield from ["### What consolidation and the objective did", logs] if LOGS in set(table.frame.metric) else []


def _steps() -> dict[str, str]:
    return {figure: figure.replace("_", " ") for figure in STEP_FIGURES}


def _present(grid: Grid, table: Table) -> list[str]:
    """Labels of the methods with finished cells, in the study's order."""
    have = {method for method, _ in table.results}
    return [method for method in grid.methods if method in have]


def _shown(grid: Grid, method: str) -> str:
    return grid.options.methods[method].shown or method


def _scores(grid: Grid, table: Table, metric: str) -> str:
    """Figures of every method for one metric."""
    methods, higher = _present(grid, table), metric_info(metric).higher_is_better
    columns = []
    for figure in FIGURES:
        summaries = {method: table.summary(method, metric, figure) for method in methods}
        ranked = {m: s.mean for m, s in summaries.items() if s is not None and grid.options.methods[m].ranked}
        order = places({} if figure == LEARNED else ranked, higher_is_better=higher)  # each is over tasks of its own
        columns.append([_marked(_spread(summaries[method], decimals(metric)), order.get(method)) for method in methods])
    learned = [_mean(table.summary(method, SELECTOR, "tasks_learned"), 1) for method in methods]
    seeds = [str(sum(of == method for of, _ in table.results)) for method in methods]
    rows = zip([_shown(grid, method) for method in methods], *columns, learned, seeds, strict=True)
    return markdown(["Method", *FIGURES.values(), "Learned", "Seeds"], rows)


def _spread(summary: Summary | None, places: int) -> str:
    if summary is None:
        return DASH
    mean, deviation, error = (format_score(value, places) for value in summary[:3])
    return mean if summary.seeds == 1 else f"{mean} ± {deviation} ({error})"


def _mean(summary: Summary | None, places: int) -> str:
    return format_score(summary.mean if summary else None, places)


def _marked(text: str, place: int | None) -> str:
    return {1: f"**{text}**", 2: f"*{text}*"}.get(place or 0, text)


def _differences(grid: Grid, table: Table, metric: str) -> str:
    """The compared method minus each other one."""
    ours = grid.options.compared
    assert ours is not None
    rows = []
    for theirs in _present(grid, table):
        if theirs != ours:
            intervals = [table.difference(ours, theirs, metric, figure) for figure in FIGURES]
            # Of a single seed an interval knows of held-out pairs alone, which says nothing of a method.
            cells = [interval_text(interval, decimals(metric), fewest_seeds=2) for interval in intervals]
            rows.append([_shown(grid, theirs), *cells])
    return markdown([f"{_shown(grid, ours)} minus", *FIGURES.values()], rows) if rows else ""


def _beside_the_paper(grid: Grid, table: Table) -> Iterator[str]:
    paper = TABLES.get(grid.options.paper or "")
    if paper is None or paper.metric not in set(table.frame.metric):
        return
    rows = []
    for method in _present(grid, table):
        ours = [_spread(table.summary(method, paper.metric, figure), 2) for figure in ("last", "bwt", "ap")]
        theirs = [format_score(paper.rows.get(method, {}).get(figure)) for figure in ("last", "bwt", "ap")]
        rows.append([_shown(grid, method), *(cell for both in zip(ours, theirs, strict=True) for cell in both)])
    heads = [f"{name}, {whose}" for name in ("Last", "BWT", "AP") for whose in ("ours", "paper")]
    yield "### Beside the paper"
    yield f"Ours: {label(paper.metric).lower()}. The paper's: {paper.caption} Only signs and orders can be compared."
    yield markdown(["Method", *heads], rows)


def _means(grid: Grid, table: Table, metric: str, heads: Mapping[str, str], decimals: int) -> str:
    """Means over seeds of figures without ranks."""
    rows = []
    for method in _present(grid, table):
        summaries = [table.summary(method, metric, figure) for figure in heads]
        rows.append([_shown(grid, method), *(_mean(summary, decimals) for summary in summaries)])
    return markdown(["Method", *heads.values()], rows)


def _tuning(grid: Grid, tuning: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not tuning or grid.tuning is None:
        return
    yield "## Learning rates"
    yield (
        f"Both stages' learning rates times one factor, chosen per method by mean log σ(r) less NLL a token on "
        f"{grid.tuning.pairs} training rows of `{grid.tuning_task}` that nothing else uses, after training on the rest of that "
        f"task alone; means over "
        f"seeds {', '.join(map(str, grid.tuning.seeds))}. \\*: at the edge of the grid, beyond which another might be better."
    )
    scales = list(tuning[0]["scores"])
    edges = min(scales, key=float), max(scales, key=float)  # the columns stand in the order that was given
    rows = []
    for row in tuning:
        tuned = f"{row['method']} ({row['regime']})" if row["regime"] != ANY else row["method"]
        taken = ", ".join(dict.fromkeys(method for method, _ in row["variants"]))
        best = DASH if row["chosen"] is None else f"{row['chosen']:g}"
        best += " \\*" if best in edges else ""
        rows.append([tuned, *(format_score(merit(row["scores"][s]), 4) for s in scales), best, taken])
    yield markdown(["Tuned", *(f"× {scale}" for scale in scales), "Chosen", "Taken by"], rows)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not tasks:
        return
    cues = list(tasks[0]["cues"])
    yield "## Tasks and trivial cues"
    yield "What a surface feature alone scores on the held-out pairs, in percent; where it is far from 50 there is a short cut."
    rows = []
    for task in tasks:
        scores = [format_score(task["cues"][cue], 1) for cue in cues]
        sizes = [str(task.get(size, DASH)) for size in ("train", "held_out", "seen_prompts")]
        rows.append([task["task"], *sizes, *scores])
    heads = ["Training pairs", "Held-out pairs", "Of them with a prompt of training"]
    yield markdown(["Task", *heads, *(cue.replace("_", " ") for cue in cues)], rows)


def markdown(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
