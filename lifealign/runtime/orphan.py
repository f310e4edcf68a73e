"""A rank that outlives its launcher would train on unseen, and hold its port and its card. This ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

POLL_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""From asking the run to save and end, to ending it."""

EXIT_CODE = 1


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """Inside, a process that a launcher of ranks started ends soon after the launcher has: by itself, with all it did saved,
    or after ``GRACE_SECONDS`` by force."""
    done, above = threading.Event(), _launchers()
    if above:
        threading.Thread(target=_watch, args=(above, done), name="orphan", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _launchers() -> list[int]:
    """Processes above this one that must live, from the parent upwards; none where no launcher started it.

    ``deepspeed`` starts one launcher on each node, which starts the ranks. On a single node both are ours to watch: a signal
    that ends the command does not reach the launcher. A shell may go while its commands run on, as under nohup.
    """
    launcher = psutil.Process().parent()
    if launcher is None or not any(name in os.environ for name in ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")):
        return []
    return [launcher.pid, launcher.ppid()] if os.environ.get("CROSS_SIZE") == "1" else [launcher.pid]


def _watch(launchers: list[int], done: threading.Event) -> None:
    while _still_above(launchers):
        if done.wait(POLL_SECONDS):
            return
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: the launcher is gone; saving and ending", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # noted by the run, which saves with the next step
    if not done.wait(GRACE_SECONDS):
        print(f"rank {rank}: ended by force", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _still_above(launchers: list[int]) -> bool:
    """A process that has lost its parent is given another."""
    below = os.getpid()
    for launcher in launchers:
        try:
            if psutil.Process(below).ppid() != launcher:
                return False
        except psutil.NoSuchProcess:
            return False
        below = launcher
    return True
