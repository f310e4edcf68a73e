"""From the cells that have finished to ``results.csv``, pictures and ``study.md``."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lifealign.assets import SIX_DOMAINS
from lifealign.config import build, load_run
from lifealign.data.cues import cue_accuracies
from lifealign.data.tasks import Task, load_tasks, seen_prompts
from lifealign.evaluation.figures import png
from lifealign.models.loading import load_tokenizer
from lifealign.runtime.files import read_json, write_bytes, write_json, write_text
from lifealign.study.compare import Table, tables
from lifealign.study.figures import draw_methods, draw_sweep
from lifealign.study.grid import Cell, Grid, Scales
from lifealign.study.page import Facts, page
from lifealign.study.record import read_record
from lifealign.study.results import Result, check_budget, read_results
from lifealign.study.runner import last_line
from lifealign.study.table import metrics, tidy


def write_report(grid: Grid, scales: Scales, command: str) -> None:
    """Write everything that is made of finished cells, few or many, into the study's folder.

    Raises:
        UserError: with ``results.csv`` written and no page, where cells of a table had unequal budgets.
    """
    folder, cells = grid.options.folder, grid.cells(scales)
    results = read_results(cells)
    frame = tidy(grid.options.name, results)
    write_text(folder / "results.csv", frame.to_csv(index=False))
    found = tables(grid, frame, results)
    for table in found:
        check_budget(list(table.results.values()))
    facts = Facts(
        command=command,
        origins=_origins(results),
        finished=len({result.cell.folder for result in results}),
        planned=grid.planned(scales),
        troubles=[*_failed(cells), *_untuned(scales)],
    )
    tuning = read_json(folder / "tuning.json") if grid.tuning is not None else []
    tasks: dict[str, dict[str, Any]] = {}
    for sequence in grid.options.sequences:
        of_sequence = [result for result in results if result.cell.sequence == sequence]
        tasks |= {task["task"]: task for task in _tasks(folder, of_sequence)}
    write_text(folder / "study.md", page(grid, facts, found, tuning, list(tasks.values()), _pictures(grid, found)))


def _pictures(grid: Grid, found: Sequence[Table]) -> list[str]:
    """Draw what there is to draw; the names of the files."""
    names: list[str] = []
    for sequence in grid.options.sequences:
        with_cells = [table for table in found if table.sequence == sequence and table.results]
        for metric in metrics(with_cells[0].frame) if with_cells else ():
            drawn = {f"methods_{sequence}_{metric}.png": draw_methods(grid, with_cells, metric)}
            for name, sweep in grid.options.sweeps.items():
                if (figure := draw_sweep(grid, with_cells, name, sweep, metric)) is not None:
                    drawn[f"{name}_{sequence}_{metric}.png"] = figure
            for name, figure in drawn.items():
                write_bytes(grid.options.folder / name, png(figure))
            names += drawn
    kinds = ("methods", *grid.options.sweeps)
    for stale in (path for kind in kinds for path in grid.options.folder.glob(f"{kind}_*.png") if path.name not in names):
        stale.unlink()  # of cells that are no longer asked for
    return names


def _origins(results: Sequence[Result]) -> list[str]:
    """What code ran the finished cells, when, on what machine and from what base: a line for each of these."""
    records = [result.record for result in results]
    found = sorted({(record.date, record.commit, record.machine) for record in records if record.commit})
    return [*(f"Commit {commit}, {date}, {machine}" for date, commit, machine in found), *_bases(results)]


def _bases(results: Sequence[Result]) -> Iterator[str]:
    """Where seeds start from bases of their own, which these are."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for result in results:
        if result.budget["model"]["hash"]:
            seeds[result.budget["model"]["hash"]].add(result.cell.seed)
    if len({frozenset(of_base) for of_base in seeds.values()}) > 1:
        for base, of_base in sorted(seeds.items(), key=lambda item: sorted(item[1])):
            yield f"Base {base[:12]} in the cells of seeds {', '.join(map(str, sorted(of_base)))}"


def _failed(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in {cell.folder: cell for cell in cells}.values():
        record = read_record(cell)
        if record is not None and record.exit_code is not None and record.exit_code != 0:
            yield f"{cell.name}: exit code {record.exit_code}: `{last_line(cell)}`"


def _untuned(scales: Scales) -> Iterator[str]:
    for (method, regime), scale in scales.items():
        if scale is None:
            yield f"{method}, {regime}: no learning rate chosen, since its short runs have not all ended, or all diverged"


def _tasks(folder: Path, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Sizes of a sequence's tasks and accuracies of trivial cues; kept under a hash of the rows, since loading them takes time.

    What is not kept yet is made from a cell whose folder is there; where all are gone there is nothing to say.
    """
    kept = folder / "tasks.json"
    known: dict[str, Any] = read_json(kept) if kept.exists() else {}
    for result in results:
        digest = hashlib.sha256(json.dumps(result.budget["data"], sort_keys=True).encode()).hexdigest()
        if digest not in known and result.cell.folder.exists():
            config = build(load_run(result.cell.folder))
            tasks = load_tasks(config.sequence, config.data, load_tokenizer(config.model), SIX_DOMAINS)
            if {task.name: task.data_hash for task in tasks} != result.budget["data"]:
                continue  # other rows stand there now
            known[digest] = [_task(task, seen) for task, seen in zip(tasks, seen_prompts(tasks), strict=True)]
            write_json(kept, known)
        if digest in known:
            return known[digest]
    return []


def _task(task: Task, seen: int) -> dict[str, Any]:
    sizes = {"train": len(task.train), "held_out": len(task.test), "seen_prompts": seen}
    return {"task": task.name, **sizes, "cues": cue_accuracies(task.test)}
