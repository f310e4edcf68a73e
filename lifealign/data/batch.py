"""From token ids to the tensors of one forward pass.

A *row* is a prompt with one or more responses. Under the shared-prefix layout it is one line of the batch,
``prompt | response | response``: each response attends to the prompt and to itself, and its positions continue the
prompt's. The last prompt token predicts the first token of every response. The last token of a response predicts nothing
and is left out. The packed layout puts all rows, laid out like this, on a single line, padded at its end to one of few
lengths (:func:`padded`). Under the concatenated layout each response is a line of its own behind a copy of the prompt.
All give the same log-probabilities; the first two compute the prompt once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import torch


class RowLayout(Enum):
    """How rows become lines of a batch."""

    auto = "auto"  # the cheapest that the loaded model computes correctly
    packed = "packed"
    shared = "shared"
    concatenated = "concatenated"


PADDING = -1  # segment of padded positions; 0 is the prompt, 1, 2, ... are responses


class Row(NamedTuple):
    """Token ids of a prompt and of its responses."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def spans(self) -> tuple[int, ...]:
        """Positions of the prompt, then of each response: all of its tokens but the last."""
        return len(self.prompt), *(len(response) - 1 for response in self.responses)

    @property
    def length(self) -> int:
        """Positions on a line of its own."""
        return sum(self.spans)


@dataclass(frozen=True)
class Batch:
    """``lines`` x ``length`` token positions, of which ``targets`` many carry a prediction.

    Sequences are numbered row by row: response k of row i among rows of R responses is sequence i * R + k.
    """

    input_ids: torch.Tensor  # (lines, length) int64
    position_ids: torch.Tensor  # (lines, length) int64
    segments: torch.Tensor  # (lines, length) int64: PADDING, 0 or the response's number in its line
    predictors: torch.Tensor  # (targets,) int64 index into the flattened positions: where each target is predicted
    targets: torch.Tensor  # (targets,) int64 token ids
    sequence_ids: torch.Tensor  # (targets,) int64
    read: torch.Tensor  # (positions,) int64, ascending: the predictors once each, and under packing some more
    num_sequences: int
    layout: RowLayout
    spans: tuple[tuple[int, ...], ...]  # a row each: positions of prompt and responses; last, a packed line's padding
    tokens: int  # positions that are not padding

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a card it goes through pinned memory, so that the host need not wait for the card."""
        to_card = device.type == "cuda" and self.input_ids.device.type == "cpu"

        def moved(value: torch.Tensor) -> torch.Tensor:
            return (value.pin_memory() if to_card else value).to(device, non_blocking=to_card)

        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: moved(v) if isinstance(v, torch.Tensor) else v for k, v in held.items()})

    @property
    def needs_mask(self) -> bool:
        """Whether plain causal attention along a line would let a token see what it must not.

        Padding stands at the end of a line, so causal attention alone keeps it out of sight of the rest.
        """
        several = any(len(span) > 2 for span in self.spans)
        return self.layout is RowLayout.packed or (self.layout is RowLayout.shared and several)

    def attention_mask(self) -> torch.Tensor:
        """(lines, 1, length, length) bool, True where a query sees a key. Not for the packed layout."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(key.shape[-1], key.shape[-1], dtype=torch.bool, device=key.device).tril()
        return ((((key == 0) & (query != PADDING)) | (key == query)) & causal).unsqueeze(1)


def collate(rows: Sequence[Row], *, layout: RowLayout, pad_token_id: int) -> Batch:
    """Lay rows out as one batch; lines are padded at the end to the longest.

    Raises:
        ValueError: for a row without prompt, or with an empty response: there would be nothing to predict from or to.
    """
    if any(not row.prompt or not row.responses or not all(row.responses) for row in rows):
        raise ValueError("a row needs a prompt and responses of at least one token")
    lines = _lines(rows, layout)
    length = _length(lines, layout)
    ids = torch.full((len(lines), length), pad_token_id)
    positions = torch.zeros_like(ids)  # of padding: one that every model has
    segments = torch.full((len(lines), length), PADDING)
    predictors, targets, sequence_ids = [], [], []
    for number, line in enumerate(lines):
        start = 0
        for row in line:
            end = start + len(row.prompt)
            ids[number, start:end] = torch.tensor(row.prompt)
            positions[number, start:end] = torch.arange(len(row.prompt))
            segments[number, start:end] = 0
            last_of_prompt = number * length + end - 1
            for segment, response in enumerate(row.responses, 1):
                start, end = end, end + len(response) - 1
                ids[number, start:end] = torch.tensor(response[:-1])
                positions[number, start:end] = torch.arange(len(row.prompt), len(row.prompt) + end - start)
                segments[number, start:end] = segment
                here = number * length + torch.arange(start - 1, end)
                here[0] = last_of_prompt
                predictors.append(here)
                targets.append(torch.tensor(response))
                sequence_ids.append(torch.full((len(response),), len(sequence_ids)))
            start = end
    all_predictors = torch.cat(predictors)
    spans = [row.spans for line in lines for row in line]
    tokens = sum(map(sum, spans))
    if layout is RowLayout.packed and length > tokens:
        spans.append((length - tokens,))  # a row that nobody reads
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=segments,
        predictors=all_predictors,
        read=_read(all_predictors, ids.numel()) if layout is RowLayout.packed else all_predictors.unique(),
        targets=torch.cat(targets),
        sequence_ids=torch.cat(sequence_ids),
        num_sequences=len(sequence_ids),
        layout=layout,
        spans=tuple(spans),
        tokens=tokens,
    )


def _lines(rows: Sequence[Row], layout: RowLayout) -> list[list[Row]]:
    """Which rows, or parts of rows, stand on which line."""
    if layout is RowLayout.packed:
        return [list(rows)]
    if layout is RowLayout.shared:
        return [[row] for row in rows]
    return [[Row(row.prompt, [response])] for row in rows for response in row.responses]


def _length(lines: Sequence[Sequence[Row]], layout: RowLayout) -> int:
    """Positions of each line."""
    longest = max(sum(row.length for row in line) for line in lines)
    return padded(longest) if layout is RowLayout.packed else longest


def padded(number: int) -> int:
    """``number`` rounded up to one of 32 between a power of two and the next, so by less than 1/32.

    A matrix product is prepared for each number of rows that it meets, in bfloat16 on a CPU even compiled. Batches of ever
    new numbers of tokens were measured to take an eighth longer there than batches of a few.
    """
    step = 1 << max(0, number.bit_length() - 6)
    return -(-number // step) * step


def _read(predictors: torch.Tensor, positions: int) -> torch.Tensor:
    """The predictors, ascending and once each, filled up to a padded number with the first other positions."""
    is_read = torch.zeros(positions, dtype=torch.bool)
    is_read[predictors] = True
    number = int(is_read.sum())
    is_read[(~is_read).nonzero()[: padded(number) - number]] = True
    return is_read.nonzero().squeeze(1)


class Extent(NamedTuple):
    """What one batch or several hold, and what they cost."""

    tokens: int  # positions that are not padding
    positions: int  # lines x length

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


def extent(rows: Sequence[Row], layout: RowLayout) -> Extent:
    """The extent of the batch that :func:`collate` would make of these rows, found from their lengths."""
    lines = _lines(rows, layout)
    return Extent(sum(row.length for line in lines for row in line), _length(lines, layout) * len(lines))


def length_buckets(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of all rows in groups of at most ``size`` of like length, longest first (memory runs out early or never)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
