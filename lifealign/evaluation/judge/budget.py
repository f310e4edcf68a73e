"""How many requests a command may send."""

from __future__ import annotations

import threading


class BudgetSpent(Exception):
    """The request that was about to be sent would be one too many."""


class Budget:
    """Counts requests, of any number of threads and calls, up to ``most``; None: without end."""

    def __init__(self, most: int | None) -> None:
        self.most, self.sent = most, 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Count one request, just before it is sent. Raises BudgetSpent in place of the one too many."""
        with self._lock:
            if self.most is not None and self.sent >= self.most:
                raise BudgetSpent
            self.sent += 1
