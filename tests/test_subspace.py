"""Truncation and the span of history, against hand-made cases and plain SVDs (docs/method.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lifealign.memory import denoise, refine
from lifealign.memory.subspace import Basis, rescale_history, truncate

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 40), (40, 8), (13, 13)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def svd_denoise(update: torch.Tensor, energy: float) -> tuple[torch.Tensor, int]:
    """The definition to the letter: the smallest k with Σ_{i≤k} σ_i² ≥ θ · Σ σ_i²."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    k, kept, total = 0, 0.0, s.square().sum().item()
    while kept < energy * total and k < len(s):
        kept, k = kept + s[k].item() ** 2, k + 1
    return u[:, :k] @ torch.diag(s[:k]) @ vh[:k], k


def pinv_refine(update: torch.Tensor, history: list[torch.Tensor], energy: float, scale: float) -> torch.Tensor:
    """The projector onto the row space of H is H⁺H; small singular values are cut at 1e-6 of the largest."""
    short_term = svd_denoise(update, energy)[0].flatten()
    rows = [h.flatten() / h.norm() for h in history if h.norm() > 0]
    matrix = torch.stack(rows) if rows else short_term.new_zeros(1, short_term.numel())
    past = torch.linalg.pinv(matrix, rtol=1e-6) @ (matrix @ short_term)
    return (short_term - past + scale * past).view(update.shape)


def test_threshold_by_hand() -> None:
    """diag(3, 1) has energies 9 and 1: the first holds 0.9 exactly, so θ = 0.9 keeps it alone; a little more, both."""
    update = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    kept = truncate(update, 0.9)
    torch.testing.assert_close(kept.update, torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64)), **EXACT)
    assert kept.kept_rank.item() == 1
    assert kept.kept_energy.item() == pytest.approx(0.9, abs=1e-12)
    both = truncate(update, 0.9 + 1e-9)
    torch.testing.assert_close(both.update, update, **EXACT)
    assert both.kept_rank.item() == 2
    assert both.kept_energy.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_threshold_met_but_for_rounding(seed: int) -> None:
    """diag(3, 1) in rotated coordinates: 0.9 is now met to rounding only, and one direction must still do."""
    left, right = (torch.linalg.qr(normal(2, 2, seed=seed + k)).Q for k in (0, 100))
    update = left @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ right.T
    assert truncate(update, 0.9).kept_rank.item() == 1


def test_directions_off_the_axes_by_hand() -> None:
    """3·u·aᵀ + 1·v·bᵀ with u, v = (1, ±1)/√2, a = (1, 0, 0), b = (0, 0.6, 0.8): θ = 0.5 leaves 3·u·aᵀ."""
    u, v = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    a, b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]], dtype=torch.float64)
    update = 3 * torch.outer(u, a) + torch.outer(v, b)
    torch.testing.assert_close(denoise(update, 0.5), 3 * torch.outer(u, a), **EXACT)
    torch.testing.assert_close(denoise(update.T, 0.5), 3 * torch.outer(a, u), **EXACT)


