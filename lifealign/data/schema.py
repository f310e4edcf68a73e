"""A raw row, in any of the forms of docs/data.md, becomes a canonical preference. No files, no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lifealign.data.options import Columns
from lifealign.data.turns import (
    RowMistake,
    Turn,
    common_text,
    common_turns,
    describe,
    parse_transcript,
    read_message,
    tidy,
)
from lifealign.errors import did_you_mean

PROMPT_COLUMNS = ("prompt", "query", "question", "instruction", "conversations")  # the first that a row has is taken

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer. Texts are stripped; the last turn of ``prompt`` is the user's."""

    id: str  # "hc3/train/17": task, split, 0-based row number of the file
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Draft:
    """What a row says, before the rules that need its whole file."""

    prompt: list[Turn]  # may be empty, or end in the beginning of an answer
    chosen: str
    rejected: str
    comparable: bool = True  # False: the two conversations part before their last answer


def read_row(row: Row, columns: Columns) -> Draft:
    """The prompt and the two answers of one row.

    Raises:
        RowMistake: a column is missing or holds something else than it should.
    """
    chosen, rejected = _responses(row, columns)
    if _holds_prompt(chosen) or _holds_prompt(rejected):
        if columns.prompt:
            raise RowMistake(
                f"columns.prompt={columns.prompt}: the responses are whole conversations, prompt included; leave it out, or "
                "name columns that hold answers alone"
            )
        return _from_conversations(_conversation(chosen), _conversation(rejected))
    prompt_column = _prompt_column(row, columns)
    if prompt_column is not None:
        prompt = _prompt(row, prompt_column)
        if prompt and prompt[-1]["role"] == "system":
            raise RowMistake(f"column '{prompt_column}' ends with a system message; it must end with the user's")
        return Draft(prompt, _answer(chosen), _answer(rejected))
    return _from_texts(row, _answer(chosen), _answer(rejected))


def value_of(row: Row, column: str) -> Any:
    """``row[column]``. Raises RowMistake where it is absent or null, with the nearest name that the row has."""
    if row.get(column) is None:
        named = [name for name in row if row[name] is not None]
        what = "is null" if column in row else f"is missing{did_you_mean(column, named)}"
        raise RowMistake(f"column '{column}' {what}")
    return row[column]


# -- the two answers ---------------------------------------------------------------------------------------------------


def _responses(row: Row, columns: Columns) -> tuple[str | list[Turn], str | list[Turn]]:
    """Chosen and rejected, each as a text or as tidy turns."""
    if columns.responses is None:
        chosen, rejected = columns.chosen or "chosen", columns.rejected or "rejected"
        return (
            _response(value_of(row, chosen), chosen, None),
            _response(value_of(row, rejected), rejected, columns.join_rejected),
        )
    names, better = list(columns.responses), columns.preferred or "preferred"
    index = value_of(row, better)
    if type(index) is not int or index not in (0, 1):
        raise RowMistake(f"column '{better}' must be 0 or 1, the better of {' and '.join(names)}; found {describe(index)}")
    texts = [_response(value_of(row, name), name, None) for name in names]
    return texts[index], texts[1 - index]


def _response(value: Any, column: str, joiner: str | None) -> str | list[Turn]:
    """A text, a message, a list of messages, or a list of texts of which one is taken (or all are joined)."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        turn = read_message(value, column)
        if turn["role"] != "assistant":
            raise RowMistake(f"'{column}' must be the assistant's message; found the role of the {turn['role']}")
        return turn["content"]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        texts = [item.strip() for item in value if item.strip()]
        return (joiner.join(texts) if joiner is not None else texts[0]) if texts else ""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return tidy(read_message(item, column) for item in value)
    raise RowMistake(f"column '{column}' must be a text, a message or a list of them; found {describe(value)}")


def _holds_prompt(response: str | list[Turn]) -> bool:
    """Whether an answer is a whole conversation."""
    return not isinstance(response, str) and any(turn["role"] != "assistant" for turn in response)


def _answer(response: str | list[Turn]) -> str:
    return (response if isinstance(response, str) else "\n".join(turn["content"] for turn in response)).strip()


def _conversation(response: str | list[Turn]) -> list[Turn]:
    if isinstance(response, str):
        raise RowMistake("one response is a conversation and the other a text; both must have the same form")
    return response


# -- the prompt --------------------------------------------------------------------------------------------------------


def _prompt_column(row: Row, columns: Columns) -> str | None:
    if columns.prompt:
        value_of(row, columns.prompt)
        return columns.prompt
    return next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)


def _prompt(row: Row, column: str) -> list[Turn]:
    value = row[column]
    if isinstance(value, str):
        extra = row.get("input") if column == "instruction" else None  # Alpaca's second half of an instruction
        text = f"{value.strip()}\n{extra}" if isinstance(extra, str) else value
        turns = parse_transcript(text)
        return tidy([{"role": "user", "content": text}]) if turns is None else turns
    if isinstance(value, list):
        return tidy(read_message(item, column) for item in value)
    if isinstance(value, Mapping):
        return tidy([read_message(value, column)])
    raise RowMistake(f"column '{column}' must be a text or a list of messages; found {describe(value)}")


def _from_conversations(chosen: list[Turn], rejected: list[Turn]) -> Draft:
    """Prompt and answers of two whole conversations: what they share up to a user turn, and what follows."""
    shared = common_turns(chosen, rejected)
    tails = [turns[shared:] for turns in (chosen, rejected)]
    comparable = shared > 0 and all(turn["role"] == "assistant" for tail in tails for turn in tail)
    return Draft(chosen[:shared], _answer(tails[0]), _answer(tails[1]), comparable)


def _from_texts(row: Row, chosen: str, rejected: str) -> Draft:
    """Prompt and answers of two whole texts: transcripts, or plain texts with the same beginning."""
    left, right = parse_transcript(chosen), parse_transcript(rejected)
    if left and right and _holds_prompt(left) and _holds_prompt(right):
        return _from_conversations(left, right)
    empty = next((name for name in PROMPT_COLUMNS if name in row), None)
    if empty is not None:  # the beginning that two answers share is no prompt where there should be another
        raise RowMistake(f"column '{empty}' is null")
    _refuse_misspelt_prompt(row)
    prompt = common_text(chosen, rejected)
    if not prompt.strip():
        names = ", ".join(f"'{name}'" for name in PROMPT_COLUMNS)
        raise RowMistake(
            f"no prompt: none of the columns {names}, and 'chosen' and 'rejected' share no beginning; "
            f"the row has: {', '.join(row)}"
        )
    # Two equal texts leave no answer to compare; keeping them as answers lets them be counted as what they are.
    answers = (chosen, rejected) if chosen == rejected else (chosen[len(prompt) :].strip(), rejected[len(prompt) :].strip())
    return Draft([{"role": "user", "content": prompt.strip()}], *answers)


def _refuse_misspelt_prompt(row: Row) -> None:
    """A column called 'promt' means that the prompt is not hidden in the answers: better to ask than to guess."""
    for name in row:
        near = get_close_matches(name, PROMPT_COLUMNS, n=1, cutoff=0.8)
        if near and isinstance(row[name], (str, list)):
            raise RowMistake(
                f"column '{near[0]}' is missing; did you mean '{name}'? Rename it, or say "
                f"columns.prompt={name} for this task in the sequence"
            )
