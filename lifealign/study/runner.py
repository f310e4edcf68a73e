"""Run the cells of a study: one process each, several at a time, and a record of how each of them ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lifealign.errors import SIGNALLED
from lifealign.runtime.files import write_json
from lifealign.runtime.terminal import console
from lifealign.study.grid import Cell
from lifealign.study.origin import commit, machine
from lifealign.study.record import RECORD, Record, check_settings, has_ended, newest_state, read_record

OUTPUT = "output.txt"
POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""How long a cell that is asked to end may take before it is killed. What it loses is the steps since its last checkpoint."""

BUSY = "a study, or a cell of one, is running there; wait for it or end it"

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that ru_maxrss counts in


@dataclass
class _Running:
    cell: Cell
    record: Record
    process: subprocess.Popen[bytes]
    card: str | None  # the GPU it sees
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs cells that are not finished yet.

    Args:
        script: launch/train.py.
        parallel: cells at once; each gets an equal share of the cores, and one of the GPUs where there are any.
        lock: a file descriptor that every cell inherits, so that the lock on it is held while any of them lives.
        finished: called with each cell that has finished.
    """

    def __init__(self, script: Path, parallel: int, lock: int, finished: Callable[[Cell], object]) -> None:
        self.script, self.parallel, self.lock, self.finished = script, parallel, lock, finished
        self.commit, self.machine, self.cards = commit(script.parent), machine(), visible_cards()
        self.running: list[_Running] = []
        self.signal: int | None = None
        """The signal that ended the study, if one did."""

    def run(self, cells: Sequence[Cell], title: str) -> None:
        """Run what is left of ``cells``; returns early on SIGINT or SIGTERM, with all processes ended."""
        check_settings(cells)
        by_folder = {cell.folder: cell for cell in reversed(cells)}
        unique = list(reversed(by_folder.values()))
        waiting = deque(cell for cell in unique if not has_ended(cell))
        with self._signals(), _progress(title, len(unique), len(unique) - len(waiting)) as progress:
            try:
                while self.signal is None and (waiting or self.running):
                    while waiting and len(self.running) < self.parallel:
                        self.running.append(self._start(waiting.popleft()))
                    self._reap(progress)
                    progress.update(progress.task_ids[0], cells="; ".join(r.cell.name for r in self.running))
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_all(progress)

    def _start(self, cell: Cell) -> _Running:
        before = read_record(cell) or Record([])
        record = Record(
            list(cell.overrides),
            wall_seconds=before.wall_seconds,
            peak_memory_mib=before.peak_memory_mib,
            attempts=before.attempts + 1,
            commit=self.commit,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            machine=self.machine,
        )
        write_json(cell.folder / RECORD, asdict(record))
        card = min(self.cards, key=lambda card: sum(r.card == card for r in self.running), default=None)
        words = [sys.executable, str(self.script), *cell.overrides, f"run.dir={_quoted(cell.folder)}", "resume=auto"]
        with open(cell.folder / OUTPUT, "wb") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(card),
                start_new_session=True,  # a Ctrl-C in the terminal reaches the study alone, which then ends its cells
                pass_fds=(self.lock,),
            )
        return _Running(cell, record, process, card)

    def _environment(self, card: str | None) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = {"OMP_NUM_THREADS": str(max(1, cores // self.parallel))}
        return {**os.environ, **own, **({} if card is None else {"CUDA_VISIBLE_DEVICES": card})}

    def _reap(self, progress: Progress) -> None:
        """Take note of the cells that have ended."""
        for running in list(self.running):
            pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
            if pid:
                running.process.returncode = os.waitstatus_to_exitcode(status)
                self.running.remove(running)
                self._note(running, usage.ru_maxrss * MAXRSS_UNIT / 2**20, progress)

    def _note(self, running: _Running, peak_mib: float, progress: Progress) -> None:
        cell, record, code = running.cell, running.record, running.process.returncode
        stopped = self.signal is not None and (code < 0 or code > SIGNALLED)  # died of a signal, or has saved and said so
        record.exit_code = None if stopped else code
        record.wall_seconds += time.monotonic() - running.started
        record.peak_memory_mib = max(record.peak_memory_mib, peak_mib)
        self._write_down(cell, record)
        if record.exit_code == 0:
            self._tell(cell)
        progress.advance(progress.task_ids[0])
        endings = {0: "finished", None: "stopped" if stopped else "not finished"}
        ending = endings.get(record.exit_code) or f"exit code {code}: {last_line(cell)}"
        bar = progress.tasks[0]
        console.print(f"{bar.completed:.0f}/{bar.total:.0f} {cell.name}: {ending}, {record.wall_seconds:.0f} s", markup=False)

    def _write_down(self, cell: Cell, record: Record) -> None:
        """Write ``cell.json``. A cell whose folder cannot be read or written must not end the others, and has not finished."""
        try:
            record.steps = newest_state(cell).get("steps")
        except (OSError, ValueError) as error:
            _not_finished(cell, record, error)
        try:
            write_json(cell.folder / RECORD, asdict(record))
        except (OSError, ValueError) as error:  # the record of its start stays, which says that it has not ended
            _not_finished(cell, record, error)

    def _tell(self, cell: Cell) -> None:
        """What goes wrong with one cell's results, as on a full disk, must not end the others; the page comes back to it."""
        try:
            self.finished(cell)
        except (OSError, ValueError) as error:
            console.print(f"{cell.name}: {error}", markup=False)

    def _end_all(self, progress: Progress) -> None:
        """Ask every cell that still runs to end, and see to it that it does.

        An error on the way is raised once none is left to wait for: a process that nobody ends would hold the study's lock.
        """
        failure: Exception | None = None
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_SECONDS
            for running in self.running:
                with suppress(OSError):  # it is gone
                    os.killpg(running.process.pid, number)
            while self.running and time.monotonic() < deadline:
                try:
                    self._reap(progress)
                except Exception as error:
                    failure = failure or error
                time.sleep(POLL_SECONDS / 4)
        if failure is not None:
            raise failure

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM are taken note of; the loop looks, so that no process is lost half started."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def visible_cards() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    number, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:number] if named else [str(card) for card in range(number)]


def _not_finished(cell: Cell, record: Record, error: Exception) -> None:
    """Of a cell that ended well the next call makes sure; one that failed stays so."""
    record.exit_code = record.exit_code or None
    console.print(f"{cell.name}: {cell.folder} cannot be read or written: {error}", markup=False)


def last_line(cell: Cell) -> str:
    """The last thing that a cell said."""
    path = cell.folder / OUTPUT
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip() if lines else "it said nothing"


def _quoted(path: Path) -> str:
    """A path as the value of an override, whatever characters are in it."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _progress(title: str, total: int, done: int) -> Progress:
    """A bar over cells and the names of those that run. Where standard output is no terminal, a line a cell is all there is."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    more = (TimeRemainingColumn(), TextColumn("{task.fields[cells]}", markup=False))
    progress = Progress(*columns, *more, console=console, disable=not console.is_terminal)
    progress.add_task(title, total=total, completed=done, cells="")
    return progress
