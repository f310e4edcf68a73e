"""From the cells that have finished to ``results.csv``, pictures and ``study.md``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from lifealign.assets import SIX_DOMAINS
from lifealign.config import build, load_run
from lifealign.data.cues import cue_accuracies
from lifealign.data.tasks import Task, load_tasks
from lifealign.evaluation.figures import png
from lifealign.models.loading import load_tokenizer
from lifealign.runtime.files import read_json, write_bytes, write_json, write_text
from lifealign.study.compare import Table, tables
from lifealign.study.figures import draw_methods, draw_sweep
from lifealign.study.grid import Cell, Grid, Scales
from lifealign.study.page import Facts, page
from lifealign.study.results import Result, check_budget, read_results
from lifealign.study.runner import last_line, read_record
from lifealign.study.table import metrics, tidy


def write_report(grid: Grid, scales: Scales, command: str, repository: Path) -> None:
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
        commit=_commit(repository),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        machine=_machine(),
        finished=len({result.cell.folder for result in results}),
        planned=grid.size,
        troubles=[*_failed(cells), *_untuned(scales)],
    )
    tuning = read_json(folder / "tuning.json") if grid.tuning is not None else []
    tasks: dict[str, dict[str, Any]] = {}
    for of_sequence in {result.cell.sequence: result for result in reversed(results)}.values():
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
                drawn[f"{name}_{sequence}_{metric}.png"] = draw_sweep(grid, with_cells, name, sweep, metric)
            for name, figure in drawn.items():
                write_bytes(grid.options.folder / name, png(figure))
            names += drawn
    return names


def _failed(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in {cell.folder: cell for cell in cells}.values():
        record = read_record(cell)
        if record is not None and record.exit_code is not None and record.exit_code != 0:
            yield f"{cell.name}: exit code {record.exit_code}: `{last_line(cell)}`"


def _untuned(scales: Scales) -> Iterator[str]:
    for (method, regime), scale in scales.items():
        if scale is None:
            yield f"{method}, {regime}: no learning rate chosen, since not all of its short runs have ended"


def _tasks(folder: Path, result: Result) -> list[dict[str, Any]]:
    """Sizes of a cell's tasks and accuracies of trivial cues; kept under a hash of the rows, since loading them takes time."""
    kept = folder / "tasks.json"
    digest = hashlib.sha256(json.dumps(result.data, sort_keys=True).encode()).hexdigest()
    known: dict[str, Any] = read_json(kept) if kept.exists() else {}
    if digest not in known:
        config = build(load_run(result.cell.folder))
        tasks = load_tasks(config.sequence, config.data, load_tokenizer(config.model), SIX_DOMAINS)
        known[digest] = [_task(task) for task in tasks]
        write_json(kept, known)
    return known[digest]


def _task(task: Task) -> dict[str, Any]:
    sizes = {"train": len(task.train), "held_out": len(task.test)}
    return {"task": task.name, **sizes, "cues": cue_accuracies(task.test)}


def _commit(repository: Path) -> str:
    """The commit of the checkout, and whether files differ from it; what is no checkout has none."""

    def git(*words: str) -> str:
        ended = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
        return ended.stdout.strip() if ended.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{commit} with changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def _machine() -> str:
    """The processor, its cores and memory, and the accelerator."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(info) if line.startswith("model name")]
    parts = [names[0] if names else model, f"{os.cpu_count()} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
