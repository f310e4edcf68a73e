"""The learning rate of each method, chosen from one small grid on rows of the first task that nothing else uses.

Short runs on the first task alone, a few a scale, are scored on the slice by both stages' losses together, NLL a token and
-log σ(r); the best scale multiplies both stages' learning rates in all cells of the method. Mean log σ(r) alone would choose
rates at which preferences sharpen at the cost of likelihood. A method may take over another's (``tuned_as``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lifealign.runtime.files import write_json
from lifealign.study.grid import Cell, Grid, Scales, composed, learning_rates, merged
from lifealign.study.record import has_ended, is_finished
from lifealign.study.results import read_result


@dataclass(frozen=True)
class Trial:
    """The short runs of a (method, regime), and the variants that share them."""

    place: tuple[str, str]
    variants: list[tuple[str, str]]
    rates: dict[float, list[str]]
    cells: dict[float, list[Cell]]  # by scale, one a seed


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
        rates[scale], cells[scale] = learning_rates(config, scale), []
        for seed in grid.tuning.seeds:
            folder = grid.options.runs_folder.joinpath("tuning", sequence, *place, f"scale_{scale:g}_seed{seed}")
            own = merged(overrides, [f"seed={seed}"], rates[scale])
            cells[scale].append(Cell(f"{sequence}, learning rate x {scale:g}", *place, seed, folder, own))
    return Trial(place, variants, rates, cells)


def scores(cells: Sequence[Cell]) -> dict[str, float | None]:
    """What the short runs of a rate scored on the slice, by metric, means over seeds; empty where one has not finished."""
    if not all(is_finished(cell) for cell in cells):
        return {}
    each = [read_result(cell).book for cell in cells]
    values = {name: [book.figures(name)["last"] for book in each] for name in each[0].metrics}
    return {name: None if None in of else math.fsum(of) / len(of) for name, of in values.items()}


def merit(of: Mapping[str, float | None]) -> float | None:
    """Mean log σ(r) less NLL a token, nats: the losses of both stages with their sign turned. None where one is unknown."""
    preference, nll = of.get("mean_log_sigmoid"), of.get("chosen_nll")
    return None if preference is None or nll is None else preference - nll


def best_scale(by_scale: dict[float, dict[str, float | None]]) -> float | None:
    """The scale of the highest merit, of equals the one nearest to 1; None where no run has a score."""
    known = {scale: value for scale, of in by_scale.items() if (value := merit(of)) is not None}
    return max(known, key=lambda scale: (known[scale], -abs(math.log(scale)))) if known else None


def choose(grid: Grid) -> Scales:
    """The scale of every variant, and ``tuning.json``; None where some of its short runs have not ended yet."""
    chosen: dict[tuple[str, str], float | None] = {}
    rows = []
    for trial in trials(grid):
        by_scale = {scale: scores(cells) for scale, cells in trial.cells.items()}
        ended = all(has_ended(cell) for cells in trial.cells.values() for cell in cells)
        best = best_scale(by_scale) if ended else None
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
