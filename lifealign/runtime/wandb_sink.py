"""A run's numbers in Weights & Biases: series with their axes, tables, pictures, the adapter. docs/tracking.md lists them."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lifealign.errors import UserError, library_line
from lifealign.runtime.files import read_json, write_json
from lifealign.runtime.options import TrackingOptions
from lifealign.runtime.sinks import Row, Sink, consolidation_means, factor_name, series

STEP, TASKS = "train/step", "scores/tasks_trained"
"""The axes: optimiser steps of the whole run, and tasks trained so far."""

OVER_STEPS = (
    *("train", "task", "skipped", "consolidation", "evaluation", "probe", "reference", "judge"),
    *("tables", "pictures", "histograms"),
)
"""What series that are drawn over the steps begin with; those that begin with ``scores`` are drawn over the tasks."""

PLACE = "WANDB_DATA_DIR"
"""Variable that says where wandb keeps what waits to be sent."""

LAYER_FIGURES = {"kept_rank": "kept rank", "history_share": "conflict share"}


class WandbSink(Sink):
    """One wandb run, in ``wandb/`` of the run directory; online it is sent at once.

    Its id is kept in ``tracking.json``, so that a resumed run continues the same wandb run. wandb keeps what it was given:
    steps that are taken again are there twice, at the same place of the axis.
    """

    def __init__(self, options: TrackingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # slow to import, and needed by one rank of a tracked run only

        kept = folder / "tracking.json"
        if not kept.exists():
            write_json(kept, {"wandb_id": secrets.token_hex(4)})
        self._wandb = wandb
        # Tables wait here until they are sent: in the run directory, where `wandb sync` finds them, and not in a home
        # directory that may be read-only.
        self._placed = PLACE not in os.environ
        if self._placed:
            os.environ[PLACE] = str((folder / "wandb").resolve())
        try:
            self._run = wandb.init(
                mode=options.mode.value,
                project=options.project,
                group=options.group,
                name=folder.name,
                id=read_json(kept)["wandb_id"],
                resume="allow",  # offline too: without it `wandb sync` lets the part of a resumed run replace the earlier one
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:  # no key, no network, no such project
            raise UserError(
                f"tracking.mode={options.mode.value}: wandb could not begin a run ({library_line(error)}); "
                "tracking.mode=offline keeps it in the run directory"
            ) from error
        for axis in (STEP, TASKS):
            self._run.define_metric(axis, hidden=True)
        for name in OVER_STEPS:
            self._run.define_metric(f"{name}/*", step_metric=STEP)
        self._run.define_metric("scores/*", step_metric=TASKS)

    def log(self, step: int, row: Row) -> None:
        self._send(step, series(row))

    def consolidated(self, step: int, rows: Sequence[Row]) -> None:
        """Means over factors, a table of all factors, a bar a factor for each figure, and a line a factor for the spectra."""
        where = f"{rows[0]['task']}/{rows[0]['stage']}"
        names = [factor_name(row) for row in rows]
        shown: dict[str, Any] = dict(consolidation_means(rows))
        for key, title in LAYER_FIGURES.items():
            if all(row.get(key) is not None for row in rows):
                table = self._wandb.Table(["factor", title], [[name, row[key]] for name, row in zip(names, rows, strict=True)])
                bars = self._wandb.plot.bar(table, "factor", title, title=f"{title}, {where}")
                shown[f"consolidation/{where}/{key}"] = bars
        points = [
            [name, direction, value]
            for name, row in zip(names, rows, strict=True)
            for direction, value in enumerate(row.get("singular_values", ()), start=1)
        ]
        if points:
            table = self._wandb.Table(["factor", "direction", "singular value"], points)
            lines = self._wandb.plot.line(table, "direction", "singular value", "factor", f"singular values, {where}")
            shown[f"consolidation/{where}/singular_values"] = lines
        self._send(step, shown)

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._send(step, {f"pictures/{name}": self._wandb.Image(Image.open(io.BytesIO(png)))})

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._send(step, {f"tables/{name}": self._wandb.Table(list(columns), [list(row) for row in rows])})

    def curves(self, step: int, tasks_trained: int, values: Mapping[str, float]) -> None:
        self._run.log({TASKS: tasks_trained, **values})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        counts = np.histogram(np.asarray(values, dtype=np.float64), bins=32)
        self._send(step, {f"histograms/{name}": self._wandb.Histogram(np_histogram=counts)})

    def artifact(self, name: str, folder: Path) -> None:
        files = self._wandb.Artifact(f"{name}-{self._run.id}", type="model")
        files.add_dir(str(folder))
        self._run.log_artifact(files)

    def close(self, *, failed: bool) -> None:
        try:
            self._run.finish(exit_code=1 if failed else 0)
        finally:
            if self._placed:
                del os.environ[PLACE]  # another run of this process has its own

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({STEP: step, **values})
