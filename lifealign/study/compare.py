"""The cells of one table, method against method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

    def summary(self, method: str, metric: str, figure: str) -> Summary | None:
        """A figure over seeds; None where no cell has it."""
        known = values(self.frame, method, metric, figure)
        return summarise(list(known.values())) if known else None

    def difference(self, ours: str, theirs: str, metric: str, figure: str) -> Interval | None:
        """Ours minus theirs over the seeds that both have, paired; None where there is none.

        Seeds are drawn anew, and held-out pairs where the metric has a value for each.
        """
        first, second = (values(self.frame, method, metric, figure) for method in (ours, theirs))
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return None
        if metric in PAIR_VALUES and figure in ("last", "bwt", "ap"):
            return bootstrap(self._pair_differences(ours, theirs, metric, figure, seeds))
        return bootstrap([np.array([[first[seed] - second[seed]] for seed in seeds])])

    def _pair_differences(self, ours: str, theirs: str, metric: str, figure: str, seeds: Sequence[int]) -> list[np.ndarray]:
        """For each task (seeds, pairs): what each held-out pair adds to the difference."""
        by_seed = []
        for seed in seeds:
            a, b = self.results[ours, seed], self.results[theirs, seed]
            assert a.rows == b.rows, "the same rows in all cells of a table: check_budget has seen to it"
            parts_a, parts_b = a.pair_parts(metric, figure), b.pair_parts(metric, figure)
            assert parts_a is not None and parts_b is not None  # both have the figure
            by_seed.append([x - y for x, y in zip(parts_a, parts_b, strict=True)])
        return [np.stack(task) for task in zip(*by_seed, strict=True)]


def tables(grid: Grid, frame: pd.DataFrame, results: Iterable[Result]) -> list[Table]:
    """A table for each sequence and regime; one for each sequence where regimes concern no method."""
    found, kept = [], list(results)
    regimes = list(grid.regimes) if any(regime != ANY for _, regime in grid.variants()) else [ANY]
    for sequence in grid.options.sequences:
        for regime in regimes:
            inside = [r for r in kept if r.cell.sequence == sequence and r.cell.regime in (regime, ANY)]
            by_cell = {(r.cell.method, r.cell.seed): r for r in inside}
            found.append(Table(sequence, regime, of_table(frame, sequence, regime), by_cell))
    return found
