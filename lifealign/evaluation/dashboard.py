"""What a run's sinks are shown after each task: the score matrix, how scores have moved, and how the objective weighs pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lifealign.evaluation.figures import draw_heatmap, png
from lifealign.evaluation.scores import ScoreBook
from lifealign.objectives.components import FPO, Objective
from lifealign.runtime.tracking import Tracker


def show_task(tracker: Tracker, book: ScoreBook, objective: Objective, predictions: Sequence[Mapping[str, Any]]) -> None:
    """What there is to see once a task is trained and scored; nothing where nobody looks. Rank 0 shows it.

    Args:
        predictions: rows of the task's ``predictions.jsonl``.
    """
    if not tracker.shows:
        return
    for number, metric in enumerate(book.metrics):
        is_last = len(book.matrix(metric)) == len(book.tasks)
        _show_scores(tracker, book, metric, picture=number == 0 or is_last)
    if isinstance(objective, FPO):
        _show_weights(tracker, objective, predictions)


def _show_scores(tracker: Tracker, book: ScoreBook, metric: str, *, picture: bool) -> None:
    """The matrix as a table, and its last row with Last, BWT and AP as points over the tasks trained.

    Drawing takes a tenth of a second and more, so a ``picture`` is not made of every metric after every task.
    """
    matrix = book.matrix(metric)
    if picture:
        tracker.picture(f"heatmap/{metric}", png(draw_heatmap(book, metric)))
    rows = [[task, *row] for task, row in zip(book.tasks, matrix, strict=False)]
    tracker.table(f"scores/{metric}", ["after training through", *book.tasks], rows)
    last = dict(zip(book.tasks, matrix[-1], strict=True)) | book.figures(metric)
    tracker.curves(len(matrix), {f"scores/{metric}/{name}": value for name, value in last.items() if value is not None})


def _show_weights(tracker: Tracker, objective: FPO, predictions: Sequence[Mapping[str, Any]]) -> None:
    """The focal weights that the held-out pairs of each task would have; rows without a reward margin are passed over."""
    margins: dict[str, list[float]] = {}
    for row in predictions:
        if row.get("margin") is not None:
            margins.setdefault(row["task"], []).append(row["margin"])
    for task, values in margins.items():
        tracker.histogram(f"focal_weight/{task}", focal_weights(objective, values))


def focal_weights(objective: FPO, margins: Sequence[float]) -> list[float]:
    """The weights of pairs of these reward margins; 0 where a pair is gated."""
    policy = torch.tensor([[margin / objective.beta, 0.0] for margin in margins], dtype=torch.float64)
    return objective(policy, torch.zeros_like(policy), torch.ones_like(policy, dtype=torch.int64)).weights.tolist()
