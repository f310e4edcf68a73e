"""A pair as the model meets it: the template's text token by token, and the tokens that carry a loss marked."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lifealign.data.batch import RowLayout, collate
from lifealign.data.tokenize import Pair
from lifealign.models.scoring import pair_row

SHOWN = 48  # tokens of a prompt, counted from its end, and of a response, from its beginning
LAST = 3  # tokens of a response that are shown whatever its length: its end is learned, too
OPEN, CLOSE = "⟦", "⟧"
LOSS = "bold green"


def example(pair: Pair, tokenizer: PreTrainedTokenizerBase, task: str) -> Text:
    """Both sequences of a pair. What is marked is read off the batch that training would be given, not off the pair."""
    text = Text(f"Example of {task}, row {pair.id}: {OPEN}token{CLOSE} has a loss; … stands for tokens left out\n")
    for title, (ids, marked) in zip(("chosen (both stages)", "rejected (preference stage)"), _lines(pair), strict=True):
        text.append(f"{title}\n", style="italic")
        text.append_text(_marked(ids, marked, tokenizer))
        text.append("\n")
    return text


def _lines(pair: Pair) -> list[tuple[list[int], list[bool]]]:
    """(token ids, whether each is a target) of the chosen and the rejected sequence.

    The last token of a response predicts nothing and so is no input; it is the last target.
    """
    batch = collate([pair_row(pair)], layout=RowLayout.concatenated, pad_token_id=0)
    width, lines = batch.input_ids.shape[1], []
    for number in range(batch.num_sequences):
        own = batch.sequence_ids == number
        behind = (batch.predictors[own] - number * width + 1).tolist()
        places = dict(zip(behind, batch.targets[own].tolist(), strict=True))
        inputs = batch.input_ids[number].tolist()
        ids = [places.get(at, inputs[at] if at < width else 0) for at in range(max(places) + 1)]
        lines.append((ids, [at in places for at in range(len(ids))]))
    return lines


def _marked(ids: Sequence[int], marked: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    text, first = Text(), marked.index(True)
    kept = {*range(max(0, first - SHOWN), min(len(ids), first + SHOWN)), *range(len(ids) - LAST, len(ids))}
    for at, (id, has_loss) in enumerate(zip(ids, marked, strict=True)):
        if at not in kept:
            if at - 1 in kept or at == 0:
                text.append(" … ")
            continue
        shown = visible(tokenizer.decode([id]))
        text.append(f"{OPEN}{shown}{CLOSE}" if has_loss else shown, style=LOSS if has_loss else "")
    return text


def visible(text: str) -> str:
    """Control characters as Python writes them, so that no row can move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
