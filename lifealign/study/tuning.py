"""The learning rate of each method, chosen from one small grid on rows of the first task that nothing else uses.

Short runs on the first task alone, one a scale, are scored by mean log σ(r) on the slice; the best scale multiplies both
stages' learning rates in all cells of the method. A method may take over another's (``tuned_as``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lifealign.runtime.files import read_json, write_json
from lifealign.study.grid import TUNING_METRICS, Cell, Grid, Scales, composed, learning_rates, merged
from lifealign.study.runner import is_finished, read_record

CRITERION = TUNING_METRICS[0]


@dataclass(frozen=True)
class Trial:
    """The short runs of a (method, regime), a cell a scale, and the variants that share them."""

    place: tuple[str, str]
    variants: list[tuple[str, str]]
    rates: dict[float, list[str]]
    cells: dict[float, Cell]


def trials(grid: Grid) -> list[Trial]:
    """What is to be run before the study itself; nothing where tuning is switched off."""
    if grid.tuning is None:
        return []
    sharing: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for variant in grid.variants():
        sharing.setdefault(grid.tuning_place(*variant), []).append(variant)
    return [_trial(grid, place, variants) for place, variants in sharing.items()]


def _trial(grid: Grid, place: tuple[str, str], variants: list[tuple[str, str]]) -> Trial:
    assert grid.tuning is not None and grid.tuning.scales is not None
    overrides = grid.tuning_overrides(*place)
    config, sequence = composed(overrides), grid.options.sequences[0]
    rates, cells = {}, {}
    for scale in grid.tuning.scales:
        rates[scale] = learning_rates(config, scale)
        folder = grid.options.runs_folder.joinpath("tuning", sequence, *place, f"scale_{scale:g}")
        cells[scale] = Cell(f"{sequence}, learning rate x {scale:g}", *place, 0, folder, merged(overrides, rates[scale]))
    return Trial(place, variants, rates, cells)


def scores(cell: Cell) -> dict[str, float | None]:
    """What a short run scored on the slice, by metric; empty where it has not finished."""
    if not is_finished(cell):
        return {}
    return {name: entry["last"] for name, entry in read_json(cell.folder / "scores.json")["metrics"].items()}


def best_scale(by_scale: dict[float, dict[str, float | None]]) -> float | None:
    """The scale with the highest mean log σ(r), of equals the one nearest to 1; None where no run has a score."""
    known = {scale: value for scale, of in by_scale.items() if (value := of.get(CRITERION)) is not None}
    return max(known, key=lambda scale: (known[scale], -abs(math.log(scale)))) if known else None


def choose(grid: Grid) -> Scales:
    """The scale of every variant, and ``tuning.json``; None where some of its short runs have not ended yet."""
    chosen: dict[tuple[str, str], float | None] = {}
    rows = []
    for trial in trials(grid):
        by_scale = {scale: scores(cell) for scale, cell in trial.cells.items()}
        best = best_scale(by_scale) if all(_has_ended(cell) for cell in trial.cells.values()) else None
        chosen |= dict.fromkeys(trial.variants, best)
        rows.append(
            {
                "method": trial.place[0],
                "regime": trial.place[1],
                "variants": [list(variant) for variant in trial.variants],
                "scores": {f"{scale:g}": of for scale, of in by_scale.items()},
                "rates": {f"{scale:g}": rates for scale, rates in trial.rates.items()},
                "chosen": best,
            }
        )
    if rows:
        write_json(grid.options.folder / "tuning.json", rows)
    return chosen


def _has_ended(cell: Cell) -> bool:
    """Whether a run has come to its end, or to one that another attempt will not change: a loss that is no number."""
    record = read_record(cell)
    return record is not None and record.exit_code is not None and record.exit_code >= 0
