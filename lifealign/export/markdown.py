"""Text that comes from data or a configuration, made safe to stand in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def escaped(text: object) -> str:
    """The text on one line, with nothing in it that Markdown, a table or HTML would read as markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", line)


def fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; heads and cells are escaped here."""
    lines = [[escaped(cell) for cell in cells] for cells in [heads, *rows]]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
