"""What a finished cell came to: its scores, the margins behind them, what it was given; and which cells may be compared."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lifealign.config import differences
from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook
from lifealign.run import consolidation_summary
from lifealign.runtime.files import numbered_folders, read_json, read_json_lines
from lifealign.study.grid import Cell
from lifealign.study.record import Record, is_finished, keep, newest_state, read_kept, read_kept_tensors, read_record
from lifealign.study.statistics import is_learned

SELECTOR = "preference_accuracy"
"""The metric that says whether a task was learned."""

TEXT_MEAN, IN_TEXT_MEAN = "text_mean", ("bleu4_char", "rouge_l", "judge")
"""The paper's tables hold the mean of these three; ours of those that were scored."""

PAIR_VALUES = {
    "preference_accuracy": lambda margins: 100.0 * (margins > 0),
    "reward_margin": lambda margins: margins,
    "mean_log_sigmoid": lambda margins: -np.logaddexp(0.0, -margins),
}
"""Metrics that are means over pairs: the value of each pair, from its margin r."""


SLMC_FIGURES = {
    "kept rank": "kept_rank",
    "kept energy": "kept_energy",
    "share in the span of history": "history_share",
    "refined norm / update norm": "norm_ratio",
}
STEP_FIGURES = ("gated_share", "focal_weight")

Predictions = list[dict[str, list[dict[str, Any]]]]
"""What the models of a run said of held-out pairs: for each model that was scored, in the order of training, rows by task."""


@dataclass(frozen=True)
class Result:
    """A finished cell, by what tables are made of. No texts are in it.

    Args:
        budget: what must be the same in all cells of a table.
        logs: what consolidation and the objective did, in the mean over stages and steps.
        stability: the worst and the last score on old tasks while others were learned; None where nobody looked.
        rows: for each task a hash of its held-out pairs' ids.
        scored: (pairs,) margins r by task, for each model that was scored, in the order of training.
    """

    cell: Cell
    record: Record
    budget: dict[str, Any]
    book: ScoreBook
    logs: dict[str, float] = field(default_factory=dict)
    stability: dict[str, float] | None = None
    rows: dict[str, str] = field(default_factory=dict)
    scored: Sequence[Mapping[str, np.ndarray]] = ()

    def margins(self, after: int, on: int) -> np.ndarray:
        """(pairs,) margins r of a task's held-out pairs after a row of the score matrix.

        A model that stays in use is scored once, so its margins are those of the newest model up to that row that has any.
        """
        task = self.book.tasks[on]
        return next(scored[task] for scored in reversed(self.scored[: after + 1]) if task in scored)

    @cached_property
    def learned(self) -> list[bool]:
        """For each task but the last, whether its accuracy after its own training was above chance; empty where unknown."""
        if SELECTOR not in self.book.metrics or self.book.figures(SELECTOR)["bwt"] is None:
            return []
        matrix, last = self.book.matrix(SELECTOR), len(self.book.tasks) - 1
        return [is_learned(float(matrix[j][j] or 0.0), len(self.margins(last, j))) for j in range(last)]

    def value(self, metric: str, figure: str, among: Sequence[int] | None = None) -> float | None:
        """Last, BWT or AP of a metric, or ``bwt_learned``, BWT over the tasks that were learned at all; None where unknown.

        Args:
            among: numbers of the tasks that ``bwt_learned`` is over; None: those that this cell learned.
        """
        if metric == TEXT_MEAN:
            found = [self.value(name, figure, among) for name in self.text_metrics]
            return None if not found or None in found else float(np.mean(found))  # type: ignore[arg-type]
        if metric not in self.book.metrics:
            return None
        if figure != "bwt_learned":
            return self.book.figures(metric)[figure]
        among = self.learned_tasks if among is None else among
        matrix = self.book.matrix(metric)
        changes = [(matrix[-1][j], matrix[j][j]) for j in among]
        if not changes or any(value is None for pair in changes for value in pair):
            return None
        return float(np.mean([end - start for end, start in changes]))  # type: ignore[operator]

    @property
    def text_metrics(self) -> list[str]:
        """Those that ``text_mean`` is the mean of."""
        return [name for name in IN_TEXT_MEAN if name in self.book.metrics]

    @property
    def learned_tasks(self) -> list[int]:
        return [task for task, learned in enumerate(self.learned) if learned]

    def parts(self, metric: str, figure: str, among: Sequence[int] | None = None) -> list[np.ndarray] | None:
        """A figure as a sum over tasks of means over pairs: (pairs,) a task. None where it is no such sum, or unknown.

        Args:
            among: as in :meth:`value`.
        """
        known = self.value(metric, figure, among)
        if metric not in PAIR_VALUES or known is None:
            return None
        tasks = len(self.book.tasks)
        parts = [np.zeros(len(self.margins(tasks - 1, task))) for task in range(tasks)]
        for (after, on), weight in figure_weights(figure, tasks, self.learned_tasks if among is None else among).items():
            margins = self.margins(after, on).astype(np.float64)
            if not np.isfinite(margins).all():  # the policy overflowed on a pair
                return None
            parts[on] = parts[on] + weight * PAIR_VALUES[metric](margins)
        total, size = sum(part.mean() for part in parts), sum(np.abs(part).mean() for part in parts)
        assert abs(total - known) < 1e-6 * max(1.0, size), (self.cell, metric, figure)
        return parts


