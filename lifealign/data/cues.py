"""What trivial cues alone would score on preference pairs.

A cue takes the response with more of something for the better one. Where it is right far more or far less often than in 50 % of
the pairs, a model may have learnt the cue and nothing else, and the task's accuracy must be read beside the cue's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lifealign.data.tokenize import Pair

_WORD = re.compile(r"\w+")
_REFUSAL = re.compile(
    r"(i['’]?m|i am) (very |so |really |truly )?(sorry|afraid|unable|not able|not (going|allowed|comfortable))\b"
    r"|i (apologi[sz]e|refuse|decline)\b"
    r"|i (can ?not|can['’]t|won['’]t|(could|would|will) not|(could|would)n['’]t)\b"
    r"|as an (ai|artificial)\b|sorry\b",
    re.IGNORECASE,
)

Cue = Callable[[Pair], tuple[float, float]]  # how much of something the chosen and the rejected response have


def _of_texts(measure: Callable[[str, str], float]) -> Cue:
    """A cue that reads texts: ``measure(prompt, response)``."""

    def cue(pair: Pair) -> tuple[float, float]:
        return measure(pair.prompt_text, pair.chosen_text), measure(pair.prompt_text, pair.rejected_text)

    return cue


def _repeated(prompt: str, response: str) -> float:
    """Share of the response's words, each counted once, that stand in the prompt."""
    asked, said = ({*_WORD.findall(text.casefold())} for text in (prompt, response))
    return len(asked & said) / len(said) if said else 0.0


CUES: dict[str, Cue] = {
    "shorter": lambda pair: (-len(pair.chosen), -len(pair.rejected)),  # tokens, as the model sees them: after truncation
    "longer": lambda pair: (len(pair.chosen), len(pair.rejected)),
    "repeats_prompt": _of_texts(_repeated),
    "more_questions": _of_texts(lambda _, response: response.count("?")),
    "refuses": _of_texts(lambda _, response: _REFUSAL.match(response.lstrip()) is not None),
}
"""Name of a cue -> how much each response has of it. The one that has more is taken for the better one."""


def cue_accuracies(pairs: Sequence[Pair]) -> dict[str, float]:
    """For each of :data:`CUES`, the percentage of pairs in which it finds the chosen response; a tie counts half.

    So 50 is what a guess scores, a cue that never applies scores 50, and one at 20 gives 80 to whoever takes its opposite.
    ``shorter`` and ``longer`` add up to 100.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("no pairs to find cues in")
    return {name: 100 * sum(_won(*cue(pair)) for pair in pairs) / len(pairs) for name, cue in CUES.items()}


def _won(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)
