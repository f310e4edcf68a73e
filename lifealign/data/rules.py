"""The rules that need a whole file: role prefixes, unusable rows, and when a file is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lifealign.data.options import Columns
from lifealign.data.rows import Rows
from lifealign.data.schema import Draft, Preference, read_row
from lifealign.data.turns import ROLES, RowMistake
from lifealign.errors import UserError

EQUAL = "chosen equals rejected"
EMPTY = "empty response"
NO_PROMPT = "empty prompt"
APART = "conversations part before the last response"

_ASSISTANT = {*(word for word, role in ROLES.items() if role == "assistant"), "ai"}
_PREFIX = re.compile(rf"\s*({'|'.join(sorted({*ROLES} | _ASSISTANT))})\s*:", re.IGNORECASE)


def read_preferences(rows: Rows, task: str, columns: Columns, max_empty: float) -> tuple[list[Preference], Counter[str]]:
    """Every usable row of a file in its order, and how many rows were dropped for which reason.

    Raises:
        UserError: a row of the wrong form; more than ``max_empty`` of the rows without a prompt or a response;
            no usable row at all.
    """
    drafts = strip_role_prefix([_read(rows, position, columns) for position in range(len(rows.items))])
    kept: list[Preference] = []
    dropped: Counter[str] = Counter({EQUAL: 0, EMPTY: 0})
    first_empty: int | None = None
    for position, draft in enumerate(drafts):
        reason = unusable(draft)
        if reason is None:
            kept.append(_finish(draft, f"{task}/{rows.split}/{rows.numbers[position]}"))
            continue
        dropped[reason] += 1
        if first_empty is None and reason in (EMPTY, NO_PROMPT):
            first_empty = position
    if first_empty is not None:
        _refuse_empty(rows, first_empty, unusable(drafts[first_empty]) or EMPTY, dropped, max_empty)
    if not kept:
        counts = ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
        raise UserError(f"{rows.source}: none of its {len(drafts)} rows can be used ({counts})")
    return kept, dropped


def unusable(draft: Draft) -> str | None:
    """Why a row cannot be used; None where it can."""
    if not draft.comparable:
        return APART
    if not draft.chosen or not draft.rejected:
        return EMPTY
    if draft.chosen == draft.rejected:
        return EQUAL
    return None if any(turn["role"] == "user" for turn in draft.prompt) else NO_PROMPT


def strip_role_prefix(drafts: Sequence[Draft]) -> list[Draft]:
    """Responses without role prefixes, where an ``Assistant:`` stands on more than half of all responses of the file.

    They are then taken off wherever they stand, on both sides: on some responses only, they would tell chosen from rejected.
    Of other roles too, since in such files (hh-rlhf) a few answers begin ``Assistant: Human:``, more of them on one side.
    """
    counts: Counter[str] = Counter()
    for draft in drafts:
        counts.update(_label(text) for text in (draft.chosen, draft.rejected))
    if not any(counts[label] > len(drafts) for label in _ASSISTANT):  # two responses a row
        return list(drafts)
    return [replace(draft, chosen=_without(draft.chosen), rejected=_without(draft.rejected)) for draft in drafts]


def _label(text: str) -> str:
    found = _PREFIX.match(text)
    return found.group(1).lower() if found else ""


def _without(text: str) -> str:
    while found := _PREFIX.match(text):  # now and then several stand there
        text = text[found.end() :].strip()
    return text


def _read(rows: Rows, position: int, columns: Columns) -> Draft:
    try:
        draft = read_row(rows.items[position], columns)
        _check_text(draft)
        return draft
    except RowMistake as mistake:
        raise UserError(f"{rows.where(position)}: {mistake}") from None


def _check_text(draft: Draft) -> None:
    """JSON can hold half of a character, which no file and no tokenizer takes."""
    for text in (draft.chosen, draft.rejected, *(turn["content"] for turn in draft.prompt)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowMistake(f"half of a surrogate pair, {text[error.start]!r}, stands alone; mend the text") from error


def _finish(draft: Draft, id: str) -> Preference:
    """A last assistant turn of the prompt is the beginning of both answers: neighbours of one role are one turn."""
    prompt, lead = list(draft.prompt), ""
    while prompt[-1]["role"] != "user":
        lead = f"{prompt.pop()['content']}\n{lead}"
    return Preference(id, tuple(prompt), lead + draft.chosen, lead + draft.rejected)


def _refuse_empty(rows: Rows, position: int, reason: str, dropped: Counter[str], max_empty: float) -> None:
    empty = dropped[EMPTY] + dropped[NO_PROMPT]
    if empty > max_empty * len(rows.items):
        raise UserError(
            f"{rows.where(position)}: {reason}, as in {empty} of {len(rows.items)} rows; mend the file, or "
            f"let more such rows be dropped with data.max_empty={empty / len(rows.items) + 0.005:.2f}"
        )
