"""Robust DPO as a pure function of sequence log-probabilities (Chowdhury et al., 2024, arXiv 2403.00409)."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from lifealign.objectives.preference import PreferenceLoss, reference_rewards


def robust_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> PreferenceLoss:
    """DPO that is right on average where a share ``label_smoothing`` of the labels is flipped (the paper's rDPO).

    With r the reward margin, eps the share and D(r) = -log sigmoid(r) the loss of DPO:

        L = ((1 - eps) * D(r) - eps * D(-r)) / (1 - 2 * eps)

    Its mean over labels flipped with probability eps is D(r) of the true label. Since D(-r) = D(r) + r, this is

        L = D(r) - eps / (1 - 2 * eps) * r

    which is computed here: the first form takes the difference of two large numbers as eps nears 1/2. The loss of a pair may
    be negative, and falls without bound as its margin grows: a clip there would undo the unbiasedness.

    Args:
        policy_chosen_logps, policy_rejected_logps: (pairs,) log-probabilities under the policy, summed over tokens.
        reference_chosen_logps, reference_rejected_logps: (pairs,) the same under the base without its adapter.
        beta: strength of the pull towards the reference.
        label_smoothing: eps, in [0, 0.5); 0 is DPO.
    """
    policy, reference = (policy_chosen_logps, policy_rejected_logps), (reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = reference_rewards(policy, reference, beta)
    margin = chosen_rewards - rejected_rewards
    losses = -logsigmoid(margin) - label_smoothing / (1 - 2 * label_smoothing) * margin
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach(), torch.ones_like(losses))
