"""Rows of every form become the same preference; mistakes name the column."""

from __future__ import annotations

from typing import Any

import pytest

from lifealign.data.options import Columns
from lifealign.data.rows import Rows
from lifealign.data.rules import APART, EMPTY, EQUAL, NO_PROMPT, read_preferences
from lifealign.data.schema import Preference, read_row
from lifealign.data.turns import RowMistake, common_text, parse_transcript, tidy
from lifealign.errors import UserError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def rows_of(*items: dict[str, Any]) -> Rows:
    return Rows("t/train.json", "train", list(items), range(len(items)))


def preferences(*items: dict[str, Any], columns: Columns | None = None, max_empty: float = 1.0) -> list[Preference]:
    return read_preferences(rows_of(*items), "t", columns or Columns(), max_empty)[0]


def only(item: dict[str, Any], columns: Columns | None = None) -> tuple[list[dict[str, str]], str, str]:
    (preference,) = preferences(item, columns=columns)
    return list(preference.prompt), preference.chosen, preference.rejected


SKY = ([user("The sky is")], "blue.", "black.")


def test_a_prompt_that_is_null_is_none_to_be_guessed() -> None:
    row = {"prompt": None, "chosen": "I think the sky is blue.", "rejected": "I think the sky is black."}
    with pytest.raises(UserError, match=r"row 1: column 'prompt' is null"):
        preferences(row)
    assert only({**row, "question": "What is it?"})[0] == [user("What is it?")]
    assert only({key: row[key] for key in ("chosen", "rejected")})[0] == [user("I think the sky is")]
    transcripts = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    assert only({"question": None, **transcripts}) == ([user("a")], "b", "c")


@pytest.mark.parametrize("name", ["prompt", "promt"])
def test_a_prompt_column_beside_whole_conversations_is_asked_about(name: str) -> None:
    row = {"prompt": "before", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    with pytest.raises(UserError, match=rf"columns\.prompt={name}: the responses are whole conversations"):
        preferences(row, columns=Columns(prompt=name))
    assert only(row) == ([user("a")], "b", "c")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
        {"query": "The sky is\n", "chosen": "blue.", "rejected": "black."},
        {"question": "The sky is", "chosen": "blue.", "rejected": "black."},
        {"instruction": "The sky is", "chosen": "blue.", "rejected": "black."},
        {"prompt": "Human: The sky is\n\nAssistant:", "chosen": "blue.", "rejected": "black."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},  # the common "bl" belongs to the answers
        {"prompt": [user("The sky is")], "chosen": [assistant("blue.")], "rejected": [assistant("black.")]},
        {"prompt": "The sky is", "chosen": assistant("blue."), "rejected": assistant("black.")},
        {"chosen": [user("The sky is"), assistant("blue.")], "rejected": [user("The sky is"), assistant("black.")]},
        {
            "prompt": "The sky is",
            "chosen": [user("The sky is"), assistant("blue.")],
            "rejected": [user("The sky is"), assistant("black.")],
        },
        {
            "conversations": [{"from": "human", "value": "The sky is"}],
            "chosen": {"from": "gpt", "value": "blue."},
            "rejected": {"from": "chatgpt", "value": "black."},
        },
        {
            "chosen": "\n\nHuman: The sky is\n\nAssistant: blue.",
            "rejected": "\n\nHuman: The sky is\n\nAssistant: black.",
        },
        {
            "prompt": [{"role": "user", "content": "The sky is", "from": None, "value": None}],  # as Parquet fills keys
            "chosen": "blue.",
            "rejected": "black.",
        },
    ],
)
def test_every_form_of_a_row_gives_the_same_preference(row: dict[str, Any]) -> None:
    assert only(row) == SKY


def test_columns_name_other_columns() -> None:
    hc3 = {"question": "The sky is", "human_answers": ["", "blue.", "azure."], "chatgpt_answers": ["black.", "grey."]}
    truthful = {"question": "The sky is", "best_answer": "blue.", "incorrect_answers": ["black.", " grey. "]}
    safe = {"prompt": "The sky is", "response_0": "black.", "response_1": "blue.", "safer_response_id": 1}
    assert only(hc3, Columns("question", "human_answers", "chatgpt_answers")) == SKY
    joined = only(truthful, Columns("question", "best_answer", "incorrect_answers", join_rejected="; "))
    assert joined == ([user("The sky is")], "blue.", "black.; grey.")
    assert only(safe, Columns(responses=["response_0", "response_1"], preferred="safer_response_id")) == SKY


