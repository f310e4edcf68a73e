"""Where a run's numbers go besides ``metrics.jsonl``: what a sink can be told, what its series are called, CSV, TensorBoard.

``metrics.jsonl`` is the record; sinks are ways to look at it. All of them live on rank 0 alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]

PLACES = frozenset({"kind", "step", "task", "task_number", "stage", "stage_step", "stage_steps", "after", "on", "factor"})
"""Keys that say where a row belongs, and are no figures."""


class Sink:
    """What a tracker tells its sinks; one overrides what it can show.

    ``step`` is the number of optimiser steps that the run has taken, over all tasks.
    """

    def go_on(self, rows: Sequence[Row]) -> None:
        """Called once, before anything else: the run goes on after these rows of ``metrics.jsonl``, none where it starts."""

    def log(self, step: int, row: Row) -> None:
        """A row of ``metrics.jsonl``, with its ``kind``; not those of consolidated factors, which come together."""

    def consolidated(self, step: int, rows: Sequence[Row]) -> None:
        """All rows of kind "consolidation" of one stage, a factor each."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture under a name that stays the same from task to task."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of numbers, texts and None."""

    def curves(self, step: int, tasks_trained: int, values: Mapping[str, float]) -> None:
        """A point of series over the number of tasks trained so far."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """How values are distributed."""

    def artifact(self, name: str, folder: Path) -> None:
        """Files to keep with the run."""

    def close(self, *, failed: bool) -> None:
        """The last call."""


def series(row: Row) -> dict[str, float]:
    """The figures of a row by the names of their series. Those of a task have its name in them.

    ``train/STAGE/FIGURE`` and ``task/TASK/STAGE/FIGURE`` for steps, ``KIND/TASK/FIGURE`` for the other kinds, TASK being the
    one that was scored.
    """
    figures = {key: value for key, value in row.items() if key not in PLACES and isinstance(value, (int, float))}
    if row["kind"] == "step":
        whole = {f"train/{row['stage']}/{key}": value for key, value in figures.items()}
        return whole | {f"task/{row['task']}/{row['stage']}/{key}": value for key, value in figures.items()}
    where = row.get("on", row.get("task"))
    return {f"{row['kind']}/{key}" if where is None else f"{row['kind']}/{where}/{key}": v for key, v in figures.items()}


def consolidation_means(rows: Sequence[Row]) -> dict[str, float]:
    """Means over factors of what consolidation says of each, under ``consolidation/STAGE/FIGURE``."""
    keys = ("kept_rank", "kept_energy", "history_share", "update_norm", "refined_norm")
    held = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {f"consolidation/{rows[0]['stage']}/{key}": float(np.mean(values)) for key, values in held.items() if values}


def factor_name(row: Row) -> str:
    """A factor's name without what all of them have in common."""
    return row["factor"].removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


class CsvSink(Sink):
    """``metrics.csv``: the rows of kind "step", a column a key. What a row lacks is empty, and so is what is no number."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.csv"
        self._columns: list[str] = []

    def go_on(self, rows: Sequence[Row]) -> None:
        """Written anew from the record: rows that are taken again are not there twice."""
        kept = [row for row in rows if row["kind"] == "step"]
        self._columns = list(dict.fromkeys(key for row in kept for key in row if key != "kind"))
        self._write(kept)

    def log(self, step: int, row: Row) -> None:
        if row["kind"] != "step":
            return
        new = [key for key in row if key != "kind" and key not in self._columns]
        if new:  # the first step of another stage
            with open(self._path, newline="", encoding="utf-8") as file:
                before: list[Row] = list(csv.DictReader(file))
            self._columns += new
            self._write([*before, row])
        else:
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                self._writer(file).writerow(row)

    def _write(self, rows: Sequence[Row]) -> None:
        with open(self._path, "w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, restval="", extrasaction="ignore", lineterminator="\n")


class TensorBoardSink(Sink):
    """``tensorboard/``: event files, a further one for each time that a run goes on.

    Everything stands at the run's optimiser step. A file begins with the step from which it holds, and TensorBoard leaves
    out what earlier files say from there on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._first = folder / "tensorboard", 0
        self._writer: Any = None

    def go_on(self, rows: Sequence[Row]) -> None:
        self._first = 1 + max((row["step"] for row in rows if row["kind"] == "step"), default=-1)

    @property
    def _events(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always installed

            self._writer = SummaryWriter(str(self._folder), purge_step=self._first)
        return self._writer

    def log(self, step: int, row: Row) -> None:
        self._scalars(step, series(row))

    def consolidated(self, step: int, rows: Sequence[Row]) -> None:
        self._scalars(step, consolidation_means(rows))
        where = f"consolidation/{rows[0]['task']}/{rows[0]['stage']}"
        for key in ("kept_rank", "history_share"):
            self.histogram(step, f"{where}/{key}", [row[key] for row in rows if row.get(key) is not None])
        values = [value for row in rows for value in row.get("singular_values", ())]
        self.histogram(step, f"{where}/singular_values", values)

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._events.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._events.add_text(
            name, "\n".join(f"| {' | '.join('' if v is None else str(v) for v in line)} |" for line in lines), step
        )

    def curves(self, step: int, tasks_trained: int, values: Mapping[str, float]) -> None:
        self._scalars(step, values)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        if values:
            self._events.add_histogram(name, np.asarray(values, dtype=np.float64), step)

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
