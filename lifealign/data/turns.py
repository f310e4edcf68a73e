"""Chat turns: from messages, from ``Human:``/``Assistant:`` text, and what two conversations have in common.

A turn is ``{"role": "system" | "user" | "assistant", "content": text}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lifealign.errors import did_you_mean

Turn = dict[str, str]

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}

_MARKER = re.compile(r"^(Human|Assistant):", re.MULTILINE)


class RowMistake(ValueError):
    """What is wrong with one row: column and finding. Whoever knows the file and the row number adds them."""


def describe(value: Any) -> str:
    """A value's kind, short enough for a one-line message."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(str, value))[:200] or '(none)'}"
    if isinstance(value, Sequence):
        if not value:
            return "an empty list"
        inner = value[0]  # of a list in a list no more is said: what is nested deeply would say it for ever
        return f"a list starting with {'a list' if isinstance(inner, list) else describe(inner)}"
    return f"a {type(value).__name__}"


def read_message(message: Any, column: str) -> Turn:
    """One ``{role, content}`` or ``{from, value}`` object as a turn. Raises RowMistake naming ``column``."""
    if not isinstance(message, Mapping):
        raise RowMistake(f"'{column}' holds {describe(message)} where a message {{role, content}} is expected")
    # Parquet fills the keys that a row lacks with null, so a null key counts as absent.
    keys = {key: value for key, value in message.items() if value is not None}
    role, content = keys.get("role", keys.get("from")), keys.get("content", keys.get("value"))
    if role is None or not isinstance(content, str):
        raise RowMistake(
            f"a message of '{column}' needs 'role' and 'content' (or 'from' and 'value') as text; found {describe(message)}"
        )
    if str(role).lower() not in ROLES:
        raise RowMistake(f"a message of '{column}' has the unknown role '{role}'{did_you_mean(str(role), ROLES)}")
    return {"role": ROLES[str(role).lower()], "content": content}


def tidy(turns: Iterable[Turn]) -> list[Turn]:
    """Stripped turns without empty ones; neighbours of one role become one turn, joined by a newline."""
    out: list[Turn] = []
    for turn in turns:
        role, content = turn["role"], turn["content"].strip()
        if not content:
            continue
        if out and out[-1]["role"] == role:
            out[-1] = {"role": role, "content": f"{out[-1]['content']}\n{content}"}
        else:
            out.append({"role": role, "content": content})
    return out


def parse_transcript(text: str) -> list[Turn] | None:
    """Turns of a text that begins with ``Human:`` or ``Assistant:``, markers at the start of a line; None otherwise."""
    text = text.strip()
    if not _MARKER.match(text):
        return None
    _, *pieces = _MARKER.split(text)
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return tidy({"role": ROLES[label.lower()], "content": content} for label, content in pairs)


def common_turns(left: Sequence[Turn], right: Sequence[Turn]) -> int:
    """Length of the longest common beginning of two conversations that ends in a user turn; 0 where there is none."""
    shared = 0
    for position, (a, b) in enumerate(zip(left, right, strict=False), start=1):
        if a != b:
            break
        if a["role"] == "user":
            shared = position
    return shared


def common_text(left: str, right: str) -> str:
    """The longest common beginning of two texts that does not end inside a word of either."""
    end = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    nexts = (left[end : end + 1], right[end : end + 1])
    if end and _is_word(left[end - 1]) and any(map(_is_word, nexts)):
        while end and _is_word(left[end - 1]):
            end -= 1
    return left[:end]


def _is_word(char: str) -> bool:
    """Whether ``char`` is part of a word of a script that puts spaces between words."""
    spaceless = "\u0e00" <= char <= "\u0eff" or "\u2e80" <= char <= "\u9fff" or char >= "\U00020000"  # Thai, Lao, Han, kana
    return char in ("_", "'", "’") or (char.isalnum() and not spaceless)
