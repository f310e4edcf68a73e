"""Raw rows of one split, and the words that name a row to its owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """The rows of one file or hub split; never empty."""

    source: str  # path or hub name, for messages
    split: str  # middle part of the ids
    items: list[dict[str, Any]]
    numbers: Sequence[int]  # 0-based row number of each item in its source
    lines: Sequence[int] | None = None  # 1-based line of each item, where rows are lines

    def where(self, position: int) -> str:
        """``"PATH, row 18"`` (or ``line 18``), counted from 1 as editors do."""
        if self.lines is not None:
            return f"{self.source}, line {self.lines[position]}"
        return f"{self.source}, row {self.numbers[position] + 1}"
