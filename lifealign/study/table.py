"""``results.csv``: every figure of every finished cell, a row each; and figures picked out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from lifealign.evaluation.scores import format_score, metric_info
from lifealign.study.grid import ANY
from lifealign.study.results import SELECTOR, TEXT_MEAN, Result
from lifealign.study.statistics import Interval

COLUMNS = ("study", "method", "regime", "sequence", "seed", "metric", "figure", "value")
LEARNED = "bwt_learned"
FIGURES = {"last": "Last", "bwt": "BWT", LEARNED: "BWT, learned tasks", "ap": "AP"}
COST, LOGS, STABILITY = "cost", "logs", "stability"
NO_SCORES = (COST, LOGS, STABILITY)

DASH = "–"


def tidy(study: str, results: Sequence[Result]) -> pd.DataFrame:
    """All rows of ``results.csv``; a figure that does not exist (BWT of joint training) has no value."""
    rows = [
        (study, r.cell.method, r.cell.regime, r.cell.sequence, r.cell.seed, *figure) for r in results for figure in figures(r)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": float})


def figures(result: Result) -> Iterator[tuple[str, str, float | None]]:
    """(metric, figure, value) of a cell."""
    for metric in [*result.book.metrics, *([TEXT_MEAN] if result.text_metrics else [])]:
        yield from ((metric, figure, result.value(metric, figure)) for figure in FIGURES)
    for name in result.book.metrics:
        for task, value in zip(result.book.tasks, result.book.matrix(name)[-1], strict=True):
            yield name, f"last:{task}", value
    yield SELECTOR, "tasks_learned", float(len(result.learned_tasks)) if result.learned else None
    yield COST, "wall_seconds", result.record.wall_seconds
    yield COST, "peak_memory_mib", result.record.peak_memory_mib
    yield COST, "steps", result.record.steps
    yield from ((LOGS, figure, value) for figure, value in result.logs.items())
    yield from ((STABILITY, figure, value) for figure, value in (result.stability or {}).items())


def of_table(frame: pd.DataFrame, sequence: str, regime: str) -> pd.DataFrame:
    """Rows of one table: those of a regime, and of the methods that regimes do not concern."""
    return frame[(frame.sequence == sequence) & frame.regime.isin([regime, ANY])]


def values(frame: pd.DataFrame, method: str, metric: str, figure: str) -> dict[int, float]:
    """A figure of a method by seed, where it exists."""
    picked = frame[(frame.method == method) & (frame.metric == metric) & (frame.figure == figure)].dropna(subset="value")
    return dict(zip(picked.seed.astype(int), picked.value.astype(float), strict=True))


def metrics(frame: pd.DataFrame) -> list[str]:
    """Metrics with scores, in the order in which they came."""
    return [name for name in frame.metric.unique() if name not in NO_SCORES]


def label(metric: str) -> str:
    """A metric's name with its unit and direction."""
    if metric == TEXT_MEAN:
        return "Mean of BLEU-4 over characters, ROUGE-L and, where scored, the judge (0–100)"
    info = metric_info(metric)
    return info.label if info.higher_is_better else f"{info.label} ↓"


def interval_text(interval: Interval | None, places: int, *, fewest_seeds: int = 1) -> str:
    """``1.20 [0.10, 2.30] †``; the mean alone where there is no interval, and no mark where it is of too few seeds."""
    if interval is None:
        return DASH
    mean, low, high = (format_score(value, places) for value in interval[:3])
    if interval.low is None:
        return mean
    marked = interval.excludes_zero and interval.seeds >= fewest_seeds
    return f"{mean} [{low}, {high}]{' †' if marked else ''}"


def decimals(metric: str) -> int:
    """Two for percentages and scores up to 100, four for nats: small models move them little."""
    return 4 if "nats" in metric_info(metric).unit else 2
