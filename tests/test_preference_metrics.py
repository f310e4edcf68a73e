"""Preference scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lifealign.evaluation.preference import PREFERENCE_METRICS, preference_metrics
from lifealign.evaluation.scores import METRICS

POLICY = torch.tensor([[-10.0, -14.0], [-6.0, -3.0], [-20.0, -20.0]])
REFERENCE = torch.tensor([[-12.0, -12.0], [-5.0, -4.0], [-20.0, -20.0]])
TOKENS = torch.tensor([5, 2, 11])


def test_scores_by_hand() -> None:
    """β = 0.5. r_1 = 0.5·[(−10+12) − (−14+12)] = 2, r_2 = 0.5·[(−6+5) − (−3+4)] = −1, r_3 = 0: a tie, not a win.

    Accuracy 1 of 3. Margin (2 − 1 + 0)/3 = 1/3. log σ(r) = −log(1 + e^−r). NLL (10 + 6 + 20)/(5 + 2 + 11) = 36/18 = 2,
    where the mean of the pairs' own means would be (2 + 3 + 20/11)/3.
    """
    scores = preference_metrics(POLICY, REFERENCE, TOKENS, beta=0.5)
    log_sigmoids = [-math.log1p(math.exp(-r)) for r in (2.0, -1.0, 0.0)]
    assert tuple(scores) == PREFERENCE_METRICS
    assert scores["preference_accuracy"] == pytest.approx(100 / 3, abs=1e-10)
    assert scores["reward_margin"] == pytest.approx(1 / 3, abs=1e-10)
    assert scores["mean_log_sigmoid"] == pytest.approx(sum(log_sigmoids) / 3, abs=1e-10)
    assert scores["chosen_nll"] == pytest.approx(2.0, abs=1e-10)


def test_an_untrained_policy() -> None:
    scores = preference_metrics(POLICY, POLICY, TOKENS, beta=0.1)
    assert scores["preference_accuracy"] == 0.0
    assert scores["mean_log_sigmoid"] == pytest.approx(-math.log(2), abs=1e-12)


def test_arithmetic_is_float64() -> None:
    """2^24 + 1 is the first integer that float32 cannot hold."""
    policy = torch.tensor([[-(2.0**24), 0.0], [-1.0, 0.0]])
    scores = preference_metrics(policy, torch.zeros(2, 2), torch.tensor([1, 0]), beta=1.0)
    assert scores["chosen_nll"] == 2**24 + 1


def test_extreme_margins_stay_finite() -> None:
    policy = torch.tensor([[-1e4, 0.0], [0.0, -1e4]])
    scores = preference_metrics(policy, torch.zeros(2, 2), torch.tensor([3, 3]), beta=1.0)
    assert scores["mean_log_sigmoid"] == pytest.approx(-5e3)


def test_a_nan_is_not_hidden() -> None:
    policy = POLICY.clone()
    policy[1, 0] = math.nan
    assert all(math.isnan(value) for value in preference_metrics(policy, REFERENCE, TOKENS, beta=0.1).values())


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="policy_logps has shape"):
        preference_metrics(POLICY.T, REFERENCE, TOKENS, beta=0.1)
    with pytest.raises(ValueError, match="reference_logps has shape"):
        preference_metrics(POLICY, REFERENCE[:2], TOKENS, beta=0.1)
    with pytest.raises(ValueError, match="nothing to score"):
        preference_metrics(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), beta=0.1)


def test_every_metric_is_in_the_table() -> None:
    assert set(PREFERENCE_METRICS) <= set(METRICS)
