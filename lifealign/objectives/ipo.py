"""IPO as a pure function of sequence log-probabilities (Azar et al., 2023, arXiv 2310.12036)."""

from __future__ import annotations

import torch

from lifealign.objectives.preference import PreferenceLoss, reference_rewards


def ipo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Identity Preference Optimization (eq. 17 of the paper, whose tau is ``beta`` here).

        h = (log pi(y_p|x) - log pi_ref(y_p|x)) - (log pi(y_d|x) - log pi_ref(y_d|x))
        L = (h - 1 / (2 * beta))^2

    The loss is regression on a target, so a pair that went past it is pulled back: unlike DPO's, it keeps the policy near
    the reference where the labels never disagree. Log-probabilities are sums, as in the paper; some later code averages
    them over tokens.

    Args:
        policy_chosen_logps, policy_rejected_logps: (pairs,) log-probabilities under the policy, summed over tokens.
        reference_chosen_logps, reference_rejected_logps: (pairs,) the same under the base without its adapter.
        beta: strength of the pull towards the reference; the target of h is 1 / (2 * beta).
    """
    policy, reference = (policy_chosen_logps, policy_rejected_logps), (reference_chosen_logps, reference_rejected_logps)
    chosen, rejected = reference_rewards(policy, reference, 1.0)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach(), torch.ones_like(losses))
