"""What the trainer asks of a preference objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from lifealign.errors import UserError
from lifealign.objectives.ipo import ipo_loss
from lifealign.objectives.preference import PreferenceLoss, dpo_loss, fpo_loss, reference_rewards
from lifealign.objectives.robust import robust_loss
from lifealign.objectives.simpo import simpo_loss, simpo_rewards
from lifealign.registry import register


@dataclass
class Objective(ABC):
    """A loss over preference pairs, with its options as fields.

    ``policy`` and ``reference`` are (pairs, 2) summed log-probabilities, chosen first; ``lengths`` are the (pairs, 2) int64
    tokens that they are sums over.
    """

    needs_reference: ClassVar[bool] = True  # False: ``reference`` is not looked at

    beta: float = 0.1  # strength of the pull towards the reference

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"objective.beta={self.beta}: must be positive and finite")

    @abstractmethod
    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        """The loss of each pair."""

    def rewards(
        self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(pairs,) implicit rewards of the chosen and the rejected responses, differentiable in ``policy``."""
        return reference_rewards(policy.unbind(1), reference.unbind(1), self.beta)

    def gated(self, margins: torch.Tensor) -> torch.Tensor:
        """(pairs,) bool: which pairs of these reward margins the objective leaves alone."""
        return torch.zeros_like(margins, dtype=torch.bool)


@register("objective", "dpo")
class DPO(Objective):
    """Direct Preference Optimization."""

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        return dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=self.beta)


@register("objective", "fpo")
class FPO(Objective):
    """Focalized Preference Optimization, LifeAlign's own."""

    gamma: float = 2.0  # focusing exponent; 0 is DPO
    confidence_threshold: float = 1.0  # pairs with sigmoid(r) above it are left alone; 1 gates nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"objective.gamma={self.gamma}: must be 0 (DPO) or more, and finite")
        if not 0 < self.confidence_threshold <= 1:
            raise UserError(f"objective.confidence_threshold={self.confidence_threshold}: must lie in (0, 1]")

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        return fpo_loss(
            *policy.unbind(1),
            *reference.unbind(1),
            beta=self.beta,
            gamma=self.gamma,
            confidence_threshold=self.confidence_threshold,
        )

    def gated(self, margins: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(margins) > self.confidence_threshold


@register("objective", "ipo")
class IPO(Objective):
    """Identity Preference Optimization: regression of the log-ratio difference on 1 / (2 beta)."""

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        return ipo_loss(*policy.unbind(1), *reference.unbind(1), beta=self.beta)


@register("objective", "simpo")
class SimPO(Objective):
    """Simple Preference Optimization: rewards without a reference, normalised by length."""

    needs_reference: ClassVar[bool] = False

    beta: float = 2.0  # scale of the mean log-probability of a token
    target_margin: float = 1.0  # the paper's gamma; `gamma` is FPO's focusing exponent, which is something else

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target_margin < math.inf:
            raise UserError(f"objective.target_margin={self.target_margin}: must be 0 or more, and finite")

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        return simpo_loss(*policy.unbind(1), *lengths.unbind(1), beta=self.beta, target_margin=self.target_margin)

    def rewards(
        self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return simpo_rewards(*policy.unbind(1), *lengths.unbind(1), self.beta)


@register("objective", "robust")
class Robust(Objective):
    """Robust DPO: unbiased where a known share of the labels is flipped."""

    label_smoothing: float = 0.1  # share of pairs whose label is taken to be flipped; 0 is DPO

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"objective.label_smoothing={self.label_smoothing}: must lie in [0, 0.5); 0 is DPO")

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        return robust_loss(*policy.unbind(1), *reference.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
