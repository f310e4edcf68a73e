"""FPO and DPO as pure functions of sequence log-probabilities (LifeAlign, AAAI 2026, arXiv 2509.17183)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


class PreferenceLoss(NamedTuple):
    """What a preference objective says of each pair; every tensor has shape (pairs,)."""

    losses: torch.Tensor  # to be averaged over all pairs of the global batch, gated ones included
    chosen_rewards: torch.Tensor  # beta * (log pi_theta - log pi_ref) of the chosen response (SimPO: its own), detached
    rejected_rewards: torch.Tensor  # the same of the rejected one, detached
    weights: torch.Tensor  # focal weight, 0 where the pair is gated; detached


def reference_rewards(
    policy: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor], beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """beta * (log pi_theta - log pi_ref) of the chosen and the rejected responses; (pairs,) each, at least float32."""
    # Half precision would cost digits that the caller's log-probabilities still have.
    dtype = torch.promote_types(policy[0].dtype, torch.float32)
    chosen, rejected = (beta * (ours.to(dtype) - base.to(dtype)) for ours, base in zip(policy, reference, strict=True))
    return chosen, rejected


def fpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 2.0,
    confidence_threshold: float = 1.0,
) -> PreferenceLoss:
    """Focalized Preference Optimization.

        r = beta * [(log pi(y_p|x) - log pi_ref(y_p|x)) - (log pi(y_d|x) - log pi_ref(y_d|x))]
        L = -(1 - sigmoid(r))^gamma * log sigmoid(r)

    The gradient flows through the focal weight. A pair with sigmoid(r) > ``confidence_threshold`` has zero loss and
    zero gradient.

    Args:
        policy_chosen_logps, policy_rejected_logps: (pairs,) log-probabilities under the policy, summed over tokens.
        reference_chosen_logps, reference_rejected_logps: (pairs,) the same under the base without its adapter.
        beta: strength of the pull towards the reference.
        gamma: focusing exponent, >= 0; 0 is DPO.
        confidence_threshold: in (0, 1]; 1 gates nothing.
    """
    policy, reference = (policy_chosen_logps, policy_rejected_logps), (reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = reference_rewards(policy, reference, beta)
    margin = chosen_rewards - rejected_rewards
    # (1 - sigmoid(r))^gamma through its logarithm: exact in both tails. A constant 1 at gamma = 0, where r is infinite, too.
    weights = torch.exp(gamma * logsigmoid(-margin)) if gamma else torch.ones_like(margin)
    gated = torch.sigmoid(margin.detach()) > confidence_threshold
    losses = torch.where(gated, 0.0, -weights * logsigmoid(margin))
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach(), weights.detach() * ~gated)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Direct Preference Optimization (Rafailov et al., 2023, eq. 7): :func:`fpo_loss` at gamma = 0."""
    return fpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        gamma=0.0,
    )
