"""How a cell ended, and what is kept of it when it has: what tells the next call of a study which cells are left to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from lifealign.errors import DIVERGED, UserError
from lifealign.runtime import checkpoint
from lifealign.runtime.files import read_json, write_bytes
from lifealign.study.grid import Cell

RECORD = "cell.json"
FORMAT = 1
"""Of the file that is kept of a finished cell."""


@dataclass
class Record:
    """``cell.json``: how a cell ended, and what it took over all its attempts. Without exit code: it has not ended."""

    overrides: list[str]
    exit_code: int | None = None
    wall_seconds: float = 0.0
    peak_memory_mib: float = 0.0  # largest resident set of the process
    steps: int | None = None  # optimiser steps
    attempts: int = 0
    commit: str = ""  # of the code, the day and the machine of the last attempt
    date: str = ""
    machine: str = ""


def read_record(cell: Cell) -> Record | None:
    """Of what was kept, or else from the cell's folder; None where nothing is known of the cell."""
    path = cell.folder / RECORD
    if cell.kept.exists():
        return read_kept(cell)[0]
    return Record(**read_json(path)) if path.exists() else None


def is_finished(cell: Cell) -> bool:
    record = read_record(cell)
    return record is not None and record.exit_code == 0


def has_ended(cell: Cell) -> bool:
    """Whether a run has come to its end, or to one that another attempt will not change: a loss that is no number."""
    record = read_record(cell)
    return record is not None and record.exit_code in (0, DIVERGED)


def check_settings(cells: Sequence[Cell]) -> None:
    """Raises UserError where a cell ran, or began to, with other settings. Of cells that share a folder the first has run."""
    for cell in {cell.folder: cell for cell in reversed(cells)}.values():
        record = read_record(cell)
        if record is None or sorted(record.overrides) == sorted(cell.overrides):  # each key stands once, in whatever order
            continue
        if record.exit_code == 0 or checkpoint.newest_folder(cell.folder / "checkpoints") is not None:
            changed = sorted(set(record.overrides) ^ set(cell.overrides))
            raise UserError(
                f"{cell.folder} was run with other settings ({', '.join(changed)}); another study.runs=DIR starts anew, "
                f"removing that folder and {cell.kept.name} beside it runs this cell again"
            )


def newest_state(cell: Cell) -> dict[str, Any]:
    """``state.json`` of a run's newest checkpoint; empty where there is none."""
    newest = checkpoint.newest_folder(cell.folder / "checkpoints")
    return read_json(newest / checkpoint.STATE) if newest else {}


# What is kept


def keep(cell: Cell, record: Record, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file beside a cell's folder: record and facts as JSON in its header, numbers as tensors."""
    result = json.dumps({"record": asdict(record), **facts}, allow_nan=False)
    write_bytes(cell.kept, safetensors.numpy.save(dict(tensors), {"format": str(FORMAT), "result": result}))


def read_kept(cell: Cell) -> tuple[Record, dict[str, Any]]:
    """The record and the other facts. Raises UserError where the file is no such file."""
    try:
        with safe_open(cell.kept, "numpy") as file:
            about = file.metadata() or {}
        if about.get("format") != str(FORMAT):
            raise ValueError(f"format {about.get('format')}, not {FORMAT}")
        facts: dict[str, Any] = json.loads(about["result"])
        return Record(**facts.pop("record")), facts
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{cell.kept} is not what a study keeps of a cell ({error}); remove it") from error


def read_kept_tensors(cell: Cell) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(cell.kept)
