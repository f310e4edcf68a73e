"""A rank that outlives its launcher would train on unseen, and hold its port and its card. This ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

POLL_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""From asking the run to save and end, to ending it."""

EXIT_CODE = 1

LAUNCHED = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")
"""What launchers of ranks (deepspeed, torchrun) set. A shell may go while its commands run on, as under nohup."""


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """Inside, a process that a launcher of ranks started ends soon after the launcher has: by itself, with all it did saved,
    or after ``GRACE_SECONDS`` by force."""
    done = threading.Event()
    if any(name in os.environ for name in LAUNCHED):
        threading.Thread(target=_watch, args=(os.getppid(), done), name="orphan", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(launcher: int, done: threading.Event) -> None:
    while os.getppid() == launcher:
        if done.wait(POLL_SECONDS):
            return
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: the launcher is gone; saving and ending", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # noted by the run, which saves with the next step
    if not done.wait(GRACE_SECONDS):
        print(f"rank {rank}: ended by force", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
