"""CPPO on pairs: types and weights of the paper's table on constructed pairs, both weightings, the drift, and a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import compose_config, train_here
from test_lwf import rows

import lifealign.strategies.base
from lifealign.config import build
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import ReferenceLogps, pair_key
from lifealign.objectives import DPO
from lifealign.stages import PreferenceStage
from lifealign.strategies import Context, Run, Seen
from lifealign.strategies.cppo import (
    CPPO,
    HIGH_PERFORMANCE,
    HIGH_VARIANCE,
    NOISY,
    NORMAL,
    OVERFITTING,
    Gain,
    Weighting,
    deviations,
    heuristic_weights,
    learned_weights,
    learning_loss,
    sample_types,
)
from lifealign.strategies.lwf import PairTable

ROOT3 = math.sqrt(3)

# Per-token log-probability of the chosen response less 5, and reward margin, of twelve pairs: one of each extreme type, and
# eight in the middle. Either has the mean 0 and the deviation sqrt(4/12), so an extreme of 1 scores sqrt(3) = 1.73.
TABLE = {"high-performance": (1, 1), "overfitting": (1, -1), "high-variance": (-1, 1), "noisy": (-1, -1)}
POINTS = [*TABLE.values(), *[(0, 0)] * 8]
LENGTHS = [2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7]
PAIRS = [Pair(str(i), [1, i], [9] * length, [8, 7], "", "", "") for i, length in enumerate(LENGTHS)]
OLD = torch.tensor([[(p - 5) * length, -3.0] for (p, _), length in zip(POINTS, LENGTHS, strict=True)])


def constructed(strategy: CPPO) -> Context:
    """Where ``strategy`` is in a second task, with the pairs above; the reference is such that margins are those above."""
    reference = OLD - torch.tensor([[margin / 0.1, 0.0] for _, margin in POINTS])
    held = ReferenceLogps()
    keys = torch.stack([torch.frombuffer(bytearray(pair_key(pair)), dtype=torch.uint8) for pair in PAIRS])
    held.load_state_dict({"keys": keys, "logps": reference})
    stages: Any = {"preference": PreferenceStage(DPO(beta=0.1), held)}
    run = Run(None, Path(), 0, "", None, stages, 8)  # type: ignore[arg-type]
    strategy.setup(run)
    strategy.before = PairTable(PAIRS, OLD)
    return Context(run, SimpleNamespace(train=PAIRS), 1, "preference")  # type: ignore[arg-type]


def seen(start: int, end: int, drift: float = 0.0) -> Seen:
    """Pairs as a micro-batch, under a policy that has moved: chosen by ``drift`` a token, rejected by -2 a token."""
    moved = OLD[start:end] + torch.tensor([[drift * length, -2.0 * 2] for length in LENGTHS[start:end]])
    return Seen(PAIRS[start:end], None, moved.flatten().requires_grad_(), torch.zeros(end - start))  # type: ignore[arg-type]


def weighed(strategy: CPPO, step: int = 12) -> torch.Tensor:
    """(pairs, 2) alpha and beta as the hooks apply them, beta found from a drift whose square is 0 + 4."""
    context = constructed(strategy)
    parts = []
    for start in range(0, len(PAIRS), step):
        batch = seen(start, start + step)
        alpha = strategy.pair_weights(context, batch)
        assert alpha is not None
        beta = strategy.pair_terms(context, batch)["retention"] / 4 / strategy.retention
        parts.append(torch.stack([alpha, beta.detach()], dim=1))
    return torch.cat(parts)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_overfitted_and_noisy_pairs_get_the_weights_of_the_table() -> None:
    """The table: overfitting alpha up, beta down; noisy both down; high-performance both up; high-variance as overfitting;
    normal 1. Linear gains at k = 1: up to 1 + (sqrt(3) - 1), down to 1 - (sqrt(3) - 1) = 0.27.
    """
    up, down = ROOT3, 2 - ROOT3
    expected = [[up, up], [up, down], [up, down], [down, down], *[[1.0, 1.0]] * 8]
    torch.testing.assert_close(weighed(CPPO(lower=0.1)), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_weights_stay_within_their_bounds() -> None:
    up, down = 1.5, 0.5  # sqrt(3) and 0.27 otherwise
    expected = [[up, up], [up, down], [up, down], [down, down], *[[1.0, 1.0]] * 8]
    torch.testing.assert_close(weighed(CPPO(upper=1.5)), torch.tensor(expected))


def test_balanced_gains_are_the_bounds() -> None:
    up, down = 2.0, 0.5
    expected = [[up, up], [up, down], [up, down], [down, down], *[[1.0, 1.0]] * 8]
    assert weighed(CPPO(gain=Gain.balanced)).tolist() == expected


@pytest.mark.parametrize("weighting", list(Weighting))
def test_weights_do_not_depend_on_the_micro_batch(weighting: Weighting) -> None:
    """So neither on the number of ranks: statistics are those of the task."""
    assert weighed(CPPO(weighting=weighting), step=1).equal(weighed(CPPO(weighting=weighting), step=12))


def test_learned_weights_go_where_the_table_says() -> None:
    weights = weighed(CPPO(weighting=Weighting.learned))
    best, overfitted, various, noisy, *normal = weights.tolist()
    alpha, beta = normal[0]
    assert best[0] > alpha and best[1] > beta
    assert overfitted[0] > alpha and overfitted[1] < beta
    assert various == overfitted
    assert noisy[0] < alpha and noisy[1] < beta
    assert all(row == normal[0] for row in normal)


def test_sums_over_tokens_tell_long_responses_for_improbable_ones() -> None:
    """per_token=false: the sums are -5 n and so on; scores by hand from the definition, in float64."""
    strategy = CPPO(per_token=False, gain=Gain.balanced)
    sums = [(p - 5) * length for (p, _), length in zip(POINTS, LENGTHS, strict=True)]
    mean = sum(sums) / 12
    deviation = math.sqrt(sum((s - mean) ** 2 for s in sums) / 12)
    high = [s > mean + deviation for s in sums]
    low = [s < mean - deviation for s in sums]
    margins = [margin for _, margin in POINTS]
    expected = [
        2.0 if (h and m) or (lo and m == 1) else 0.5 if lo and m == -1 else 1.0
        for h, lo, m in zip(high, low, margins, strict=True)
    ]
    assert weighed(strategy)[:, 0].tolist() == expected
    assert expected != weighed(CPPO(gain=Gain.balanced))[:, 0].tolist()


# -- types -------------------------------------------------------------------------------------------------------------


def test_types_by_hand() -> None:
    scores = [[2, 2], [2, -2], [-2, 2], [-2, -2], [2, 0], [0, -2], [1, 2], [0, 0]]  # a score of k is ordinary
    types = [HIGH_PERFORMANCE, OVERFITTING, HIGH_VARIANCE, NOISY, NORMAL, NORMAL, NORMAL, NORMAL]
    assert sample_types(torch.tensor(scores, dtype=torch.float64), 1.0).tolist() == types


def test_deviations_by_hand() -> None:
    """1, 1, 4: mean 2, variance (1 + 1 + 4) / 3 = 2. Equal values do not deviate, though their mean may round."""
    found = deviations(torch.tensor([[1.0, 0.1], [1.0, 0.1], [4.0, 0.1]]))
    assert found[:, 0].tolist() == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5], rel=1e-12)
    assert found[:, 1].abs().max() < 1e-6
    assert deviations(torch.tensor([[3.0]])).item() == 0


def test_linear_gains_begin_at_one() -> None:
    """Just beyond the threshold a weight has hardly moved, whatever k is."""
    scores = torch.tensor([[2.001, -2.001], [2.5, -4.0]], dtype=torch.float64)
    found = heuristic_weights(scores, sample_types(scores, 2.0), 2.0, Gain.linear, 0.0, 5.0)
    assert found.flatten().tolist() == pytest.approx([1.001, 0.999, 1.5, 0.0], abs=1e-9)


# -- learned weights ---------------------------------------------------------------------------------------------------


def test_learning_loss_by_hand() -> None:
    """Two normal samples and one overfitted. alpha 1, 2 and 1.5: squares 0, 1 and 1/4, mean 5/12; normal 1.5, gap 0.
    beta 1, 1 and 0: mean of squares 1/3; normal 1, overfitted 0 and to be below: -(1 - 0).
    """
    weights = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.5, 0.0]], dtype=torch.float64)
    types = torch.tensor([NORMAL, NORMAL, OVERFITTING])
    assert learning_loss(weights, types, 0.3).item() == pytest.approx(5 / 12 + 1 / 3 - 0.3, rel=1e-12)
    assert learning_loss(weights, torch.tensor([NORMAL] * 3), 0.3).item() == pytest.approx(5 / 12 + 1 / 3, rel=1e-12)
    assert learning_loss(weights, torch.tensor([OVERFITTING] * 3), 0.3).item() == pytest.approx(5 / 12 + 1 / 3, rel=1e-12)


@pytest.mark.parametrize("pressure", [0.0, 0.02])
def test_learned_weights_are_those_of_least_loss(pressure: float) -> None:
    """The loss is a parabola in each weight: with n samples, m of a type and direction d, the least is at
    1 + pressure * n * d / (2 m), and for the normal ones at 1 - pressure * n * (sum of directions) / (2 m).

    Of 20 samples 2 are high-performance, 3 overfitting, 5 noisy, 10 normal. Sums of directions: alpha 1, beta -1.
    """
    types = torch.tensor([HIGH_PERFORMANCE] * 2 + [OVERFITTING] * 3 + [NOISY] * 5 + [NORMAL] * 10)
    step = pressure * 20 / 2
    least = [[1 + step / 2, 1 + step / 2]] * 2 + [[1 + step / 3, 1 - step / 3]] * 3
    least += [[1 - step / 5, 1 - step / 5]] * 5 + [[1 - step / 10, 1 + step / 10]] * 10
    found = learned_weights(types, pressure, 0.5, 2.0)
    torch.testing.assert_close(found, torch.tensor(least, dtype=torch.float64), rtol=0, atol=1e-4)


def test_no_pressure_takes_learned_weights_out_of_bounds() -> None:
    found = learned_weights(torch.tensor([OVERFITTING] + [NORMAL] * 9), 1e6, 0.5, 2.0)
    assert ((found >= 0.5) & (found <= 2)).all()
    assert found[0].tolist() == pytest.approx([2, 0.5], abs=1e-2)


# -- the drift ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_token", "chosen", "rejected"), [(True, 0.3, -2.0), (False, 0.3 * 7, -4.0)])
def test_drift_by_hand(per_token: bool, chosen: float, rejected: float) -> None:
    """Pair 5 is normal, with 7 and 2 tokens, moved by 0.3 and -2 a token: retention 0.5 times the sum of squares."""
    strategy = CPPO(retention=0.5, per_token=per_token)
    batch = seen(5, 6, drift=0.3)
    (term,) = strategy.pair_terms(constructed(strategy), batch)["retention"]
    assert term.item() == pytest.approx(0.5 * (chosen**2 + rejected**2), rel=1e-5)
    term.backward()
    scale = (1 / 7, 1 / 2) if per_token else (1, 1)
    slopes = [0.5 * 2 * chosen * scale[0], 0.5 * 2 * rejected * scale[1]]
    assert batch.logps.grad is not None
    assert batch.logps.grad.tolist() == pytest.approx(slopes, rel=1e-5)


def test_nothing_in_the_first_task_or_in_sft() -> None:
    strategy = CPPO()
    context = constructed(strategy)
    for number, stage in ((0, "preference"), (1, "sft")):
        elsewhere = Context(context.run, context.task, number, stage)
        assert strategy.pair_weights(elsewhere, seen(0, 2)) is None
        assert strategy.pair_terms(elsewhere, seen(0, 2)) == {}


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_asks_the_old_policy_once_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an SFT stage the second task starts from the old policy itself, so the drift is 0 at its first step."""
    asked: list[int] = []
    usual = lifealign.strategies.base.score_pairs

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(len(arguments[2]))
        return usual(*arguments, **options)

    monkeypatch.setattr(lifealign.strategies.base, "score_pairs", counted)
    small = ("objective=dpo", "sft.epochs=0", "evaluation.metrics=[chosen_nll]", "data.max_eval=2")
    with caplog.at_level(logging.INFO, "lifealign.strategies.cppo"):
        run = train_here(tmp_path / "run", "strategy=cppo_released", "strategy.threshold=0.5", *small)
    assert asked == [16]
    found = rows(run)
    assert all(("retention" in row) == (row["task_number"] == 1) for row in found)
    drifts = [row["retention"] for row in found if row["task_number"] == 1]
    assert drifts[0] == pytest.approx(0, abs=1e-6)
    assert drifts[-1] > 1e-4
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lifealign.strategies.cppo"]
    counts = [int(part.split()[0]) for part in line.removeprefix("cppo: ").split(", ")]
    assert sum(counts) == 16 and len(counts) == 5 and counts[0] < 16, line


def test_the_released_preset() -> None:
    strategy = build(compose_config("+sequence=six_domains", "strategy=cppo_released")).strategy
    assert (strategy.lower, strategy.upper, strategy.threshold, strategy.retention) == (0.5, 2.0, 1.0, 0.1)
    assert (strategy.weighting, strategy.gain, strategy.per_token) == (Weighting.heuristic, Gain.balanced, False)


@pytest.mark.parametrize("option", ["threshold=-1", "retention=inf", "pressure=-0.1", "lower=1", "lower=-0.1", "upper=1"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{option.split('=')[0]}="):
        build(compose_config("+sequence=six_domains", "strategy=cppo", f"strategy.{option}"))
