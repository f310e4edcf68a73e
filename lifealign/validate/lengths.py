"""How long prompts and responses are before anything is cut, and how much the limits take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lifealign.data.options import DataOptions

BAR = 20  # characters of the longest bar


class LengthRecorder:
    """A tokenizer that notes how many tokens each text came to; in everything else it is the one it stands for.

    Texts are told apart by their place: rows are tokenised as the prompt, the prompt with the chosen and with the rejected
    response, and again. A response that is then tokenised once more, by itself, is not counted twice.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.prompts: list[int] = []
        self.responses: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        encoded = self._tokenizer(texts, **options)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if len(lengths) % 3 == 0:
            self.prompts += lengths[0::3]
            self.responses += [whole - lengths[at] for at in range(0, len(lengths), 3) for whole in lengths[at + 1 : at + 3]]
        return encoded


def length_table(recorder: LengthRecorder, data: DataOptions) -> Table:
    """A histogram over powers of two, and what lies beyond the limits."""
    columns = [(recorder.prompts, data.max_prompt_tokens), (recorder.responses, data.max_response_tokens)]
    table = Table(title="Lengths in tokens, before anything is cut")
    for heading in ("up to", "prompts", "responses"):
        table.add_column(heading, justify="right" if heading == "up to" else "left", no_wrap=True)
    bounds = _bounds([length for lengths, _ in columns for length in lengths])
    bars = [histogram(lengths, bounds) for lengths, _ in columns]
    for bound, *cells in zip(bounds, *bars, strict=True):
        table.add_row(str(bound), *cells)
    table.add_section()
    table.add_row("longest", *(str(max(lengths)) for lengths, _ in columns))
    table.add_row("limit", *(str(limit) for _, limit in columns))
    table.add_row("longer", *(_share(sum(n > limit for n in lengths), len(lengths)) for lengths, limit in columns))
    table.add_row("tokens cut", *(_share(_cut(lengths, limit), sum(lengths)) for lengths, limit in columns))
    return table


def _bounds(lengths: Sequence[int]) -> list[int]:
    """Powers of two from the one that holds the shortest to the one that holds the longest."""
    first, last = ((max(1, length) - 1).bit_length() for length in (min(lengths), max(lengths)))
    return [2**power for power in range(first, last + 1)]


def histogram(lengths: Sequence[int], bounds: Sequence[int]) -> list[str]:
    """A bar and a share for each bound: of the lengths above the bound before it and up to this one."""
    lows = [-1, *bounds[:-1]]
    counts = [sum(low < length <= high for length in lengths) for low, high in zip(lows, bounds, strict=True)]
    return [f"{'█' * round(BAR * count / max(counts)):{BAR}} {100 * count / len(lengths):5.1f} %" for count in counts]


def _cut(lengths: Sequence[int], limit: int) -> int:
    """Tokens beyond the limit."""
    return sum(length - limit for length in lengths if length > limit)


def _share(some: int, of: int) -> str:
    """``12 of 600 (2.0 %)``"""
    return f"{some} of {of} ({100 * some / of:.1f} %)"
