"""Scores of a policy on held-out preference pairs, from sequence log-probabilities alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PREFERENCE_METRICS: tuple[str, ...] = ("preference_accuracy", "reward_margin", "mean_log_sigmoid", "chosen_nll")


def preference_metrics(
    policy_logps: Tensor, reference_logps: Tensor, chosen_tokens: Tensor, *, beta: float
) -> dict[str, float]:
    """Four scores over a set of pairs, with the implicit reward margin of the objective (arXiv 2509.17183)::

        r = β · [(log π_θ(y_p|x) − log π_ref(y_p|x)) − (log π_θ(y_d|x) − log π_ref(y_d|x))]

    Args:
        policy_logps: (pairs, 2), [chosen, rejected], log-probabilities summed over the response tokens.
        reference_logps: (pairs, 2), the same under the reference model.
        chosen_tokens: (pairs,), the number of response tokens of each chosen response.
        beta: the objective's β.

    Returns:
        ``preference_accuracy``: 100 · share of pairs with r > 0. A tie counts as wrong, so an untrained policy
        (r = 0 everywhere) scores 0 and not 50.
        ``reward_margin``: mean r.
        ``mean_log_sigmoid``: mean log σ(r), at most 0; −log 2 before training.
        ``chosen_nll``: −Σ log π_θ(y_p|x) / Σ tokens, nats per token; every token weighs the same, whatever its pair.

    All arithmetic is in float64, on the CPU. A NaN among the log-probabilities comes out as a NaN, never as an answer.

    Raises:
        ValueError: shapes that do not match, no pairs, or no tokens.
    """
    pairs = len(chosen_tokens)
    for name, logps in (("policy_logps", policy_logps), ("reference_logps", reference_logps)):
        if logps.shape != (pairs, 2):
            raise ValueError(f"{name} has shape {tuple(logps.shape)}; {pairs} chosen_tokens ask for ({pairs}, 2)")
    tokens = int(chosen_tokens.sum())
    if tokens <= 0:
        raise ValueError(f"nothing to score: {pairs} pairs with {tokens} chosen tokens")

    policy = _float64(policy_logps)
    gains = policy - _float64(reference_logps)
    margins = beta * (gains[:, 0] - gains[:, 1])
    won = torch.where(margins.isnan(), margins, (margins > 0).double())  # a comparison alone would hide a NaN
    return {
        "preference_accuracy": 100.0 * won.mean().item(),
        "reward_margin": margins.mean().item(),
        "mean_log_sigmoid": logsigmoid(margins).mean().item(),
        "chosen_nll": -policy[:, 0].sum().item() / tokens,
    }


def _float64(values: Tensor) -> Tensor:
    # The device first: not every accelerator has float64.
    return values.detach().cpu().double()
