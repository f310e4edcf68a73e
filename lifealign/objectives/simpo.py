"""SimPO as a pure function of sequence log-probabilities (Meng et al., 2024, arXiv 2405.14734)."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from lifealign.objectives.preference import PreferenceLoss


def simpo_rewards(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """r_p and r_d of :func:`simpo_loss`; (pairs,) each, at least float32."""
    # Half precision would cost digits that the caller's log-probabilities still have.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    return beta * policy_chosen_logps.to(dtype) / chosen_lengths, beta * policy_rejected_logps.to(dtype) / rejected_lengths


def simpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    *,
    beta: float = 2.0,
    target_margin: float = 1.0,
) -> PreferenceLoss:
    """Simple Preference Optimization (eq. 6 of the paper). There is no reference.

        r_p = beta / |y_p| * log pi(y_p|x)        r_d = beta / |y_d| * log pi(y_d|x)
        L   = -log sigmoid(r_p - r_d - target_margin)

    The rewards of the result are r_p and r_d: lengths are divided out, and the target margin is not taken off.

    Args:
        policy_chosen_logps, policy_rejected_logps: (pairs,) log-probabilities under the policy, summed over tokens.
        chosen_lengths, rejected_lengths: (pairs,) int64 tokens of each response, all that the sums are over; at least 1.
        beta: scale of the mean log-probability of a token.
        target_margin: the paper's gamma, by how much r_p is to exceed r_d; 0 or more.
    """
    chosen_rewards, rejected_rewards = simpo_rewards(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta
    )
    losses = -logsigmoid(chosen_rewards - rejected_rewards - target_margin)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach(), torch.ones_like(losses))
