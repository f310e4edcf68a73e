"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

TOTAL = "total"


@dataclass
class _Open:
    """A part that is being timed."""

    part: str
    started: float
    inside: float = 0.0  # seconds of parts that have ended within it


class Timing:
    """Seconds by part of a run, over all processes that worked on it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[_Open] = []
        self._started = time.perf_counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the seconds inside to those of a part; less what is timed there as another part, such as a checkpoint within
        a stage, so that all parts add up."""
        self._open.append(_Open(part, time.perf_counter()))
        try:
            yield
        finally:
            ended = self._open.pop()
            seconds = time.perf_counter() - ended.started
            self._seconds[part] += seconds - ended.inside
            if self._open:
                self._open[-1].inside += seconds

    def go_on(self, earlier: Mapping[str, float]) -> None:
        """Count on from what a process that was interrupted had come to."""
        for part, seconds in earlier.items():
            self._seconds[part] += seconds

    def now(self) -> dict[str, float]:
        """Seconds by part so far, open parts included, and ``total``, which has what is no part, too."""
        now, seconds, within = time.perf_counter(), dict(self._seconds), 0.0
        for one in reversed(self._open):
            seconds[one.part] = seconds.get(one.part, 0.0) + now - one.started - one.inside - within
            within = now - one.started
        return {**seconds, TOTAL: seconds.get(TOTAL, 0.0) + now - self._started}
