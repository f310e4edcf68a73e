"""The focal-weighted preference loss of a pair and its gradient, in one pass over (pairs, 2) log-probabilities.

    r = β·[(log π_θ(chosen) − log π_ref(chosen)) − (log π_θ(rejected) − log π_ref(rejected))],   p = σ(r)
    L = −(1 − p)^γ · log p          dL/dr = γ·(1 − p)^γ·p·log p − (1 − p)^(γ+1)          dL/dlogp = (β·dL/dr, −β·dL/dr)

Powers are taken through logarithms, log p = log σ(r) and log(1 − p) = log σ(−r), so both tails are exact. A pair with
p > τ is gated: loss, weight and gradient 0. NaN is not above τ and so is not gated: it must be seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from .dispatch import choose_triton


class FocalLoss(NamedTuple):
    """Of each pair; only ``losses`` carries a gradient, and only to the policy."""

    losses: torch.Tensor  # (pairs,)
    weights: torch.Tensor  # (pairs,) focal weight (1 − σ(r))^γ, 0 where gated
    margins: torch.Tensor  # (pairs,) r
    gradients: torch.Tensor  # (pairs, 2) d loss / d policy


def reference_focal_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, gamma: float, confidence_threshold: float
) -> FocalLoss:
    """The formulas above in torch; policy and reference (pairs, 2), chosen first, in the dtype of the result."""
    rewards = beta * (policy - reference)
    r = rewards[:, 0] - rewards[:, 1]
    log_p, log_q = logsigmoid(r), logsigmoid(-r)
    weights = torch.exp(gamma * log_q) if gamma else torch.ones_like(r)
    slope = weights * (gamma * torch.sigmoid(r) * log_p - torch.sigmoid(-r))
    gated = torch.sigmoid(r) > confidence_threshold
    losses, weights, slope = (torch.where(gated, 0.0, x) for x in (-weights * log_p, weights, slope))
    return FocalLoss(losses, weights, r, torch.stack([beta * slope, -beta * slope], dim=1))


class _FocalPreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, policy: torch.Tensor, reference: torch.Tensor, settings: tuple[float, float, float], fused: bool
    ) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(policy.dtype, torch.float32)
        inputs = policy.to(dtype), reference.to(dtype)
        if fused:
            from .fused_loss import triton_focal_loss  # triton need not be installed

            result = FocalLoss(*triton_focal_loss(*inputs, *settings))
        else:
            result = reference_focal_loss(*inputs, *settings)
        ctx.dtype = policy.dtype
        ctx.save_for_backward(result.gradients)
        ctx.mark_non_differentiable(result.weights, result.margins, result.gradients)
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_losses[:, None]).to(ctx.dtype), None, None, None


def focal_preference_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 2.0,
    confidence_threshold: float = 1.0,
    impl: str | None = None,
) -> FocalLoss:
    """Loss, focal weight, margin and gradient of each preference pair; LifeAlign's FPO, DPO at ``gamma=0``.

    Args:
        policy: (pairs, 2) summed log-probabilities under the policy, chosen first, in any floating dtype.
        reference: (pairs, 2) the same under the reference; a constant.
        beta: strength of the pull towards the reference.
        gamma: focusing exponent, >= 0.
        confidence_threshold: in (0, 1]; a pair with sigmoid(r) above it has zero loss and gradient; 1 gates nothing.
        impl: "reference" (torch) or "triton"; None picks for the device.

    Returns:
        :class:`FocalLoss` in float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes that do not agree, an unknown ``impl``, or "triton" where it cannot run.
    """
    if policy.ndim != 2 or policy.shape[1] != 2 or reference.shape != policy.shape:
        raise ValueError(f"policy (n, 2) and reference (n, 2) expected, got {tuple(policy.shape)} and {tuple(reference.shape)}")
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"impl={impl!r} is unknown; known: reference, triton")
    fused = choose_triton(policy, impl)
    return FocalLoss(*_FocalPreferenceLoss.apply(policy, reference, (beta, gamma, confidence_threshold), fused))
