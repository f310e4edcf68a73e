"""Triton kernel of the focal-weighted preference loss; formulas and shapes are those of loss.py.

A dozen elementwise torch kernels on a handful of pairs are a dozen launches; this is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fused import check_device, on_device


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) − log1p(exp(−|x|)).

    With u = 1 + e rounded, log(u)·e/(u − 1) makes good what rounding took from e; e itself where nothing is left of it.
    """
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    left = u - 1.0
    log1p = tl.where(left == 0.0, e, tl.log(u) * (e / tl.where(left == 0.0, 1.0, left)))
    return tl.where(x < 0, x, 0.0) - tl.where(x == x, log1p, x)  # exp(−|NaN|) may come out as a number


@triton.jit(do_not_specialize=["pairs"])
def _focal_loss_kernel(
    policy, reference, losses, weights, margins, gradients, pairs, beta, gamma, threshold, BLOCK: tl.constexpr
):
    """policy, reference, gradients (pairs, 2); losses, weights, margins (pairs,); all float32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < pairs
    chosen = beta * (tl.load(policy + 2 * i, mask=mask, other=0.0) - tl.load(reference + 2 * i, mask=mask, other=0.0))
    rejected = beta * (tl.load(policy + 2 * i + 1, mask=mask, other=0.0) - tl.load(reference + 2 * i + 1, mask=mask, other=0.0))
    r = chosen - rejected
    log_p = _log_sigmoid(r)
    log_q = _log_sigmoid(-r)
    p = tl.exp(log_p)
    weight = tl.where(gamma == 0, 1.0, tl.exp(gamma * log_q))
    slope = weight * (gamma * p * log_p - tl.exp(log_q))
    gated = p > threshold
    slope = tl.where(gated, 0.0, slope)
    tl.store(losses + i, tl.where(gated, 0.0, -weight * log_p), mask=mask)
    tl.store(weights + i, tl.where(gated, 0.0, weight), mask=mask)
    tl.store(margins + i, r, mask=mask)
    tl.store(gradients + 2 * i, beta * slope, mask=mask)
    tl.store(gradients + 2 * i + 1, -beta * slope, mask=mask)


def triton_focal_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, gamma: float, confidence_threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of loss.FocalLoss from policy and reference (pairs, 2), float32 alone."""
    check_device(policy.device)
    if policy.dtype != torch.float32:
        raise ValueError(f"impl='triton' computes in float32, got {policy.dtype}; use impl='reference'")
    pairs = len(policy)
    losses, weights, margins = (policy.new_empty(pairs) for _ in range(3))
    gradients = torch.empty(policy.shape, dtype=policy.dtype, device=policy.device)
    if pairs:
        with on_device(policy.device):
            _focal_loss_kernel[(triton.cdiv(pairs, 128),)](
                policy.contiguous(),
                reference.contiguous(),
                losses,
                weights,
                margins,
                gradients,
                pairs,
                float(beta),
                float(gamma),
                float(confidence_threshold),
                BLOCK=128,
            )
    return losses, weights, margins, gradients
