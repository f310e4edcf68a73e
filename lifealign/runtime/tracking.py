"""Where numbers go: ``metrics.jsonl`` in the run directory, and the sinks that mirror it. Rank 0 only."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from errno import ENOENT
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.runtime.files import copy_file, read_json_lines, write_bytes
from lifealign.runtime.options import SinkName, TrackingMode, TrackingOptions
from lifealign.runtime.sinks import CsvSink, Row, Sink, TensorBoardSink
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)


class Tracker:
    """Appends rows to ``metrics.jsonl`` and tells the chosen sinks; does nothing on ranks other than 0.

    Raises:
        UserError: on every rank, where a sink cannot be had.
    """

    def __init__(self, options: TrackingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        self._file: TextIO | None = None
        self.folder = folder
        self._sinks: list[Sink] = []
        self._step = 0  # of the last row of kind "step"
        self._factors: list[Row] = []  # consolidated so far, of the stage that is being consolidated
        self._log_adapter = options.log_adapter
        self.failure: OSError | None = None  # the first that was met in writing; rank 0 goes on until all ranks learn of it
        with distributed.failing_together(UserError):  # wandb is asked on rank 0 alone
            if distributed.is_main():
                self._path = folder / "metrics.jsonl"
                self._open()
                self._sinks = _make_sinks(options, folder, config)

    @property
    def shows(self) -> bool:
        """Whether anyone looks at pictures and tables: they cost time to make."""
        return any(not isinstance(sink, CsvSink) for sink in self._sinks)

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write one row; ``kind`` says what it describes: "step", "consolidation", "evaluation".

        A number that is not finite becomes null: JSON has no other way to say it. What cannot be written is told by
        :meth:`check`, which all ranks come to: one that stopped here would leave the others waiting.
        """
        if self._file is None or self.failure is not None:
            return
        try:
            self._write(self._file, kind, values)
        except OSError as error:
            self.failure = error

    def check(self) -> None:
        """Raises OSError where a row could not be written, or the file that rows go to is no longer in the run directory."""
        if self.failure is not None:
            raise self.failure
        if self._file is not None and not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            raise FileNotFoundError(ENOENT, "replaced while the run wrote to it", str(self._path))

    def _write(self, file: TextIO, kind: str, values: Mapping[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        row: dict[str, Any] = {"kind": kind, **plain}
        line = json.dumps(row, allow_nan=False) + "\n"
        file.write(line)
        self._digest.update(line.encode())
        if kind == "consolidation":
            self._factors.append(row)
            return
        self._tell_consolidated()
        if kind == "step":
            self._step = row["step"]
        for sink in self._sinks:
            sink.log(self._step, row)

    def picture(self, name: str, png: bytes) -> None:
        """Show a picture; ``name`` stays the same from task to task."""
        self._show(lambda sink: sink.picture(self._step, name, png))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table of numbers, texts and None."""
        self._show(lambda sink: sink.table(self._step, name, columns, rows))

    def curves(self, tasks_trained: int, values: Mapping[str, float]) -> None:
        """A point of series over the number of tasks trained so far, by the names of the series."""
        self._show(lambda sink: sink.curves(self._step, tasks_trained, values))

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """Show how values are distributed; the same ``name`` each time makes a history of it."""
        self._show(lambda sink: sink.histogram(self._step, name, values))

    def _show(self, what: Callable[[Sink], None]) -> None:
        """As :meth:`log` does, of what is no row."""
        try:
            for sink in self._sinks if self.failure is None else ():
                what(sink)
        except OSError as error:
            self.failure = error

    def adapter(self, folder: Path) -> None:
        """Keep the adapter with the run, where ``tracking.log_adapter`` asks for it."""
        for sink in self._sinks if self._log_adapter else ():
            sink.artifact("adapter", folder)

    def position(self) -> int:
        """Length of ``metrics.jsonl`` in bytes, to go back to: so much of it is on disk. Rank 0 only."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def digest(self) -> str:
        """SHA-256 of ``metrics.jsonl``. Rank 0 only."""
        return self._digest.hexdigest()

    def rewind(self, position: int, digest: str | None = None) -> None:
        """Forget the rows that an interrupted run wrote after its last checkpoint; they will be written again.

        Args:
            digest: what :meth:`digest` was then. Where the file is another now, it is kept as ``metrics.jsonl.damaged``, a
                line says so, and the rows of it that can be read are taken over: nothing but the log depends on them.
        """
        if self._file is None:
            return
        content = self._path.read_bytes()[:position]
        if digest is None or hashlib.sha256(content).hexdigest() == digest:
            self._file.truncate(position)
        else:
            self._set_aside(content)
        self._file.close()
        self._open()
        rows = read_json_lines(self._path)
        self._step = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
        for sink in self._sinks:
            sink.go_on(rows)

    def _open(self) -> None:
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by __exit__
        self._digest = hashlib.sha256(self._path.read_bytes())  # of all that the file holds

    def _set_aside(self, content: bytes) -> None:
        """Keep a damaged file, and go on with what of its content are rows."""
        damaged = self._path.with_name(self._path.name + ".damaged")
        copy_file(self._path, damaged)
        line = f"{self._path} is not what was written; it is kept as {damaged.name}, and what can be read of it is taken over"
        log.warning(line)
        console.print(line, markup=False)
        write_bytes(self._path, b"".join(row + b"\n" for row in content.split(b"\n") if _is_row(row)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # of a disk that is full, which was told before
            self._tell_consolidated()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        for sink in self._sinks:
            try:
                sink.close(failed=error is not None)
            except Exception as broken:  # a mirror's: the run and its metrics.jsonl are whole without it
                log.warning("%s could not be closed in order: %s", type(sink).__name__, broken)

    def _tell_consolidated(self) -> None:
        rows, self._factors = self._factors, []
        for sink in self._sinks if rows else ():
            sink.consolidated(self._step, rows)


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    is_row = isinstance(row, dict) and isinstance(row.get("kind"), str)
    return is_row and (row["kind"] != "step" or isinstance(row.get("step"), int))


def _make_sinks(options: TrackingOptions, folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    sinks: list[Sink] = []
    if SinkName.wandb in options.sinks and options.mode is not TrackingMode.disabled:
        from lifealign.runtime.wandb_sink import WandbSink

        sinks.append(WandbSink(options, folder, config))
    if SinkName.tensorboard in options.sinks:
        sinks.append(TensorBoardSink(folder))
    if SinkName.csv in options.sinks:
        sinks.append(CsvSink(folder))
    return sinks
