"""Signals that ask a run to end, taken note of so that it can save first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType, TracebackType

from lifealign.runtime import distributed
from lifealign.runtime.watchdog import here

ASKING = (signal.SIGTERM, signal.SIGINT)

AGAIN_SECONDS = 5.0
"""Signals within this time are one request: launchers send several at once."""


_check: ContextVar[Callable[[], object] | None] = ContextVar("check", default=None)


@contextmanager
def stopping_between_batches(check: Callable[[], object]) -> Iterator[None]:
    """Inside, ``check`` is called before every batch that is scored or generated, on every rank; it may raise."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def between_batches() -> None:
    """Whoever works through batches calls this before each, on every rank equally often: a run may be stopped there."""
    here.tick()
    check = _check.get()
    if check is not None:
        check()


class StopSignals:
    """Inside, SIGTERM and SIGINT are only noted. One that comes ``AGAIN_SECONDS`` later ends the process at once.

    Where one is inside another, the inner one alone takes note. Outside the main thread, where Python allows no handlers,
    nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def anywhere(self) -> int | None:
        """The signal that this rank or another one has noted. Call on every rank."""
        return next((number for number in distributed.gather_objects(self.received) if number is not None), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
