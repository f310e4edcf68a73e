"""``launch/study.py``: tune, run the grid, write the table and the page; go on where an earlier call was ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lifealign.runtime.files import check_writable
from lifealign.runtime.lock import locked
from lifealign.runtime.terminal import console
from lifealign.study.grid import Grid
from lifealign.study.options import read_arguments
from lifealign.study.record import check_settings, is_finished
from lifealign.study.report import write_report
from lifealign.study.results import read_result
from lifealign.study.runner import BUSY, Runner
from lifealign.study.tuning import choose, trials


def study(arguments: Sequence[str], script: Path) -> int:
    """Run, or go on with, the study that the arguments ask for.

    Args:
        arguments: ``+study=NAME``, ``study.KEY=VALUE`` and overrides for every cell.
        script: launch/train.py.

    Returns:
        the exit code: 0 with all cells finished, 1 with some failed, 128 + N after signal N.

    Raises:
        UserError: before anything has started, for arguments that do not hold; or for cells that must not be compared.
    """
    options, passed = read_arguments(arguments)
    grid = Grid(options, passed)
    check_writable(options.folder, "study.dir")
    check_writable(options.runs_folder, "study.runs")
    with locked(options.runs_folder, BUSY) as lock:
        runner = Runner(script, options.parallel, lock, read_result)
        if not options.report_only:
            _run(grid, runner)
        check_settings([cell for trial in trials(grid) for cells in trial.cells.values() for cell in cells])
        scales = choose(grid)
        check_settings(grid.cells(scales))
        write_report(grid, scales, shlex.join(["python", "launch/study.py", *arguments]))
    finished = {cell.folder for cell in grid.cells(scales) if is_finished(cell)}
    planned = grid.planned(scales)
    console.print(f"{len(finished)} of {planned} cells finished; {options.folder / 'study.md'}, results.csv")
    if runner.signal is not None:
        return 128 + runner.signal
    return 0 if options.report_only or len(finished) == planned else 1


def _run(grid: Grid, runner: Runner) -> None:
    """The short runs that choose learning rates, then the cells whose rate is known."""
    short = [cell for trial in trials(grid) for cells in trial.cells.values() for cell in cells]
    if short:
        runner.run(short, "tuning")
    if runner.signal is None:
        runner.run(grid.cells(choose(grid)), grid.options.name)
