"""The score matrix and what the paper reads from it: Last, BWT and AP. Pure: no torch, no file, no clock.

``m[i][j]`` is the score on task j after training through task i, counted from 0. LifeAlign (AAAI 2026, arXiv
2509.17183) reports three figures of it; backward transfer is that of Lopez-Paz & Ranzato (2017, arXiv 1706.08840).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is read: its title, its direction, and the unit its values carry ("" for a bare number)."""

    title: str
    higher_is_better: bool = True
    unit: str = ""

    @property
    def label(self) -> str:
        """The title with the unit, where there is one: ``Preference accuracy (%)``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


METRICS: dict[str, MetricInfo] = {
    "preference_accuracy": MetricInfo("Preference accuracy", unit="%"),
    "reward_margin": MetricInfo("Reward margin", unit="nats"),
    "mean_log_sigmoid": MetricInfo("Mean log σ(r)", unit="nats"),
    "chosen_nll": MetricInfo("Chosen NLL", higher_is_better=False, unit="nats/token"),
    "bleu4_char": MetricInfo("BLEU-4, characters", unit="0–100"),
    "sacrebleu": MetricInfo("sacreBLEU", unit="0–100"),
    "rouge_l": MetricInfo("ROUGE-L", unit="0–100"),
    "judge": MetricInfo("LLM judge", unit="10–100"),
}


def metric_info(name: str) -> MetricInfo:
    """The entry of ``METRICS``; a metric not listed there goes by its own name and is taken as better when higher."""
    return METRICS.get(name) or MetricInfo(name)


def continual_metrics(matrix: Matrix) -> dict[str, float | None]:
    """Last, BWT and AP of a score matrix, in the unit of the scores.

    With N rows counted from 1, as in the paper::

        Last = 1/N · Σ_j m[N][j]
        BWT  = 1/(N−1) · Σ_{j<N} (m[N][j] − m[j][j])
        AP   = 1/N · Σ_k 1/k · Σ_{j≤k} m[k][j]

    Args:
        matrix: N rows; row i (from 0) has i+1 or N entries. Those with j > i (forward transfer) are ignored, whatever
            they hold, ``None`` and NaN included.

    Returns:
        ``{"last": …, "bwt": …, "ap": …}``. With a single task there is nothing to look back on: ``bwt`` is ``None``.

    Raises:
        ValueError: no rows, a row of another length, or an entry with j <= i that is not a finite number.
    """
    if len(matrix) == 0:
        raise ValueError("the score matrix has no rows")
    rows = _lower_triangle(matrix)
    gap = _first_gap(rows)
    if gap is not None:
        i, j = gap
        raise ValueError(f"matrix[{i}][{j}] is {rows[i][j]!r}: every score on a task already trained must be finite")
    final, before = rows[-1], len(rows) - 1
    return {
        "last": _mean(final),
        "bwt": _mean([final[j] - rows[j][j] for j in range(before)]) if before else None,
        "ap": _mean([_mean(row) for row in rows]),
    }


def _lower_triangle(matrix: Matrix) -> list[list[Any]]:
    """Row i cut to its first i+1 entries; ``ValueError`` where a row has neither i+1 nor N entries."""
    count = len(matrix)
    for i, row in enumerate(matrix):
        if len(row) not in (i + 1, count):
            raise ValueError(f"matrix[{i}] has {len(row)} entries; a row {i} of {count} has {i + 1} or {count}")
    return [list(row[: i + 1]) for i, row in enumerate(matrix)]


def _first_gap(rows: Matrix) -> tuple[int, int] | None:
    """The first cell that holds no finite number, or ``None`` where all do."""
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is None or not math.isfinite(value):
                return i, j
    return None


def _mean(values: Sequence[Any]) -> float:
    return math.fsum(values) / len(values)


@dataclass
class ScoreBook:
    """Every score of a run, by metric, in the order in which the metrics were first recorded.

    ``tasks`` are all N tasks of the sequence in the order of training, whether reached yet or not.
    """

    tasks: list[str]
    _cells: dict[str, dict[tuple[int, int], float | None]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics recorded so far."""
        return list(self._cells)

    def record(self, metric: str, after: int, on: int, value: float | None) -> None:
        """Note the score on task ``on`` after training through task ``after`` (both from 0). A later note replaces it.

        A value that is not finite (a run that diverged) is kept as ``None``: it is no score, and JSON has no NaN.

        Raises:
            ValueError: a task outside the sequence, or a metric name that could not be part of a file's name.
        """
        if not metric.isidentifier():
            raise ValueError(f"metric {metric!r}: a name holds letters, digits and underscores only")
        for name, index in (("after", after), ("on", on)):
            if not 0 <= index < len(self.tasks):
                raise ValueError(f"{name}={index} is not a task: the sequence has {len(self.tasks)}, counted from 0")
        finite = value is not None and math.isfinite(value)
        self._cells.setdefault(metric, {})[after, on] = float(value) if finite else None  # type: ignore[arg-type]

    def record_rows(self, metric: str, rows: Sequence[int], on: int, value: float | None) -> None:
        """Note one score in several rows: a model that stays in use is scored once."""
        for row in rows:
            self.record(metric, row, on, value)

    def matrix(self, metric: str) -> list[list[float | None]]:
        """The scores as (rows recorded so far, N); ``None`` where there is none. ``KeyError`` for an unknown metric."""
        cells = self._cells[metric]
        rows = 1 + max((after for after, _ in cells), default=-1)
        return [[cells.get((after, on)) for on in range(len(self.tasks))] for after in range(rows)]

    def figures(self, metric: str) -> dict[str, float | None]:
        """``continual_metrics`` over the tasks seen so far.

        Where an earlier score is missing (joint training has a last row and nothing before) only ``last`` is given;
        where the last row has a gap, nothing is.
        """
        matrix = self.matrix(metric)
        seen = [row[: len(matrix)] for row in matrix]
        if seen and _first_gap(_lower_triangle(seen)) is None:
            return continual_metrics(seen)
        complete = bool(seen) and _first_gap(seen[-1:]) is None
        return {"last": _mean(seen[-1]) if complete else None, "bwt": None, "ap": None}

    def to_json(self, strategy: str, objective: str, seed: int) -> dict[str, Any]:
        """What ``scores.json`` holds: only lists, dicts, strings, finite numbers and ``None``."""
        metrics = {name: {"matrix": self.matrix(name), **self.figures(name)} for name in self.metrics}
        return {
            "tasks": list(self.tasks),
            "metrics": metrics,
            "strategy": strategy,
            "objective": objective,
            "seed": seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoreBook:
        """The book that ``to_json`` wrote. The figures are not read: they follow from the matrices.

        Raises:
            ValueError: a key is missing, or a matrix does not fit the tasks, or holds what is no score.
        """
        for key in ("tasks", "metrics"):
            if not isinstance(data, Mapping) or key not in data:
                raise ValueError(f"scores: key {key!r} is missing")
        try:
            book = cls([str(task) for task in data["tasks"]])
            for metric, entry in data["metrics"].items():
                book._read_matrix(metric, entry["matrix"])
        except (TypeError, AttributeError, KeyError, OverflowError) as error:
            raise ValueError(f"scores: not what a run writes ({error})") from error
        return book

    def extended(self, tasks: Sequence[str]) -> ScoreBook:
        """The same scores in a book of a longer sequence.

        Raises:
            ValueError: where ``tasks`` does not begin with the tasks of this book.
        """
        if list(tasks[: len(self.tasks)]) != self.tasks:
            raise ValueError(f"the sequence {list(tasks)} does not begin with {self.tasks}")
        return ScoreBook(list(tasks), {metric: dict(cells) for metric, cells in self._cells.items()})

    def _read_matrix(self, metric: str, matrix: Matrix) -> None:
        self._cells[metric] = {}
        for after, row in enumerate(matrix):
            if len(row) != len(self.tasks):
                raise ValueError(f"scores: {metric} row {after} has {len(row)} entries for {len(self.tasks)} tasks")
            for on, value in enumerate(row):
                self.record(metric, after, on, value)


def progress_note(book: ScoreBook) -> str:
    """How far the run behind the figures has come: ``all 6 tasks`` or ``the first 4 of 6 tasks``."""
    seen = max((len(book.matrix(name)) for name in book.metrics), default=0)
    total = len(book.tasks)
    return f"all {total} tasks" if seen == total else f"the first {seen} of {total} tasks"


def closing_rows(book: ScoreBook) -> list[tuple[str, str, str, str]]:
    """The closing table as text, one row a metric: label, Last, BWT, AP; ↓ marks metrics that are better when lower."""
    rows = []
    for name in book.metrics:
        info, figures = metric_info(name), book.figures(name)
        label = info.label if info.higher_is_better else f"{info.label} ↓"
        last, bwt, ap = (format_score(figures[key]) for key in ("last", "bwt", "ap"))
        rows.append((label, last, bwt, ap))
    return rows


def format_score(value: float | None, decimals: int = 2) -> str:
    """A fixed number of decimals, never ``-0.00``; an en dash where there is no score."""
    return "–" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"


def closing_table(book: ScoreBook) -> Table:
    """The table a run closes with: one row a metric, Last, BWT and AP. It says the same without colour."""
    table = Table(
        title=f"Scores over {progress_note(book)}",
        caption="↓ lower is better: a positive BWT is then forgetting",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Metric", no_wrap=True)
    for heading in ("Last", "BWT", "AP"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in closing_rows(book):
        table.add_row(*row)
    return table
