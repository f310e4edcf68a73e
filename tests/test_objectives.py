"""The objectives against numbers worked out on paper (FPO and DPO: docs/method.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import train_here

from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import ReferenceLogps, pair_key
from lifealign.objectives import (
    DPO,
    FPO,
    IPO,
    Objective,
    PreferenceLoss,
    Robust,
    SimPO,
    dpo_loss,
    fpo_loss,
    ipo_loss,
    robust_loss,
    simpo_loss,
)
from lifealign.stages import PreferenceStage

LN2, LN3 = math.log(2), math.log(3)
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}


def at(margins: list[float], *, beta: float = 1.0, **options: float) -> tuple[PreferenceLoss, torch.Tensor]:
    """FPO of pairs with the given r, all of it from the chosen response; and dL/dr of each pair."""
    r = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(r)
    result = fpo_loss(r / beta, zero, zero, zero, beta=beta, **options)
    (gradient,) = torch.autograd.grad(result.losses.sum(), r)
    return result, gradient


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_indifference_by_hand() -> None:
    """r = 0, p = 1/2, γ = 2: w = 1/4, L = 1/4·ln 2 = 0.17329.

    dL/dr = 2·(1/4)·(1/2)·ln(1/2) − (1/2)³ = −0.25·ln 2 − 0.125 = −0.29829.
    """
    result, gradient = at([0.0])
    close(result.losses, [0.25 * LN2])
    close(result.weights, [0.25])
    close(gradient, [-0.125 - 0.25 * LN2])
    assert result.losses.item() == pytest.approx(0.17329, abs=1e-5)
    assert gradient.item() == pytest.approx(-0.29829, abs=1e-5)


def test_a_learnt_and_a_mistaken_pair_by_hand() -> None:
    """γ = 2. r = ln 3: p = 3/4, w = 1/16, L = ln(4/3)/16,

        dL/dr = 2·(1/16)·(3/4)·ln(3/4) − (1/4)³ = −(3/32)·ln(4/3) − 1/64.

    r = −ln 3: p = 1/4, w = 9/16, L = (9/16)·ln 4 = (9/8)·ln 2,

        dL/dr = 2·(9/16)·(1/4)·ln(1/4) − (3/4)³ = −(9/16)·ln 2 − 27/64.
    """
    result, gradient = at([LN3, -LN3])
    close(result.weights, [1 / 16, 9 / 16])
    close(result.losses, [math.log(4 / 3) / 16, 9 / 8 * LN2])
    close(gradient, [-3 / 32 * math.log(4 / 3) - 1 / 64, -9 / 16 * LN2 - 27 / 64])


def test_gradients_reach_both_responses_by_hand() -> None:
    """β = 0.5, log-ratios of 3 and 3 − 2·ln 3: r = 0.5·2·ln 3 = ln 3. dL/dlogp_p = β·dL/dr, dL/dlogp_d = −β·dL/dr.

    Rewards are β times the log-ratios: 1.5 and 1.5 − ln 3, and they carry no gradient.
    """
    reference = torch.tensor([[-20.0, -31.0]], dtype=torch.float64)
    policy = (reference + torch.tensor([[3.0, 3.0 - 2 * LN3]], dtype=torch.float64)).requires_grad_()
    result = fpo_loss(*policy.unbind(1), *reference.unbind(1), beta=0.5)
    close(result.chosen_rewards, [1.5])
    close(result.rejected_rewards, [1.5 - LN3])
    assert not any(t.requires_grad for t in (result.chosen_rewards, result.rejected_rewards, result.weights))
    result.losses.sum().backward()
    slope = -3 / 32 * math.log(4 / 3) - 1 / 64
    assert policy.grad is not None
    close(policy.grad[0], [0.5 * slope, -0.5 * slope])


def test_non_integer_gamma_by_hand() -> None:
    """γ = 1/2, r = ln 3: w = √(1/4) = 1/2, L = ln(4/3)/2, dL/dr = (1/2)(1/2)(3/4)·ln(3/4) − 1/8."""
    result, gradient = at([LN3], gamma=0.5)
    close(result.losses, [math.log(4 / 3) / 2])
    close(gradient, [3 / 16 * math.log(3 / 4) - 1 / 8])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_closed_form_on_a_grid(gamma: float, beta: float) -> None:
    """L = −(1−p)^γ log p and dL/dr = γ(1−p)^γ p log p − (1−p)^(γ+1), in plain Python floats."""
    margins = [-7.0, -2.5, -0.3, 0.0, 0.2, 1.0, 3.3, 6.0]
    probabilities = [1 / (1 + math.exp(-r)) for r in margins]
    result, gradient = at(margins, gamma=gamma, beta=beta)
    close(result.losses, [-((1 - p) ** gamma) * math.log(p) for p in probabilities])
    close(result.weights, [(1 - p) ** gamma for p in probabilities])
    close(gradient, [gamma * (1 - p) ** gamma * p * math.log(p) - (1 - p) ** (gamma + 1) for p in probabilities])


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_gradcheck(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, dtype=torch.float64, generator=generator).mul(3) for _ in range(4)]
    policy = [t.requires_grad_() for t in inputs[:2]]
    assert torch.autograd.gradcheck(lambda c, d: fpo_loss(c, d, *inputs[2:], beta=0.7, gamma=gamma).losses, policy)


def test_gamma_zero_is_dpo() -> None:
    """DPO at r = ln 3 is −log(3/4) = ln(4/3), with slope −(1 − p) = −1/4 and weight 1."""
    result, gradient = at([LN3, 0.0], gamma=0.0)
    close(result.losses, [math.log(4 / 3), LN2])
    close(result.weights, [1.0, 1.0])
    close(gradient, [-1 / 4, -1 / 2])
    logps = [torch.tensor([x, -2.0 * x], dtype=torch.float64) for x in (-3.0, -5.0, -4.0, -2.5)]
    for ours, focal in zip(dpo_loss(*logps, beta=0.3), fpo_loss(*logps, beta=0.3, gamma=0.0), strict=True):
        assert torch.equal(ours, focal)
    close(dpo_loss(*logps, beta=0.3).chosen_rewards, [0.3, -0.6])


def test_dpo_of_a_pair_that_cannot_be_told_apart_any_better() -> None:
    """A rejected response of probability 0: r is infinite, and −log σ(r) is 0 with weight 1."""
    zero, impossible = torch.zeros(1), torch.full((1,), -math.inf)
    result = dpo_loss(zero, impossible, zero, zero)
    assert (result.losses.item(), result.weights.item()) == (0.0, 1.0)


def test_gated_pairs_are_left_alone() -> None:
    """τ = 0.7: p = 3/4 at r = ln 3 is gated, p = 1/2 and p = 1/4 are not; the mean is over all three.

    (0 + ln 2/4 + 9/8·ln 2)/3 = (11/24)·ln 2.
    """
    free, free_gradient = at([LN3, 0.0, -LN3])
    result, gradient = at([LN3, 0.0, -LN3], confidence_threshold=0.7)
    assert result.losses[0].item() == result.weights[0].item() == gradient[0].item() == 0.0
    assert torch.equal(result.losses[1:], free.losses[1:])
    assert torch.equal(gradient[1:], free_gradient[1:])
    close(result.losses.mean(), 11 / 24 * LN2)  # type: ignore[arg-type]
    assert torch.equal(result.chosen_rewards, free.chosen_rewards)


def test_the_gate_is_strict() -> None:
    """σ(0) = 1/2 exactly. At τ = 1/2 the pair is not above the threshold; at the number below 1/2 it is."""
    at_threshold, gradient = at([0.0], confidence_threshold=0.5)
    close(at_threshold.losses, [0.25 * LN2])
    assert gradient.item() != 0
    above, gradient = at([0.0], confidence_threshold=math.nextafter(0.5, 0))
    assert above.losses.item() == above.weights.item() == gradient.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 8.0])
def test_extreme_margins(dtype: torch.dtype, gamma: float) -> None:
    """As r → −∞, w → 1, L → −r and dL/dr → −1; as r → ∞ all vanish. τ = 1 gates nothing, σ(500) = 1 included."""
    r = torch.tensor([-500.0, 500.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(r)
    losses = fpo_loss(r, zero, zero, zero, beta=1.0, gamma=gamma).losses
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([500.0, 0.0], abs=1e-30)
    assert r.grad is not None
    assert r.grad.tolist() == pytest.approx([-1.0, 0.0], abs=1e-30)


def test_small_losses_keep_their_digits() -> None:
    """r = 30: 1 − p = e^−30 to 13 digits, so L = e^−60·e^−30; σ(r) itself rounds to 1 in float32, and 1 − σ(r) to 0."""
    r = torch.tensor([30.0])
    zero = torch.zeros(1)
    assert fpo_loss(r, zero, zero, zero, beta=1.0).losses.item() == pytest.approx(math.exp(-90), rel=1e-4)


def test_not_a_number_is_not_gated() -> None:
    """The method gates σ(r) > τ, which NaN is not: the loss must say that something is wrong."""
    nan, zero = torch.full((1,), math.nan), torch.zeros(1)
    assert fpo_loss(nan, zero, zero, zero).losses.isnan().all()
    assert fpo_loss(nan, zero, zero, zero, confidence_threshold=0.8).losses.isnan().all()


@pytest.mark.parametrize("pairs", [0, 1, 6])
def test_shapes(pairs: int) -> None:
    result = fpo_loss(*torch.zeros(4, pairs))
    assert PreferenceLoss._fields == ("losses", "chosen_rewards", "rejected_rewards", "weights")
    assert [tuple(t.shape) for t in result] == [(pairs,)] * 4


# IPO


def test_ipo_by_hand() -> None:
    """β = 1/4 aims at h = 1/(2·1/4) = 2. h = 3, 2 and −1 give (1, 0, 9) with slopes 2·(h − 2) = (2, 0, −6).

    The sums count, not means over tokens; rewards are β·3, β·2, β·(−1) for the chosen and 0 for the rejected responses.
    """
    chosen = torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    result = ipo_loss(chosen - 20, zero - 7, zero - 20, zero - 7, beta=0.25)
    close(result.losses, [1.0, 0.0, 9.0])
    close(result.chosen_rewards, [0.75, 0.5, -0.25])
    close(result.rejected_rewards, [0.0, 0.0, 0.0])
    close(result.weights, [1.0, 1.0, 1.0])
    (gradient,) = torch.autograd.grad(result.losses.sum(), chosen)
    close(gradient, [2.0, 0.0, -6.0])


# SimPO


def test_simpo_by_hand() -> None:
    """β = 2. Pair 0: 2·(−6)/3 = −4 and 2·(−10)/4 = −5, so r = 1; with a margin of 1 the loss is −log σ(0) = ln 2.

    Pair 1: 2·(−3)/2 = −3 and 2·(−8)/2 = −8, r − 1 = 4: the loss is log(1 + e^−4). Slopes by a log-probability are
    −σ(1 − r)·β/|y_p| and +σ(1 − r)·β/|y_d|: at pair 0 ½·2/3 and ½·2/4.
    """
    chosen = torch.tensor([-6.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-10.0, -8.0], dtype=torch.float64, requires_grad=True)
    result = simpo_loss(chosen, rejected, torch.tensor([3, 2]), torch.tensor([4, 2]), beta=2.0, target_margin=1.0)
    close(result.losses, [LN2, math.log1p(math.exp(-4))])
    close(result.chosen_rewards, [-4.0, -3.0])
    close(result.rejected_rewards, [-5.0, -8.0])
    close(result.weights, [1.0, 1.0])
    up, down = torch.autograd.grad(result.losses.sum(), (chosen, rejected))
    assert (up[0].item(), down[0].item()) == pytest.approx((-1 / 3, 1 / 4), abs=1e-12)


def test_simpo_of_one_length_without_margin_is_dpo_against_nothing() -> None:
    """|y| = 4 for all, no margin: β/4 times the sums, which is DPO at β/4 with a reference of zeros."""
    chosen, rejected = torch.tensor([[-3.0, -9.0], [-8.0, -2.5]], dtype=torch.float64)
    four, zero = torch.tensor([4, 4]), torch.zeros(2, dtype=torch.float64)
    for ours, theirs in zip(
        simpo_loss(chosen, rejected, four, four, beta=2.0, target_margin=0.0),
        dpo_loss(chosen, rejected, zero, zero, beta=0.5),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


# Robust DPO


def robust_at(margins: list[float], share: float) -> tuple[PreferenceLoss, torch.Tensor]:
    r = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(r)
    result = robust_loss(r, zero, zero, zero, beta=1.0, label_smoothing=share)
    (gradient,) = torch.autograd.grad(result.losses.sum(), r)
    return result, gradient


def test_robust_by_hand() -> None:
    """ε = 1/4, r = ln 3: D(r) = ln(4/3), D(−r) = ln 4; L = (¾·ln(4/3) − ¼·ln 4)/½ = ln 4 − 1½·ln 3.

    At r = 0: (¾ − ¼)·ln 2/½ = ln 2. Slopes: (−¾·¼ − ¼·¾)·2 = −¾ at ln 3,
    and (−¾·½ − ¼·½)·2 = −1 at 0.
    """
    result, gradient = robust_at([LN3, 0.0], 0.25)
    close(result.losses, [2 * LN2 - 1.5 * LN3, LN2])
    close(gradient, [-0.75, -1.0])
    close(result.weights, [1.0, 1.0])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.49])
def test_robust_is_dpo_on_average_over_flipped_labels(share: float) -> None:
    """E[L] = (1 − ε)·L(r) + ε·L(−r) = D(r), whatever ε: what the method is for. D in plain Python floats."""
    margins = [-6.0, -1.0, 0.0, 0.3, 5.0]
    right, _ = robust_at(margins, share)
    flipped, _ = robust_at([-r for r in margins], share)
    mean = (1 - share) * right.losses + share * flipped.losses
    close(mean, [math.log1p(math.exp(-r)) for r in margins])


def test_robust_without_flips_is_dpo() -> None:
    logps = [torch.tensor([x, -2.0 * x, 900.0 * x], dtype=torch.float64) for x in (-3.0, -5.0, -4.0, -2.5)]
    for ours, plain in zip(robust_loss(*logps, label_smoothing=0.0), dpo_loss(*logps), strict=True):
        assert torch.equal(ours, plain)


# What they share


@pytest.mark.parametrize("name", ["ipo", "simpo", "robust"])
def test_gradcheck_of_the_others(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, dtype=torch.float64, generator=generator).mul(3) for _ in range(4)]
    policy = [t.requires_grad_() for t in inputs[:2]]
    lengths = torch.tensor([[1, 2, 3, 7, 40], [5, 2, 1, 9, 3]])
    losses = {
        "ipo": lambda c, d: ipo_loss(c, d, *inputs[2:], beta=0.7).losses,
        "simpo": lambda c, d: simpo_loss(c, d, *lengths, beta=2.5, target_margin=0.6).losses,
        "robust": lambda c, d: robust_loss(c, d, *inputs[2:], beta=0.7, label_smoothing=0.2).losses,
    }
    assert torch.autograd.gradcheck(losses[name], policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_of_the_others(dtype: torch.dtype) -> None:
    """r = −500 and 500, β = 1. SimPO without margin: 500 and e^−500 = 7e-218, 0 in float32.

    Robust at ε = 1/3: ε/(1 − 2ε) = 1, so D(r) − r = 1000 and −500. IPO at β = 1/2 aims at 1: 501² and 499².
    """
    r, zero, one = torch.tensor([-500.0, 500.0], dtype=dtype), torch.zeros(2, dtype=dtype), torch.ones(2, dtype=torch.int64)
    small = math.exp(-500) if dtype is torch.float64 else 0.0
    simpo = simpo_loss(r, zero, one, one, beta=1.0, target_margin=0.0).losses.tolist()
    assert simpo == pytest.approx([500.0, small], rel=1e-12, abs=0.0)
    robust = robust_loss(r, zero, zero, zero, beta=1.0, label_smoothing=1 / 3).losses.tolist()
    assert robust == pytest.approx([1000.0, -500.0], rel=1e-6)
    assert ipo_loss(r, zero, zero, zero, beta=0.5).losses.tolist() == [501.0**2, 499.0**2]


def test_half_precision_is_raised_to_float32() -> None:
    """257 is no bfloat16, 256 and 1 are: in bfloat16 the 1 would be lost. IPO: (256 + 1 − 1)²; SimPO: −256 + 1 − 2."""
    big, one, zero = (torch.tensor([x], dtype=torch.bfloat16) for x in (256.0, -1.0, 0.0))
    lengths = torch.tensor([1])
    assert ipo_loss(big, one, zero, zero, beta=0.5).losses.item() == 256.0**2
    assert robust_loss(big, one, zero, zero, beta=1.0).losses.dtype is torch.float32
    simpo = simpo_loss(-big, one, lengths, lengths, beta=1.0, target_margin=2.0)
    assert simpo.losses.item() == 257.0


def test_components_pass_their_options() -> None:
    """β = 1, columns are (chosen, rejected): r = ln 3, so p = 3/4, as in the cases by hand above.

    SimPO of 2·ln 3 over 2 tokens against 0 over 4, at β = 1: r = ln 3 as well; robust at ε = 1/4 as above.
    """
    policy = torch.tensor([[LN3, 0.0]], dtype=torch.float64)
    reference, lengths = torch.zeros_like(policy), torch.tensor([[2, 4]])
    close(FPO(beta=1.0)(policy, reference, lengths).losses, [math.log(4 / 3) / 16])
    close(FPO(beta=1.0, gamma=1.0)(policy, reference, lengths).losses, [math.log(4 / 3) / 4])
    close(FPO(beta=1.0, confidence_threshold=0.7)(policy, reference, lengths).losses, [0.0])
    close(DPO(beta=1.0)(policy, reference, lengths).losses, [math.log(4 / 3)])
    close(FPO(beta=2.0)(reference, -policy, lengths).chosen_rewards, [2 * LN3])
    close(IPO(beta=0.5)(policy, reference, lengths).losses, [(LN3 - 1) ** 2])
    close(Robust(beta=1.0, label_smoothing=0.25)(policy, reference, lengths).losses, [2 * LN2 - 1.5 * LN3])
    close(SimPO(beta=1.0, target_margin=0.0)(2 * policy, reference + 9, lengths).losses, [math.log(4 / 3)])
    close(SimPO(beta=1.0, target_margin=LN3)(2 * policy, reference + 9, lengths).losses, [LN2])
    assert (FPO().beta, FPO().gamma, FPO().confidence_threshold) == (0.1, 2.0, 1.0)  # the papers'
    assert (SimPO().beta, SimPO().target_margin, Robust().label_smoothing) == (2.0, 1.0, 0.1)


def test_the_stage_counts_tokens_for_simpo() -> None:
    """Responses of 2 and 3 tokens, β = 2: rewards −4·2/2 = −4 and −9·2/3 = −6; −log σ(2 − 1) = log(1 + 1/e)."""
    pair = Pair("a/train/0", [1], [2, 3], [4, 5, 6], "", "", "")
    reference = ReferenceLogps()
    key = torch.tensor([list(pair_key(pair))], dtype=torch.uint8)
    reference.load_state_dict({"keys": key, "logps": torch.tensor([[-1.0, -50.0]])})
    losses, values = PreferenceStage(SimPO(), reference).outcome(torch.tensor([-4.0, -9.0]), [pair])
    assert losses.sum().item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    figures = {name: value.item() for name, value in values.items()}
    assert (figures["chosen_reward"], figures["rejected_reward"], figures["margin"]) == (-4.0, -6.0, 2.0)
    assert (figures["focal_weight"], figures["gated_share"], figures["accuracy"]) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "kind, options",
    [
        (FPO, {"beta": 0.0}),
        (FPO, {"beta": -1.0}),
        (FPO, {"beta": math.inf}),
        (FPO, {"gamma": -0.1}),
        (FPO, {"gamma": math.inf}),
        (FPO, {"confidence_threshold": 0.0}),
        (FPO, {"confidence_threshold": 1.01}),
        (IPO, {"beta": 0.0}),
        (SimPO, {"beta": -2.0}),
        (SimPO, {"target_margin": -0.1}),
        (SimPO, {"target_margin": math.inf}),
        (SimPO, {"target_margin": math.nan}),
        (Robust, {"label_smoothing": -0.1}),
        (Robust, {"label_smoothing": 0.5}),
        (Robust, {"label_smoothing": math.nan}),
    ],
)
def test_options_out_of_range(kind: type[Objective], options: dict[str, float]) -> None:
    (key,) = options
    with pytest.raises(UserError, match=rf"objective\.{key}="):
        kind(**options)


def test_an_objective_without_reference_has_none_computed(tmp_path: Path) -> None:
    """SimPO reads none: of 16 training pairs none is asked for; held-out ones are, where a score compares with the base."""
    folder = train_here(tmp_path / "run", "objective=simpo", "sequence.tasks=[instruct]", "evaluation.metrics=[chosen_nll]")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["needed_pairs"] for row in rows if row["kind"] == "reference"] == [8]
    assert any(row["kind"] == "step" and row["stage"] == "preference" for row in rows)
