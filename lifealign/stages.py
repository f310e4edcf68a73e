"""The two stages of a task: what a row holds, what the loss is a mean over, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lifealign.data.batch import Row
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import ReferenceLogps, pair_row
from lifealign.objectives import Objective


@dataclass
class StageOptions:
    """``sft.*`` and ``preference.*``. One optimiser step sees micro_batch_size x accumulation x ranks pairs."""

    epochs: int = 1  # 0 skips the stage
    lr: float = 1e-4
    micro_batch_size: int = 8  # pairs a rank holds at once
    gradient_accumulation_steps: int | None = None  # None: 1, or what batch_size asks for
    batch_size: int | None = None  # pairs a step over all ranks; set it to make results independent of their number
    warmup_share: float = 0.1  # share of the steps in which the learning rate rises; then a cosine to 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 0  # steps of a task's stage that may be left out because their loss is no number

    def check(self, stage: str) -> None:
        """Raises UserError for a value out of range, under the key ``stage``."""
        for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{stage}.{key}={value}: must be at least 1")
        for key in ("epochs", "lr", "weight_decay", "max_grad_norm", "max_skipped_steps"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{stage}.{key}={getattr(self, key)}: must be 0 or more, and finite")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"{stage}.warmup_share={self.warmup_share}: must lie in [0, 1]")

    def accumulation(self, stage: str, ranks: int) -> int:
        """Micro-batches a rank takes to one optimiser step.

        Raises:
            UserError: where the batch sizes do not divide.
        """
        if self.batch_size is None:
            return self.gradient_accumulation_steps or 1
        at_once = self.micro_batch_size * ranks
        steps, rest = divmod(self.batch_size, at_once)
        if rest or self.gradient_accumulation_steps not in (None, steps):
            raise UserError(
                f"{stage}.batch_size={self.batch_size} is not micro_batch_size={self.micro_batch_size} x {ranks} ranks x "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps or steps or 1}; use a batch_size of "
                f"{at_once * (self.gradient_accumulation_steps or steps or 1)}, or another micro_batch_size"
            )
        return steps

    def global_batch(self, stage: str, ranks: int) -> int:
        """Pairs an optimiser step sees, over all ranks."""
        return self.micro_batch_size * self.accumulation(stage, ranks) * ranks

    def steps(self, pairs: int, stage: str, ranks: int) -> int:
        """Optimiser steps of the whole stage."""
        return self.epochs * math.ceil(pairs / self.global_batch(stage, ranks))


class Outcome(NamedTuple):
    """What a stage makes of a micro-batch."""

    losses: torch.Tensor  # (pairs,) each summed over what the loss is a mean of; differentiable
    figures: dict[str, torch.Tensor]  # (pairs,) each, detached; their means over pairs are logged


class Stage(Protocol):
    """A stage of a task, as the trainer sees it."""

    name: str

    def row(self, pair: Pair) -> Row: ...

    def size(self, pair: Pair) -> int:
        """What a pair adds to the count that the loss of a global batch is divided by."""

    def outcome(self, logps: torch.Tensor, pairs: Sequence[Pair]) -> Outcome: ...


class SupervisedStage:
    """Maximum likelihood on the chosen responses; the mean is over target tokens."""

    name = "sft"

    def row(self, pair: Pair) -> Row:
        return Row(pair.prompt, (pair.chosen,))

    def size(self, pair: Pair) -> int:
        return len(pair.chosen)

    def outcome(self, logps: torch.Tensor, pairs: Sequence[Pair]) -> Outcome:
        return Outcome(-logps, {})


class PreferenceStage:
    """A preference objective against the reference without adapter; the mean is over pairs."""

    name = "preference"

    def __init__(self, objective: Objective, reference: ReferenceLogps) -> None:
        self.objective, self.reference = objective, reference

    def row(self, pair: Pair) -> Row:
        return pair_row(pair)

    def size(self, pair: Pair) -> int:
        return 1

    def known(self, pairs: Sequence[Pair], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(pairs, 2) log-probabilities under the reference, and tokens, of chosen and rejected; the first are zeros where the
        objective does not look at them."""
        lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
        logps = self.reference.of(pairs) if self.objective.needs_reference else torch.zeros(len(pairs), 2)
        return logps.to(device, non_blocking=True), lengths.to(device, non_blocking=True)

    def outcome(self, logps: torch.Tensor, pairs: Sequence[Pair]) -> Outcome:
        result = self.objective(logps.view(-1, 2), *self.known(pairs, logps.device))
        margins = result.chosen_rewards - result.rejected_rewards
        return Outcome(
            result.losses,
            {
                "accuracy": (margins > 0).float(),
                "margin": margins,
                "chosen_reward": result.chosen_rewards,
                "rejected_reward": result.rejected_rewards,
                "focal_weight": result.weights,
                "gated_share": self.objective.gated(margins).float(),
            },
        )
