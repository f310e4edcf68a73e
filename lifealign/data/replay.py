"""The replay buffer: a bounded, first-in first-out sample of the pairs of past tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lifealign.data.tokenize import Pair


class ReplayBuffer:
    """Pairs of past tasks, oldest first (docs/method.md, Replay).

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

    def state_dict(self) -> list[dict[str, Any]]:
        """The pairs as JSON values."""
        return [asdict(pair) for pair in self.pairs]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.pairs = [Pair(**values) for values in state]
