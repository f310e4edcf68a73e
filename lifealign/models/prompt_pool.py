"""A pool of prompts with keys: which of them stand in front of a row is decided while the row is read.

Whatever lays rows out (packed, shared, concatenated, generation) only puts placeholders in front of a prompt, ids that no
token has. The input embedding turns them into the vectors of the prompts that suit the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from lifealign.data.batch import Batch
from lifealign.models.policy import Policy


class PromptPool:
    """Gives a policy a pool of prompts (Wang et al. 2022, section 4.2), as hooks on its input embedding.

    A row's query is the mean of the frozen input embeddings of its prompt's tokens. The paper leaves the frozen feature
    extractor free; for images it takes the [CLS] feature of the transformer itself, which costs a second forward pass.

    Adds ``prompts`` (size, length, d) and ``prompt_keys`` (size, d), float32, to what the policy trains. Prompts start as
    embeddings of random tokens, keys as random directions of norm 1 or so.

    Args:
        size: prompts in the pool, M in the paper.
        length: vectors a prompt, L_p in the paper.
        top_k: prompts in front of a row, N in the paper.
    """

    def __init__(self, policy: Policy, *, size: int, length: int, top_k: int, generator: torch.Generator) -> None:
        self._embedding, self._added = policy.base.get_input_embeddings(), policy.added
        weight = self._embedding.weight
        self._first = len(weight)  # the placeholder of the first slot; no token has this id
        self.top_k = top_k
        self.penalty = torch.ones(size)  # factor on a prompt's distance while training
        self.distances = torch.empty(0, top_k)  # (rows, top_k) of the rows read last, to the keys selected
        self._segments: torch.Tensor | None = None  # of the batch that the policy is reading
        self._ids: torch.Tensor | None = None  # with placeholders, while the embedding is looked up
        policy.prefix = tuple(range(self._first, self._first + top_k * length))
        tokens = torch.randint(self._first, (size, length), generator=generator).to(weight.device)
        directions = torch.randn(size, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        with torch.no_grad():
            policy.added["prompts"] = nn.Parameter(self._embedding(tokens).float())
            policy.added["prompt_keys"] = nn.Parameter(directions.to(weight.device))
        policy.register_forward_pre_hook(self._open)
        policy.register_forward_hook(self._close, always_call=True)
        self._embedding.register_forward_pre_hook(self._hide)
        self._embedding.register_forward_hook(self._fill)

    def select(self, queries: torch.Tensor, *, penalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts that suit each row (eq. 3, with ``penalised`` eq. 4), the most suitable first.

        Args:
            queries: (rows, d).

        Returns:
            (rows, top_k) int64 numbers of prompts, and their cosine distances, differentiable in the keys.
        """
        distances = 1 - normalize(queries, dim=1) @ normalize(self._added["prompt_keys"], dim=1).T
        cost = distances.detach() * (self.penalty.to(distances.device) if penalised else 1)
        selected = cost.topk(self.top_k, largest=False).indices
        return selected, distances.gather(1, selected)

    def queries(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, d) float32 of prompts given by their token ids."""
        device = self._embedding.weight.device
        return torch.cat([self._queries(ids := torch.tensor(p, device=device), torch.zeros_like(ids), 1) for p in prompts])

    def _queries(self, ids: torch.Tensor, rows: torch.Tensor, number: int) -> torch.Tensor:
        """The same from tokens, (tokens,), and the row that each is of."""
        embedded = self._embedding.weight.detach()[ids].float()
        sums = embedded.new_zeros(number, embedded.shape[1]).index_add_(0, rows, embedded)
        return sums / rows.bincount(minlength=number).unsqueeze(1)

    def _open(self, module: nn.Module, inputs: tuple[Batch, ...]) -> None:
        self._segments = inputs[0].segments

    def _close(self, *call: Any) -> None:
        self._segments = None

    def _hide(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Give the lookup ids that it knows; ids without placeholders (the reference, a decoding step) stay as they are."""
        (ids,) = inputs
        self._ids = ids if (ids >= self._first).any() else None
        return None if self._ids is None else (ids.clamp(max=self._first - 1),)

    def _fill(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Put the prompts that suit each row where its placeholders are; gradients reach those prompts."""
        if self._ids is None:
            return None
        ids, self._ids = self._ids, None
        rows, slots = _rows(ids == self._first), ids - self._first
        # In generation there are no segments: what follows the placeholders is all prompt, and padding stands in front.
        is_prompt = (slots < 0) & (rows >= 0) & (self._segments == 0 if self._segments is not None else True)
        queries = self._queries(ids[is_prompt], rows[is_prompt], int(rows.max()) + 1)
        selected, self.distances = self.select(queries, penalised=module.training)
        prompts = self._added["prompts"][selected].flatten(1, 2).to(output.dtype)  # (rows, top_k * length, d)
        held = slots >= 0
        return output.index_put((held,), prompts[rows[held], slots[held]])


def _rows(opens: torch.Tensor) -> torch.Tensor:
    """(lines, length) int64 number of the row that a position belongs to, from where rows open; -1 before a line's first."""
    within, on_line = opens.cumsum(1), opens.sum(1, keepdim=True)
    return (within + on_line.cumsum(0) - on_line - 1).where(within > 0, -1)
