"""The cells of one table, method against method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lifealign.study.grid import ANY, Grid
from lifealign.study.results import PAIR_VALUES, Result
from lifealign.study.statistics import Interval, Summary, bootstrap, summarise
from lifealign.study.table import of_table, values


@dataclass(frozen=True)
class Table:
    """The finished cells of a sequence in a regime, with those of methods that regimes do not concern."""

    sequence: str
    regime: str
    frame: pd.DataFrame
    results: dict[tuple[str, int], Result]  # by method and seed
    owners: Mapping[str, str] = field(default_factory=dict)  # of tasks that are met again: whose held-out rows they have

    def summary(self, method: str, metric: str, figure: str) -> Summary | None:
        """A figure over seeds; None where no cell has it."""
        known = values(self.frame, method, metric, figure)
        return summarise(list(known.values())) if known else None

    def difference(self, ours: str, theirs: str, metric: str, figure: str) -> Interval | None:
        """Ours minus theirs over the seeds that both have, paired; None where there is none.

        Seeds are drawn anew, and held-out pairs where the metric has a value for each. BWT over learned tasks is taken over
        those that both learned.
        """
        by_seed = []
        for seed in sorted({seed for _, seed in self.results}):
            if (ours, seed) in self.results and (theirs, seed) in self.results:
                parts = self._parts(self.results[ours, seed], self.results[theirs, seed], metric, figure)
                by_seed += [] if parts is None else [parts]
        return bootstrap([np.stack(task) for task in zip(*by_seed, strict=True)]) if by_seed else None

    def _parts(self, a: Result, b: Result, metric: str, figure: str) -> list[np.ndarray] | None:
        """A difference as a sum of means: for each task what each held-out pair adds to it, or one number in all."""
        both = [task for task in a.learned_tasks if task in b.learned_tasks]
        first, second = a.value(metric, figure, both), b.value(metric, figure, both)
        if first is None or second is None:
            return None
        if metric not in PAIR_VALUES:
            return [np.array([first - second])]
        assert a.rows == b.rows, "the same rows in all cells of a table: check_budget has seen to it"
        parts_a, parts_b = a.parts(metric, figure, both), b.parts(metric, figure, both)
        if parts_a is None or parts_b is None:
            return None
        of_rows: dict[str, np.ndarray] = {}
        for task, x, y in zip(a.book.tasks, parts_a, parts_b, strict=True):
            owner = self.owners.get(task, task)
            of_rows[owner] = of_rows.get(owner, 0.0) + (x - y)
        return list(of_rows.values())


def tables(grid: Grid, frame: pd.DataFrame, results: Iterable[Result]) -> list[Table]:
    """A table for each sequence and regime; one for each sequence where regimes concern no method."""
    found, kept = [], list(results)
    regimes = list(grid.regimes) if any(regime != ANY for _, regime in grid.variants()) else [ANY]
    for sequence in grid.options.sequences:
        config = next(config for (of, *_), config in grid.configs.items() if of == sequence)
        owners = {str(task): source.of for task, source in config.sequence.sources.items() if source.of is not None}
        for regime in regimes:
            inside = [r for r in kept if r.cell.sequence == sequence and r.cell.regime in (regime, ANY)]
            by_cell = {(r.cell.method, r.cell.seed): r for r in inside}
            found.append(Table(sequence, regime, of_table(frame, sequence, regime), by_cell, owners))
    return found
