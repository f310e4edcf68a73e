"""What trivial cues score, on pairs where it can be counted by hand, and on the bundled domains."""

from __future__ import annotations

import pytest

from lifealign.data.cues import CUES, cue_accuracies
from lifealign.data.tokenize import Pair


def pair(chosen: str, rejected: str, prompt: str = "p", tokens: tuple[int, int] = (2, 2)) -> Pair:
    return Pair("t/test/0", [1], [5] * tokens[0], [5] * tokens[1], prompt, chosen, rejected)


def of(name: str, *pairs: Pair) -> float:
    return cue_accuracies(pairs)[name]


def test_length_in_tokens_with_ties_counted_half() -> None:
    """Chosen against rejected: 2 < 3, 2 < 9, 5 > 4, 7 = 7. Shorter wins 2 + ½ of 4, 62.5 %; longer 1 + ½, 37.5 %.

    The texts say the opposite: what was cut off is no cue to the model.
    """
    pairs = [pair("a long text", "short", tokens=lengths) for lengths in ((2, 3), (2, 9), (5, 4), (7, 7))]
    assert (of("shorter", *pairs), of("longer", *pairs)) == (62.5, 37.5)


def test_repeated_words_are_a_share_of_the_response() -> None:
    """Prompt {what, is, the, sea}. "The sea, the SEA!" is {the, sea}: 1. "The sea is salt and wide" is 3 of 6:
    more words, but a smaller share. "Salt" has 0 of 1 and "..." no word at all: a tie.
    """
    prompt = "What is the sea?"
    assert of("repeats_prompt", pair("The sea, the SEA!", "The sea is salt and wide", prompt)) == 100.0
    assert of("repeats_prompt", pair("The sea is salt and wide", "The sea, the SEA!", prompt)) == 0.0
    assert of("repeats_prompt", pair("Salt", "...", prompt)) == 50.0


def test_question_marks_are_counted() -> None:
    assert (
        of("more_questions", pair("Why? How?", "What?"), pair("Yes.", "Which one?"), pair("a", "b"), pair("c?", "d?")) == 50.0
    )
    assert of("more_questions", pair("Why? How?", "What?"), pair("a?", "b")) == 100.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.",
        "I’m very sorry to hear that",  # a typographic apostrophe
        "  I am afraid that would be wrong.",
        "I cannot help with that.",
        "I can't say.",
        "I can not do this",
        "I won't tell you.",
        "i couldn’t possibly",
        "I'm not comfortable with this.",
        "I apologise.",
        "As an AI language model, ...",
        "Sorry, no.",
    ],
)
def test_a_refusal_is_known_by_its_beginning(text: str) -> None:
    assert of("refuses", pair(text, "Sure, here it is.")) == 100.0
    assert of("refuses", pair("Sure, here it is.", text)) == 0.0
    assert of("refuses", pair(f"Well. {text}", "Sure.")) == 50.0


@pytest.mark.parametrize(
    "text", ["I can help.", "Ice cannot burn.", "I am happy to.", "I could note three.", "Canned", "As an air"]
)
def test_what_is_no_refusal(text: str) -> None:
    assert of("refuses", pair(text, "Sure.")) == 50.0


def test_a_cue_that_sees_no_difference_scores_as_a_guess() -> None:
    assert cue_accuracies([pair("same", "same", "same")] * 3) == dict.fromkeys(CUES, 50.0)
    with pytest.raises(ValueError, match="no pairs"):
        cue_accuracies([])