def test_signs_and_order_of_the_diagonal_do_not_matter() -> None:
    """diag(1, −4, 2): energies 1, 16, 4 of 21. θ = 0.8 needs 16.8: both 16 and 4."""
    update = torch.diag(torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64))
    kept = truncate(update, 0.8)
    torch.testing.assert_close(kept.update, torch.diag(torch.tensor([0.0, -4.0, 2.0], dtype=torch.float64)), **EXACT)
    assert kept.kept_energy.item() == pytest.approx(20 / 21, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_energy_keeps_everything(shape: tuple[int, int], dtype: torch.dtype) -> None:
    update = normal(*shape).to(dtype)
    assert torch.equal(denoise(update, 1.0), update)
    assert truncate(update, 1.0).kept_rank.item() == min(shape)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_update_stays_zero(shape: tuple[int, int], energy: float) -> None:
    zero = torch.zeros(shape)
    kept = truncate(zero, energy)
    assert torch.equal(kept.update, zero)
    assert (kept.kept_rank.item(), kept.kept_energy.item()) == (0, 1.0)
    assert torch.equal(refine(zero, [normal(*shape).float()], energy=energy, scale=0.5), zero)


@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_svd(shape: tuple[int, int], energy: float) -> None:
    for seed in range(3):
        update = normal(*shape, seed=seed) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
        expected, rank = svd_denoise(update, energy)
        kept = truncate(update, energy)
        torch.testing.assert_close(kept.update, expected, **EXACT)
        assert kept.kept_rank.item() == rank
        share = expected.square().sum() / update.square().sum()
        assert kept.kept_energy.item() == pytest.approx(share.item(), abs=1e-10)


@pytest.mark.parametrize("magnitude", [1e-18, 1e12])
def test_scale_of_the_update_does_not_matter(magnitude: float) -> None:
    """LoRA updates of one short stage are tiny; thresholds must be relative."""
    update, past = normal(6, 9, seed=1), normal(6, 9, seed=2)
    expected = refine(update, [past], energy=0.9, scale=0.5)
    actual = refine(update * magnitude, [past * magnitude], energy=0.9, scale=0.5) / magnitude
    torch.testing.assert_close(actual, expected, **EXACT)


def test_float32_in_float32_out() -> None:
    """The arithmetic is float64, so the result is the float64 one rounded once."""
    update, past = normal(12, 5).float(), normal(12, 5, seed=1).float()
    actual = refine(update, [past], energy=0.9, scale=0.5)
    assert actual.dtype == denoise(update, 0.9).dtype == torch.float32
    expected = pinv_refine(update.double(), [past.double()], 0.9, 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=3e-7, atol=1e-7)


def test_inputs_are_not_changed() -> None:
    update, past = normal(4, 6), normal(4, 6, seed=1)
    for energy, scale in ((1.0, 1.0), (0.5, 0.0)):
        result = refine(update, [past], energy=energy, scale=scale)
        result.zero_()
    assert torch.equal(update, normal(4, 6))
    assert torch.equal(past, normal(4, 6, seed=1))


def test_refine_by_hand() -> None:
    """History spans e_11 (a 2×2 unit matrix). diag(4, 3) at θ = 1: the part in the span is 4·e_11.

    λ = 0.5 leaves diag(2, 3), λ = 0 leaves diag(0, 3), λ = 1 changes nothing. At θ = 0.6 truncation comes first
    (16/25 = 0.64): diag(4, 0) is then wholly in the span, and λ = 0.5 leaves diag(2, 0).
    """
    update = torch.diag(torch.tensor([4.0, 3.0], dtype=torch.float64))
    history = [torch.diag(torch.tensor([-7.0, 0.0], dtype=torch.float64))]
    for energy, scale, expected in ((1, 0.5, (2, 3)), (1, 0, (0, 3)), (1, 1, (4, 3)), (0.6, 0.5, (2, 0))):
        result = refine(update, history, energy=energy, scale=scale)
        torch.testing.assert_close(result, torch.diag(torch.tensor(expected, dtype=torch.float64)), **EXACT)


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_refine_agrees_with_pinv(shape: tuple[int, int], energy: float, scale: float) -> None:
    update = normal(*shape)
    history = [normal(*shape, seed=seed) * 10.0 ** (seed - 3) for seed in (1, 2, 3, 4)]
    expected = pinv_refine(update, history, energy, scale)
    torch.testing.assert_close(refine(update, history, energy=energy, scale=scale), expected, **EXACT)


def test_no_history_means_denoising_alone() -> None:
    update = normal(5, 8)
    for scale in (0.0, 0.5, 1.0):
        expected, _ = svd_denoise(update, 0.8)
        torch.testing.assert_close(refine(update, [], energy=0.8, scale=scale), expected, **EXACT)


def test_scale_zero_removes_all_of_the_span() -> None:
    update, history = normal(6, 10), [normal(6, 10, seed=seed) for seed in (1, 2, 3)]
    result = refine(update, history, energy=1.0, scale=0.0)
    for past in history:
        assert abs((result * past).sum().item()) < 1e-10
    mixture = 2 * history[0] - history[1] + 0.1 * history[2]
    torch.testing.assert_close(refine(mixture, history, energy=1.0, scale=0.0), torch.zeros(6, 10).double(), **EXACT)


def test_scale_one_switches_refinement_off() -> None:
    update, history = normal(6, 10), [normal(6, 10, seed=1)]
    assert torch.equal(refine(update, history, energy=0.7, scale=1.0), denoise(update, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_and_zero_rows_add_nothing(dtype: torch.dtype) -> None:
    """The released code's trap: it takes one direction per row of H, whatever H's rank."""
    update, first, second = (normal(3, 5, seed=seed).to(dtype) for seed in (0, 1, 2))
    zero = torch.zeros_like(first)
    expected = refine(update, [first, second], energy=1.0, scale=0.0)
    for history in (
        [first, first, second],
        [first, second, -3 * first, first + second],
        [zero, first, zero, second, zero],
        [first, 1e-6 * first, second],
    ):
        actual = refine(update, history, energy=1.0, scale=0.0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-6)
    assert torch.equal(refine(update, [zero], energy=1.0, scale=0.0), update)


def test_rounding_noise_is_no_knowledge_by_hand() -> None:
    """History e_11 and e_11 + ε·e_12. With ε = 1e-7, float32 rounding, new knowledge along e_12 passes untouched; with
    ε = 1e-3 the second row is knowledge of its own, and λ = 0 removes all of it.
    """
    e11, e12 = torch.zeros(2, 2), torch.zeros(2, 2)
    e11[0, 0] = e12[0, 1] = 1.0
    assert torch.equal(refine(e12, [e11, e11 + 1e-7 * e12], energy=1.0, scale=0.0), e12)
    known = refine(e12, [e11, e11 + 1e-3 * e12], energy=1.0, scale=0.0)
    torch.testing.assert_close(known, torch.zeros(2, 2), rtol=0, atol=1e-6)


def test_order_of_history_does_not_matter() -> None:
    update, history = normal(4, 9), [normal(4, 9, seed=seed) for seed in range(1, 6)]
    expected = refine(update, history, energy=0.9, scale=0.5)
    torch.testing.assert_close(refine(update, history[::-1], energy=0.9, scale=0.5), expected, **EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_consolidation_that_cannot_be_done_is_an_error(value: float) -> None:
    bad = torch.eye(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        denoise(bad, 0.9)
    with pytest.raises(ValueError, match="not finite"):
        refine(bad, [], energy=1.0, scale=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_history_that_is_not_finite_is_an_error(value: float) -> None:
    """Not passed over in silence: the update would keep what it must lose."""
    with pytest.raises(ValueError):
        refine(torch.eye(3), [torch.full((3, 3), value)], energy=1.0, scale=0.0)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 2)])
def test_history_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        refine(torch.ones(2, 3), [torch.ones(2, 3), torch.ones(shape)], energy=0.9, scale=0.5)


def test_no_energy_keeps_nothing() -> None:
    """k' = 0 is the smallest k' with an energy of at least 0, so the truncated update is zero."""
    assert denoise(torch.diag(torch.tensor([3.0, 1.0])), 0.0).equal(torch.zeros(2, 2))


@pytest.mark.parametrize(("energy", "scale"), [(0.9, 1.1), (-0.1, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.9, -0.1)])
def test_options_out_of_range(energy: float, scale: float) -> None:
    with pytest.raises(ValueError, match="must"):
        refine(torch.ones(2, 2), [], energy=energy, scale=scale)


@pytest.mark.parametrize("drift", [1.0, 1e-5])
def test_a_long_history_keeps_the_basis_orthonormal(drift: float) -> None:
    """60 updates in 96 dimensions, at 1e-5 all but parallel; every one is new, and the span holds every one."""
    basis, flat, past = Basis(1, 96), normal(1, 96), []
    for seed in range(1, 61):
        flat = flat + drift * normal(1, 96, seed=seed)
        basis.extend(flat)
        past.append(flat)
    vectors = basis.vectors[0]
    assert vectors.shape == (60, 96)
    assert (vectors @ vectors.T - torch.eye(60, dtype=torch.float64)).abs().max() < 1e-12
    assert max((basis.project(f) - f).norm() / f.norm() for f in past) < 1e-12


def test_a_full_space_takes_no_more_directions() -> None:
    """60 updates of 8 numbers span 8 dimensions; whatever comes then is known already."""
    basis = Basis(1, 8)
    for seed in range(60):
        basis.extend(normal(1, 8, seed=seed))
    assert basis.vectors.shape == (1, 8, 8)
    assert rescale_history(normal(1, 2, 4, seed=99), basis, 0.0).update.abs().max() < 1e-10


def test_history_share_by_hand() -> None:
    """(3, 4) against a span of (1, 0): 9/25 of the energy; a zero update has share 0."""
    basis = Basis(2, 2)
    basis.extend(torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    update = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]], dtype=torch.float64)
    result = rescale_history(update, basis, 0.5)
    assert result.history_share.tolist() == pytest.approx([0.36, 0.0], abs=1e-12)
    assert result.update.flatten().tolist() == pytest.approx([1.5, 4.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 10), (10, 4)])
def test_batched_calls_equal_single_calls(shape: tuple[int, int]) -> None:
    """Among the four factors one repeats its history and one has none, so that the basis is not rectangular."""
    updates = normal(4, *shape)
    histories = [normal(4, *shape, seed=1), normal(4, *shape, seed=2)]
    histories[1][1] = 5 * histories[0][1]
    histories[0][2] = histories[1][2] = 0
    basis = Basis(4, updates[0].numel())
    for past in histories:
        basis.extend(past.flatten(1))
    short_term = truncate(updates, 0.8)
    batched = rescale_history(short_term.update, basis, 0.25).update
    for i in range(4):
        single = refine(updates[i], [past[i] for past in histories], energy=0.8, scale=0.25)
        torch.testing.assert_close(batched[i], single, rtol=0, atol=1e-12)
        torch.testing.assert_close(short_term.update[i], svd_denoise(updates[i], 0.8)[0], **EXACT)
