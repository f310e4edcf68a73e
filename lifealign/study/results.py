"""What a finished cell left on disk, and whether cells may be compared at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lifealign.config import differences
from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook
from lifealign.runtime.files import read_json, read_json_lines
from lifealign.study.grid import Cell
from lifealign.study.runner import Record, is_finished, newest_state, read_record
from lifealign.study.statistics import is_learned

SELECTOR = "preference_accuracy"
"""The metric that says whether a task was learned."""

PAIR_VALUES = {
    "preference_accuracy": lambda margins: 100.0 * (margins > 0),
    "reward_margin": lambda margins: margins,
    "mean_log_sigmoid": lambda margins: -np.logaddexp(0.0, -margins),
}
"""Metrics that are means over pairs: the value of each pair, from its margin r."""


@dataclass(frozen=True)
class Result:
    """A finished cell."""

    cell: Cell
    record: Record
    settings: dict[str, Any]  # config.yaml
    data: dict[str, str]  # hash of the rows of each task
    book: ScoreBook

    @cached_property
    def predictions(self) -> list[dict[str, list[dict[str, Any]]]]:
        """Scored pairs by task, for each folder below ``tasks/``, in the order of training."""
        folders = sorted((self.cell.folder / "tasks").iterdir())
        return [_by_task(read_json_lines(folder / "predictions.jsonl")) for folder in folders]

    def margins(self, after: int, on: int) -> np.ndarray:
        """(pairs,) margins r of a task's held-out pairs after a row of the score matrix.

        A model that stays in use is scored once, so they stand in the newest folder up to that row that has any.
        """
        task = self.book.tasks[on]
        newest = next(scored for scored in reversed(self.predictions[: after + 1]) if task in scored)
        return np.array([row["margin"] for row in newest[task]])

    def pair_ids(self) -> list[list[str]]:
        """Ids of each task's held-out pairs."""
        last = len(self.book.tasks) - 1
        rows = [
            next(scored[task] for scored in reversed(self.predictions[: last + 1]) if task in scored)
            for task in self.book.tasks
        ]
        return [[str(row["id"]) for row in of_task] for of_task in rows]

    @cached_property
    def learned(self) -> list[bool]:
        """For each task but the last, whether its accuracy after its own training was above chance; empty where unknown."""
        if SELECTOR not in self.book.metrics or self.book.figures(SELECTOR)["bwt"] is None:
            return []
        matrix, counts = self.book.matrix(SELECTOR), [len(ids) for ids in self.pair_ids()]
        return [is_learned(float(matrix[j][j] or 0.0), counts[j]) for j in range(len(counts) - 1)]

    def bwt_learned(self, metric: str) -> float | None:
        """BWT over the tasks that were learned at all; None where none was, or nothing is known of it."""
        matrix = self.book.matrix(metric)
        changes = [matrix[-1][j] - matrix[j][j] for j, learned in enumerate(self.learned) if learned]  # type: ignore[operator]
        return float(np.mean(changes)) if changes else None

    def pair_parts(self, metric: str, figure: str) -> list[np.ndarray] | None:
        """A figure as a sum over tasks of means over pairs: (pairs,) a task. None where it is no such sum, or unknown."""
        if metric not in PAIR_VALUES or self.book.figures(metric).get(figure) is None:
            return None
        parts = [np.zeros(len(ids)) for ids in self.pair_ids()]
        for (after, on), weight in figure_weights(figure, len(parts)).items():
            parts[on] = parts[on] + weight * PAIR_VALUES[metric](self.margins(after, on))
        total = sum(part.mean() for part in parts)
        assert abs(total - self.book.figures(metric)[figure]) < 1e-6 * max(1.0, abs(total)), (self.cell, metric, figure)
        return parts


def _by_task(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    return dict(by_task)


def figure_weights(figure: str, tasks: int) -> dict[tuple[int, int], float]:
    """Weights w of the score matrix m with figure = Σ w[i, j] m[i][j]; (i, j) from 0 (docs/method.md, Scores)."""
    last = tasks - 1
    if figure == "last":
        return {(last, j): 1 / tasks for j in range(tasks)}
    if figure == "bwt":
        kept = {(last, j): 1 / last for j in range(last)}
        return kept | {(j, j): -1 / last for j in range(last)}
    assert figure == "ap", figure
    return {(k, j): 1 / (tasks * (k + 1)) for k in range(tasks) for j in range(k + 1)}


def read_results(cells: Sequence[Cell]) -> list[Result]:
    """The cells that have finished, in their order; those that share a folder each have a result."""
    return [_read(cell) for cell in cells if is_finished(cell)]


def _read(cell: Cell) -> Result:
    record = read_record(cell)
    assert record is not None
    settings = yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8"))
    book = ScoreBook.from_json(read_json(cell.folder / "scores.json"))
    return Result(cell, record, settings, newest_state(cell.folder)["data"], book)


def budget(result: Result) -> dict[str, Any]:
    """What must be the same in all cells of a table: rows, base, epochs, batch sizes."""
    sizes = ("epochs", "batch_size", "micro_batch_size", "gradient_accumulation_steps")
    stages = {stage: {key: result.settings[stage][key] for key in sizes} for stage in ("sft", "preference")}
    return {"data": result.data, "model": {"path": result.settings["model"]["path"]}, **stages}


def check_budget(results: Sequence[Result]) -> None:
    """Raises UserError where cells of one table were not trained on the same rows, base, epochs and batch sizes."""
    if not results:
        return
    first = results[0]
    for other in results[1:]:
        changed = differences(budget(first), budget(other))
        if changed:
            raise UserError(
                f"no table is made of unequal budgets: {_at(first.cell.folder)} and {_at(other.cell.folder)} differ in "
                f"{changed[0]}; run them again with the same settings, or in another study.dir"
            )


def _at(folder: Path) -> str:
    return "/".join(folder.parts[-4:])