def figure_weights(figure: str, tasks: int, learned: Sequence[int] = ()) -> dict[tuple[int, int], float]:
    """Weights w of the score matrix m with figure = Σ w[i, j] m[i][j]; (i, j) from 0 (docs/method.md, Scores)."""
    last = tasks - 1
    if figure == "last":
        return {(last, j): 1 / tasks for j in range(tasks)}
    if figure in ("bwt", "bwt_learned"):
        over = range(last) if figure == "bwt" else learned
        kept = {(last, j): 1 / len(over) for j in over}
        return kept | {(j, j): -1 / len(over) for j in over}
    assert figure == "ap", figure
    return {(k, j): 1 / (tasks * (k + 1)) for k in range(tasks) for j in range(k + 1)}


def read_results(cells: Sequence[Cell]) -> list[Result]:
    """The cells that have finished, in their order; those that share a folder each have a result."""
    return [read_result(cell) for cell in cells if is_finished(cell)]


def read_result(cell: Cell) -> Result:
    """What was kept of a finished cell, which is written now if it was not."""
    if not cell.kept.exists():
        ended = read_record(cell)
        assert ended is not None
        write_result(result_of_run(cell, ended))
    record, facts = read_kept(cell)
    scored: defaultdict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for name, margins in read_kept_tensors(cell).items():
        model, _, task = name.partition("/")
        scored[int(model)][task] = margins
    return Result(
        cell,
        record,
        facts["budget"],
        ScoreBook.from_json(facts["scores"]),
        facts["logs"],
        facts["stability"],
        facts["rows"],
        [scored[model] for model in range(max(scored, default=-1) + 1)],
    )


def write_result(result: Result) -> None:
    facts = {
        "budget": result.budget,
        "scores": {"tasks": result.book.tasks, "metrics": {m: {"matrix": result.book.matrix(m)} for m in result.book.metrics}},
        "logs": result.logs,
        "stability": result.stability,
        "rows": result.rows,
    }
    tensors = {f"{model}/{task}": of for model, scored in enumerate(result.scored) for task, of in scored.items()}
    keep(result.cell, result.record, facts, tensors)


def result_of_run(cell: Cell, record: Record) -> Result:
    """What the run in a cell's folder came to.

    Raises:
        UserError: where its checkpoints, which hold the hashes of its rows, are gone.
    """
    settings = yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8"))
    predictions, state, gap = read_predictions(cell.folder), newest_state(cell), cell.folder / "stability.json"
    if not state:
        raise UserError(f"{cell.folder} has finished and its checkpoints are gone; remove it, and the cell is run again")
    return Result(
        cell,
        record,
        _budget(settings, state),
        ScoreBook.from_json(read_json(cell.folder / "scores.json")),
        _logged(cell.folder),
        {figure: read_json(gap)[figure] for figure in ("worst", "end", "gap")} if gap.exists() else None,
        rows_of(predictions),
        margins_of(predictions),
    )


