"""Replay buffers: bounded samples of the pairs of past tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lifealign.data.tokenize import Pair
from lifealign.errors import UserError


class ReplayBuffer:
    """A uniform share of each past task, oldest first; the oldest leave when it is full (docs/method.md, Replay).

    Args:
        size: how many pairs it holds at most.
        fraction: share of each task's own pairs that enters, drawn uniformly at random.
    """

    def __init__(self, size: int, fraction: float) -> None:
        self.size, self.fraction = size, fraction
        self.pairs: list[Pair] = []

    def add(self, pairs: Sequence[Pair], generator: torch.Generator) -> None:
        """Let a task's sample in; the oldest leave where the buffer is full."""
        drawn = torch.randperm(len(pairs), generator=generator)[: round(self.fraction * len(pairs))]
        entering = [pairs[i] for i in drawn.tolist()]
        self.pairs = (self.pairs + entering)[-self.size :] if self.size else []

    def state_dict(self) -> dict[str, Any]:
        """The pairs as JSON values."""
        return {"pairs": [asdict(pair) for pair in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; where fewer pairs are held now, the oldest are left out.

        Raises:
            UserError: for the state of another kind of buffer, whose order is not that of age.
        """
        if "seen" in state:
            raise UserError("strategy.buffer=uniform: the run's buffer is another; go on with strategy.buffer=reservoir")
        pairs = [Pair(**values) for values in state["pairs"]]
        self.pairs = pairs[max(0, len(pairs) - self.size) :]


class Reservoir(ReplayBuffer):
    """A uniform sample of all pairs of all past tasks: each is as likely to be held as any other (Vitter, 1985, algorithm R).

    Args:
        size: how many pairs it holds at most.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, 1.0)
        self.seen = 0  # pairs that have come by

    def add(self, pairs: Sequence[Pair], generator: torch.Generator) -> None:
        """Let a task's pairs come by in random order."""
        for i in torch.randperm(len(pairs), generator=generator).tolist():
            place = int(torch.randint(self.seen + 1, (), generator=generator))
            self.seen += 1
            if len(self.pairs) < self.size:
                self.pairs.append(pairs[i])
            elif place < self.size:
                self.pairs[place] = pairs[i]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of a uniform buffer, but that what is left out is drawn at random.

        Raises:
            UserError: for the state of another kind of buffer, of which nobody knows how many pairs have come by, or where
                the buffer was full and is larger now: pairs to come would be surer of a place than those it met.
        """
        if "seen" not in state:
            raise UserError("strategy.buffer=reservoir: the run's buffer is another; go on with strategy.buffer=uniform")
        self.seen, pairs = state["seen"], [Pair(**values) for values in state["pairs"]]
        if len(pairs) < min(self.size, self.seen):
            raise UserError(
                f"strategy.buffer_size={self.size}: the run's buffer was full at {len(pairs)} pairs; it cannot grow"
            )
        drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.seen))[: self.size]
        self.pairs = [pairs[i] for i in sorted(drawn.tolist())]
