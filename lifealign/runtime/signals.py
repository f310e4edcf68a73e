"""Signals that ask a run to end, taken note of so that it can save first."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

ASKING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside, the first SIGTERM or SIGINT is only noted; a second one ends the process as it would without this."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other, handler in self._before.items():
            signal.signal(other, handler)  # type: ignore[arg-type]
