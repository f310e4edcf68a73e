"""What the trainer asks of a preference objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from lifealign.errors import UserError
from lifealign.objectives.preference import PreferenceLoss, dpo_loss, fpo_loss
from lifealign.registry import register


@dataclass
class Objective(ABC):
    """A loss over preference pairs, with its options as fields.

    ``policy`` and ``reference`` are (pairs, 2) summed log-probabilities, chosen first.
    """

    beta: float = 0.1  # strength of the pull towards the reference

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta={self.beta}: must be positive")

    @abstractmethod
    def __call__(self, policy: torch.Tensor, reference: torch.Tensor) -> PreferenceLoss:
        """The loss of each pair."""

    def gated(self, margins: torch.Tensor) -> torch.Tensor:
        """(pairs,) bool: which pairs of these reward margins the objective leaves alone."""
        return torch.zeros_like(margins, dtype=torch.bool)


@register("objective", "dpo")
class DPO(Objective):
    """Direct Preference Optimization."""

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor) -> PreferenceLoss:
        return dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=self.beta)


@register("objective", "fpo")
class FPO(Objective):
    """Focalized Preference Optimization, LifeAlign's own."""

    gamma: float = 2.0  # focusing exponent; 0 is DPO
    confidence_threshold: float = 1.0  # pairs with sigmoid(r) above it are left alone; 1 gates nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise UserError(f"objective.gamma={self.gamma}: must be 0 (DPO) or more")
        if not 0 < self.confidence_threshold <= 1:
            raise UserError(f"objective.confidence_threshold={self.confidence_threshold}: must lie in (0, 1]")

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor) -> PreferenceLoss:
        return fpo_loss(
            *policy.unbind(1),
            *reference.unbind(1),
            beta=self.beta,
            gamma=self.gamma,
            confidence_threshold=self.confidence_threshold,
        )

    def gated(self, margins: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(margins) > self.confidence_threshold