def test_instruction_takes_its_input_along() -> None:
    row = {"instruction": "Translate.", "input": "ciel", "chosen": "sky", "rejected": "sea"}
    assert only(row)[0] == [user("Translate.\nciel")]


def test_transcript_becomes_turns_and_only_at_line_starts() -> None:
    text = "Human: Hi\nAssistant: I am an Assistant: yes.\nStill me.\n\nHuman: \nHuman: Bye\n\nAssistant:"
    assert parse_transcript(text) == [user("Hi"), assistant("I am an Assistant: yes.\nStill me."), user("Bye")]
    assert parse_transcript("Is the Human: prefix here?") is None


def test_neighbours_of_one_role_are_one_turn() -> None:
    assert tidy([user(" a "), user("b"), assistant(" "), user("c"), assistant("d")]) == [
        user("a\nb\nc"),
        assistant("d"),
    ]


def test_open_assistant_turn_of_the_prompt_begins_both_answers() -> None:
    row = {"query": "Human: Recipe?\nAssistant: Here it is:", "chosen": "Soak.", "rejected": "Fry."}
    assert only(row) == ([user("Recipe?")], "Here it is:\nSoak.", "Here it is:\nFry.")


def test_conversations_share_their_prompt_up_to_a_user_turn() -> None:
    """Both begin u1 a1 u2; the answers are what follows u2, though a1 is shared as well."""
    start = [user("u1"), assistant("a1"), user("u2")]
    row = {"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    assert only(row) == (start, "good", "bad")


@pytest.mark.parametrize(
    "left, right, shared",
    [
        ("The sky is blue", "The sky is black", "The sky is "),
        ("2+2=4", "2+2=5", "2+2="),
        ("a b", "a b c", "a b"),
        ("it's so", "it is so", ""),
        ("天空是蓝", "天空是黑", "天空是"),  # no spaces between words: any place is a boundary
    ],
)
def test_common_text_ends_between_words(left: str, right: str, shared: str) -> None:
    assert common_text(left, right) == shared


def test_role_prefix_on_most_responses_goes_everywhere() -> None:
    """Five of eight responses carry it (62 %): it goes, also where it stands twice; the others stay as they are."""
    rows = [
        {"prompt": "q", "chosen": "Assistant: a", "rejected": "assistant : b"},
        {"prompt": "q", "chosen": "Assistant: Assistant: c", "rejected": "d"},
        {"prompt": "q", "chosen": "e", "rejected": "Assistant:f"},
        {"prompt": "q", "chosen": "Note: g", "rejected": "Assistant: h"},
    ]
    texts = [(p.chosen, p.rejected) for p in preferences(*rows)]
    assert texts == [("a", "b"), ("c", "d"), ("e", "f"), ("Note: g", "h")]


def test_with_the_usual_prefix_those_of_other_roles_go_too() -> None:
    """As in hh-rlhf: a few answers begin `Assistant: Human:` or `Human:`. A colon behind another word is text."""
    rows = [
        {"prompt": "q", "chosen": "Assistant: Human: a", "rejected": "Assistant: b"},
        {"prompt": "q", "chosen": "Human: c", "rejected": "Assistant: Humans: d"},
        {"prompt": "q", "chosen": "Assistant: The user: e", "rejected": "AI: Assistant: user : f"},
    ]
    texts = [(p.chosen, p.rejected) for p in preferences(*rows)]
    assert texts == [("a", "b"), ("c", "Humans: d"), ("The user: e", "f")]


def test_a_usual_prefix_of_another_role_stays() -> None:
    """Only the assistant's name in front of most answers means that prefixes are no part of them."""
    rows = [{"prompt": "q", "chosen": "Human: a", "rejected": "Human: b"}] * 2
    assert {(p.chosen, p.rejected) for p in preferences(*rows)} == {("Human: a", "Human: b")}


def test_role_prefix_on_half_of_the_responses_stays() -> None:
    rows = [{"prompt": "q", "chosen": "Assistant: a", "rejected": "b"}] * 3
    assert {(p.chosen, p.rejected) for p in preferences(*rows)} == {("Assistant: a", "b")}


def test_unusable_rows_are_dropped_and_counted() -> None:
    """Row 1 is equal only after stripping and unprefixing, row 2 empty only after unprefixing; ids keep row numbers."""
    part = [user("u"), assistant("x"), user("v"), assistant("y")]
    rows = [
        {"prompt": "q", "chosen": "Assistant: a ", "rejected": "Assistant: b"},
        {"prompt": "q", "chosen": "Assistant: a ", "rejected": "Assistant: a"},
        {"prompt": "q", "chosen": "Assistant: ", "rejected": "Assistant: a"},
        {"prompt": " ", "chosen": "Assistant: a", "rejected": "Assistant: b"},
        {"chosen": part, "rejected": [user("u"), assistant("z")]},
        {"chosen": part, "rejected": [user("w"), assistant("z")]},
        {"prompt": "q", "chosen": "Assistant: c", "rejected": "Assistant: d"},
    ]
    kept, dropped = read_preferences(rows_of(*rows), "t", Columns(), max_empty=1.0)
    assert [p.id for p in kept] == ["t/train/0", "t/train/6"]
    assert dropped == {EQUAL: 1, EMPTY: 1, NO_PROMPT: 1, APART: 2}


def test_too_many_empty_responses_refuse_the_file() -> None:
    good, empty = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "", "rejected": "b"}
    assert len(preferences(*[good] * 98, empty, empty, max_empty=0.02)) == 98
    with pytest.raises(UserError, match=r"^t/train.json, row 99: empty response, as in 3 of 101 rows; .*data.max_empty=0.03$"):
        preferences(*[good] * 98, empty, empty, empty, max_empty=0.02)


