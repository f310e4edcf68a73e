"""The runs that are to be compared: found on disk, read, and parted into those that may be compared and those that may not."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook, progress_note
from lifealign.runtime.files import read_json
from lifealign.study.grid import ANY, Cell
from lifealign.study.record import Record, newest_state
from lifealign.study.results import Predictions, Result, margins_of, read_predictions, rows_of

SEED = 0
"""Runs are compared one with another, held-out pair by held-out pair; to the tables of a study each is a method of one seed."""

HELD_OUT = ("id", "prompt", "chosen", "rejected")
"""What makes a held-out row, of what ``predictions.jsonl`` says of it."""


@dataclass(frozen=True)
class Run:
    """A run with scores over its whole sequence of tasks."""

    name: str
    result: Result
    settings: dict[str, Any]  # config.yaml
    rows: str | None  # sha256 of the held-out rows; None where no predictions were kept

    @property
    def tasks(self) -> list[str]:
        return self.result.book.tasks


@dataclass(frozen=True)
class LeftOut:
    """A run that takes no part, and why."""

    name: str
    why: str


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Run directories: those named, and all below a folder that is none itself.

    Raises:
        UserError: where a folder holds no run, or a run directory that was named has no scores.
    """
    found: dict[Path, Path] = {}
    for place in places:
        below = list(_runs_below(place)) if place.is_dir() else []
        if not below:
            raise UserError(f"{place} holds no run: there is no config.yaml in it or below it")
        if below == [place] and not (place / "scores.json").exists():
            raise UserError(f"{place} has no scores.json: no task of this run is finished; start it again, or leave it out")
        found |= {run.resolve(): run for run in below}
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    """The folder, if it is a run directory, or those below it; what lies inside of a run is part of it."""
    if (folder / "config.yaml").exists():
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):  # a link may lead back up
            yield from _runs_below(inner)


def common_parent(runs: Sequence[Path]) -> Path:
    """The folder that all runs lie in, near or deep."""
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """The runs that have come to the end of their tasks, and those that have not.

    Raises:
        UserError: for a file that is not what a run writes.
    """
    runs, left_out, parent = [], [], common_parent(folders)
    for folder in folders:
        name = str(folder.resolve().relative_to(parent))
        if not (folder / "scores.json").exists():
            left_out.append(LeftOut(name, "no task of it is finished"))
            continue
        run = _read(folder, name)
        book = run.result.book
        if book.metrics and all(len(book.matrix(metric)) == len(book.tasks) for metric in book.metrics):
            runs.append(run)
        else:
            left_out.append(LeftOut(name, f"it is not finished: there are scores over {progress_note(book)}"))
    return runs, left_out


def _read(folder: Path, name: str) -> Run:
    try:
        book = ScoreBook.from_json(read_json(folder / "scores.json"))
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        cell = Cell(settings["sequence"]["name"], name, ANY, SEED, folder, ())
        predictions, data = read_predictions(folder), newest_state(cell).get("data", {})
        of_pairs = {"rows": rows_of(predictions), "scored": margins_of(predictions)}
        held_out = _held_out(predictions)
    except (ValueError, KeyError, TypeError, RecursionError, OSError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        files = "scores.json, config.yaml or a predictions.jsonl"
        raise UserError(f"{folder}: {files} is not what a run writes ({what}); leave it out") from error
    return Run(name, Result(cell, Record([]), {"data": data}, book, **of_pairs), settings, held_out)


def _held_out(predictions: Predictions) -> str | None:
    """sha256 over the held-out rows of each task in their order, from what the run said of them."""
    rows: dict[str, list[list[str]]] = {}
    for scored in predictions:
        rows |= {task: [[str(row[key]) for key in HELD_OUT] for row in of_task] for task, of_task in scored.items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() if rows else None


def comparable(runs: Sequence[Run], against: Run | None) -> tuple[list[Run], list[LeftOut]]:
    """The runs with the tasks and held-out rows of ``against``, or those that most have; and the others.

    Raises:
        UserError: where no two of several runs have these in common.
    """
    keys = [(tuple(run.tasks), run.rows) for run in runs]
    chosen = (tuple(against.tasks), against.rows) if against is not None else Counter(keys).most_common(1)[0][0]
    same = [run for run, key in zip(runs, keys, strict=True) if key == chosen]
    others = [LeftOut(run.name, _why(run, same[0])) for run, key in zip(runs, keys, strict=True) if key != chosen]
    if others and len(same) == 1:
        raise UserError(f"no scores to compare with those of {same[0].name}: {others[0].name}, {others[0].why}")
    return same, others


def _why(run: Run, first: Run) -> str:
    if run.tasks != first.tasks:
        return f"it went through other tasks ({', '.join(run.tasks)}) than {first.name} ({', '.join(first.tasks)})"
    return f"it was scored on other held-out rows than {first.name}"