def read_predictions(folder: Path) -> Predictions:
    """Of a run; empty where it kept none."""
    found: Predictions = []
    for path in (task / "predictions.jsonl" for task in numbered_folders(folder / "tasks")):
        if not path.exists():
            continue
        by_task = defaultdict(list)
        for row in read_json_lines(path):
            by_task[row["task"]].append(row)
        found.append(dict(by_task))
    return found


def margins_of(predictions: Predictions) -> list[dict[str, np.ndarray]]:
    """By task, for each model; of tasks that were scored by margins."""
    return [
        {task: np.array([row["margin"] for row in rows], dtype=np.float32) for task, rows in of.items() if "margin" in rows[0]}
        for of in predictions
    ]


def rows_of(predictions: Predictions) -> dict[str, str]:
    """For each task a hash of the ids of its held-out pairs."""
    ids = {task: [str(row["id"]) for row in rows] for of in predictions for task, rows in of.items()}
    return {task: hashlib.sha256(json.dumps(own).encode()).hexdigest() for task, own in ids.items()}


def _logged(folder: Path) -> dict[str, float]:
    """The first update has no past, so it is left out of the share in the span of history."""
    entries, found = consolidation_summary(folder), {}
    for shown, figure in SLMC_FIGURES.items():
        values = [entry[shown] for entry in (entries[1:] if figure == "history_share" else entries)]
        if values:
            found[figure] = float(np.mean(values))
    path = folder / "metrics.jsonl"
    steps = [row for row in read_json_lines(path) if row["kind"] == "step"] if path.exists() else []
    for figure in STEP_FIGURES:
        values = [row[figure] for row in steps if row.get(figure) is not None]
        if values:
            found[figure] = float(np.mean(values))
    return found


def _budget(settings: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Rows, limits on tokens and answers, base, adapter, epochs, batch sizes. The hash of the base is known where reference
    log-probabilities are cached."""
    sizes = ("epochs", "batch_size", "micro_batch_size", "gradient_accumulation_steps")
    stages = {stage: {key: settings[stage][key] for key in sizes} for stage in ("sft", "preference")}
    base = {"path": settings["model"]["path"], "hash": state.get("base")}
    limits = {key: settings["data"][key] for key in ("max_prompt_tokens", "max_response_tokens")}
    answers = {key: settings["evaluation"][key] for key in ("max_generations", "max_new_tokens")}
    lora = settings["model"]["lora"]
    return {"data": state["data"], "limits": limits, "answers": answers, "model": base, "lora": lora, **stages}


def check_budget(results: Sequence[Result]) -> None:
    """Raises UserError where cells of one table were not trained on the same rows, epochs and batch sizes, from the same base.

    Seeds may have bases of their own: cells are compared seed by seed. Tasks, and what is asked of them, are common to all.
    """
    of_seed: dict[int, Result] = {}
    for other in results:
        first, same_seed = results[0], of_seed.setdefault(other.cell.seed, other)
        for one, changed in (
            (same_seed, _base_differs(same_seed, other)),
            (first, differences(*_without_base(first, other))),
        ):
            if changed:
                raise UserError(
                    f"no table is made of unequal budgets: {_at(one.cell.folder)} and {_at(other.cell.folder)} differ in "
                    f"{changed[0]}; run them again with the same settings, or in another study.dir"
                )


def _without_base(*results: Result) -> list[dict[str, Any]]:
    """Budgets without the base, each in what is known of all: an earlier version kept less of a cell."""
    keys = set.intersection(*(set(result.budget) for result in results)) - {"model"}
    return [{key: result.budget[key] for key in keys} for result in results]


def _base_differs(one: Result, other: Result) -> list[str]:
    """Bases are told apart by their hashes where both are known."""
    first, second = ({"model": result.budget["model"]} for result in (one, other))
    known = None not in (first["model"]["hash"], second["model"]["hash"])
    return [change for change in differences(first, second) if known or not change.startswith("model.hash")]


def _at(folder: Path) -> str:
    return "/".join(folder.parts[-4:])
