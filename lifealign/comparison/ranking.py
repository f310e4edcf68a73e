"""What is said of runs that may be compared: where they differ, how they rank, and their paired differences. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lifealign.comparison.runs import SEED, LeftOut, Run
from lifealign.config import that_matter
from lifealign.evaluation.scores import metric_info
from lifealign.study.compare import Table
from lifealign.study.grid import ANY
from lifealign.study.statistics import Interval, places

FIGURES = {"last": "Last", "bwt": "BWT", "ap": "AP"}

LABELLED = 3
"""A run is called by the settings in which it differs where there are no more of them than this, and else by its folder."""

ABSENT = "–"
"""In the place of the value of a setting that a run does not have, such as an option of another strategy."""


@dataclass(frozen=True)
class Comparison:
    """Runs over the same tasks and held-out rows.

    Args:
        runs: at least one.
        left_out: runs that take no part.
        against: name of the run that differences are taken to; None: the one that ranks first.
    """

    runs: Sequence[Run]
    left_out: Sequence[LeftOut] = ()
    against: str | None = None

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics that any run has, in the order in which they come."""
        return list(dict.fromkeys(metric for run in self.runs for metric in run.result.book.metrics))

    @cached_property
    def ranked(self) -> list[Run]:
        """Best first: by Last of the first metric that all runs have; among equal ones, by the next. Bounds come last."""
        shared = [m for m in self.metrics if all(m in run.result.book.metrics for run in self.runs)]

        def merit(run: Run) -> list[float]:
            signs = {metric: 1.0 if metric_info(metric).higher_is_better else -1.0 for metric in shared}
            lasts = {metric: self.figure(run, metric, "last") for metric in shared}
            return [float("-inf") if lasts[m] is None else signs[m] * lasts[m] for m in shared]  # type: ignore[operator]

        return sorted(self.runs, key=lambda run: (not is_bound(run), merit(run)), reverse=True)

    @cached_property
    def first(self) -> Run:
        """The run that differences are taken to."""
        return next((run for run in self.runs if run.name == self.against), self.ranked[0])

    def figure(self, run: Run, metric: str, figure: str) -> float | None:
        """Last, BWT or AP; None where the run has none."""
        book = run.result.book
        return book.figures(metric)[figure] if metric in book.metrics else None

    def places(self, metric: str, figure: str) -> dict[str, int]:
        """1 and 2 by the name of the best and second best runs, bounds left out."""
        known = {run.name: self.figure(run, metric, figure) for run in self.runs if not is_bound(run)}
        values = {name: value for name, value in known.items() if value is not None}
        return places(values, higher_is_better=metric_info(metric).higher_is_better)

    def difference(self, run: Run, metric: str, figure: str) -> Interval | None:
        """A run minus the first, over the held-out pairs that both were scored on; None where either has no such figure."""
        if any(self.figure(either, metric, figure) is None for either in (run, self.first)):
            return None
        return self._table.difference(run.name, self.first.name, metric, figure)

    @cached_property
    def paired(self) -> bool:
        """Whether the runs kept what they said of each held-out pair."""
        return self.runs[0].rows is not None

    @cached_property
    def _table(self) -> Table:
        rows = [
            (run.name, SEED, metric, figure, self.figure(run, metric, figure))
            for run in self.runs
            for metric in self.metrics
            for figure in FIGURES
        ]
        frame = pd.DataFrame(rows, columns=["method", "seed", "metric", "figure", "value"]).astype({"value": float})
        results = {(run.name, SEED): run.result for run in self.runs}
        sources = self.runs[0].settings.get("sequence", {}).get("sources", {})
        owners = {task: source["of"] for task, source in sources.items() if source.get("of") is not None}
        return Table(self.runs[0].result.cell.sequence, ANY, frame, results, owners)

    @cached_property
    def differing(self) -> dict[str, dict[str, Any]]:
        """Settings in which runs differ: each run's value by its name."""
        return _unequal({run.name: _flat(run.settings) for run in self.runs})

    @cached_property
    def other_rows(self) -> dict[str, dict[str, Any]]:
        """Tasks of which runs saw other training rows, as the held-out ones are the same: hashes by the names of runs."""
        return _unequal(
            {run.name: {task: digest[:8] for task, digest in run.result.budget["data"].items()} for run in self.runs}
        )

    @cached_property
    def labels(self) -> dict[str, str]:
        """What runs are called, by name: where they differ in little, that; and their name where this tells them not apart."""
        keys = list(self.differing)
        short = {key: key.rpartition(".")[2] for key in keys}
        names = {key: short[key] if list(short.values()).count(short[key]) == 1 else key for key in keys}
        made = {
            run.name: ", ".join(f"{names[key]}={written(self.differing[key][run.name])}" for key in keys) for run in self.runs
        }
        told_apart = 0 < len(keys) <= LABELLED and len(set(made.values())) == len(made)
        return made if told_apart else {run.name: run.name for run in self.runs}

    @cached_property
    def swept(self) -> str | None:
        """The one setting, other than the seed, in which runs differ, where all its values are numbers."""
        keys = [key for key in self.differing if key != "seed"]
        numeric = len(keys) == 1 and all(_is_number(value) for value in self.differing[keys[0]].values())
        return keys[0] if numeric else None

    def tidy(self) -> pd.DataFrame:
        """``comparison.csv``: a row for each figure of each run, with the settings in which runs differ."""
        rows = []
        for run in self.ranked:
            own = {"run": run.name, **{key: _cell(row[run.name]) for key, row in self.differing.items()}}
            for metric in run.result.book.metrics:
                found = {figure: self.figure(run, metric, figure) for figure in FIGURES}
                found |= {f"last:{t}": v for t, v in zip(run.tasks, run.result.book.matrix(metric)[-1], strict=True)}
                rows += [{**own, "metric": metric, "figure": figure, "value": value} for figure, value in found.items()]
        return pd.DataFrame(rows)


def is_bound(run: Run) -> bool:
    """Whether a run is no sequence of tasks, but a model a task (STL) or all tasks at once (MTL): of what it cannot forget it
    is not the best."""
    return run.settings.get("strategy", {}).get("name") in ("stl", "mtl")


def _unequal(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of several tables with the same keys, or nearly, the rows in which they differ."""
    keys = dict.fromkeys(key for values in tables.values() for key in values)
    rows = {key: {name: values.get(key, ABSENT) for name, values in tables.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({json.dumps(value) for value in row.values()}) > 1}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that say what a run computes."""
    return {str(key): value for key, value in pd.json_normalize(that_matter(settings)).to_dict("records")[0].items()}


def _cell(value: Any) -> Any:
    """A setting's value in a column of a table: numbers stay numbers, what a run does not have is left blank."""
    return None if value == ABSENT else value if _is_number(value) else written(value)


def written(value: Any) -> str:
    """A setting's value as a command line would have it, fractions with six digits."""
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