def test_no_usable_row_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"none of its 2 rows can be used \(chosen equals rejected: 2\)"):
        preferences(*[{"prompt": "q", "chosen": "a", "rejected": "a"}] * 2)


OK = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "row, columns, message",
    [
        (
            {"prompt": "q", "choosen": "a", "rejected": "b"},
            Columns(),
            "column 'chosen' is missing; did you mean 'choosen'?",
        ),
        ({**OK, "rejected": None}, Columns(), "column 'rejected' is null"),
        (
            {**OK, "chosen": 3},
            Columns(),
            "column 'chosen' must be a text, a message or a list of them; found the number 3",
        ),
        ({**OK, "prompt": 3}, Columns(), "column 'prompt' must be a text or a list of messages; found the number 3"),
        (
            {"promt": "q", "chosen": "a b", "rejected": "a c"},
            Columns(),
            "column 'prompt' is missing; did you mean 'promt'?",
        ),
        ({"chosen": "a", "rejected": "b", "n": 1}, Columns(), "share no beginning; the row has: chosen, rejected, n"),
        (OK, Columns(prompt="promt"), "column 'promt' is missing; did you mean 'prompt'?"),
        ({**OK, "prompt": [{"role": "tool", "content": "x"}]}, Columns(), "unknown role 'tool'; known: assistant"),
        ({**OK, "prompt": [{"role": "user", "text": "x"}]}, Columns(), "needs 'role' and 'content'"),
        ({**OK, "prompt": [user("x"), {"role": "system", "content": "y"}]}, Columns(), "ends with a system message"),
        (
            {**OK, "chosen": user("x")},
            Columns(),
            "'chosen' must be the assistant's message; found the role of the user",
        ),
        ({**OK, "chosen": [user("x"), assistant("y")]}, Columns(), "both must have the same form"),
        (
            {"prompt": "q", "a": "x", "b": "y", "best": 2},
            Columns(responses=["a", "b"], preferred="best"),
            "column 'best' must be 0 or 1, the better of a and b; found the number 2",
        ),
    ],
)
def test_mistakes_name_the_column(row: dict[str, Any], columns: Columns, message: str) -> None:
    with pytest.raises(RowMistake) as caught:
        read_row(row, columns)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_name_the_row_too() -> None:
    with pytest.raises(UserError, match=r"^t/train.json, row 2: column 'chosen' is null$"):
        preferences(OK, {**OK, "chosen": None})
