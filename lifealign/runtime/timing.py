"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timing(defaultdict[str, float]):
    """Seconds by part of a run."""

    def __init__(self) -> None:
        super().__init__(float)
        self._inside = 0.0  # seconds of parts that have ended within the part that is being timed

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the seconds inside to those of a part; less what is timed there as another part, such as a checkpoint within
        a stage, so that all parts add up."""
        started, outside, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self[part] += seconds - self._inside
            self._inside = outside + seconds
