"""The span of history, against hand-made cases, pseudo-inverses and the bounds that the code states (docs/method.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import normal, pinv_project, pinv_refine, relative, svd_denoise

from lifealign.memory import denoise, refine
from lifealign.memory.basis import Basis, rescale_history
from lifealign.memory.truncation import truncate

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 40), (40, 8), (13, 13)]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def extended(updates: torch.Tensor, **options: Any) -> Basis:
    """A basis of updates, (stages, batch, rows, columns)."""
    basis = Basis(updates.shape[1], updates.shape[2:], **options)
    for update in updates:
        basis.extend(update)
    return basis


def in_span(basis: Basis, update: torch.Tensor) -> torch.Tensor:
    """The component in the span: what refinement with a scale of 0 takes away."""
    return update - rescale_history(update, basis, 0.0).update


def flat(basis: Basis, factor: int = 0) -> torch.Tensor:
    """(size, rows * columns) vectors of one factor, float64."""
    return basis.vectors[:, factor].flatten(1).double()


# -- refinement of one factor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_update_stays_zero(shape: tuple[int, int], energy: float) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(refine(zero, [normal(*shape).float()], energy=energy, scale=0.5), zero)


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
    assert actual.dtype == torch.float32
    expected = pinv_refine(update.double(), [past.double()], 0.9, 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=1e-9)


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


def test_refine_takes_updates_as_training_has_them() -> None:
    """Parameters that ask for gradients; the result has none."""
    update, past = normal(5, 3).requires_grad_(), normal(3, 5).mT.requires_grad_()
    refined = refine(update, [past], energy=0.9, scale=0.5)
    assert not refined.requires_grad
    torch.testing.assert_close(refined, refine(update.detach(), [past.detach()], energy=0.9, scale=0.5))


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
def test_a_refinement_that_cannot_be_done_is_an_error(value: float) -> None:
    bad = torch.eye(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        refine(bad, [], energy=1.0, scale=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_history_that_is_not_finite_is_an_error(value: float) -> None:
    """Not passed over in silence: the update would keep what it must lose."""
    with pytest.raises(ValueError, match="not finite"):
        refine(torch.eye(3), [torch.full((3, 3), value)], energy=1.0, scale=0.0)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 2)])
def test_history_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        refine(torch.ones(2, 3), [torch.ones(2, 3), torch.ones(shape)], energy=0.9, scale=0.5)


@pytest.mark.parametrize(
    ("energy", "scale"), [(0.9, 1.1), (-0.1, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.9, -0.1), (1, math.nan)]
)
def test_options_out_of_range(energy: float, scale: float) -> None:
    with pytest.raises(ValueError, match="must"):
        refine(torch.ones(2, 2), [], energy=energy, scale=scale)


# -- the basis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [1.0, 1e-5])
def test_a_long_history_keeps_the_basis_orthonormal(drift: float) -> None:
    """60 updates in 96 dimensions, at 1e-5 all but parallel; every one is new, and the span holds every one."""
    past = normal(1, 8, 12) + drift * torch.stack([normal(1, 8, 12, seed=s) for s in range(1, 61)]).cumsum(0)
    basis = extended(past)
    vectors = flat(basis)
    assert basis.vectors.shape == (60, 1, 8, 12)
    assert (vectors @ vectors.T - torch.eye(60, dtype=torch.float64)).abs().max() < 1e-12
    assert max(relative(in_span(basis, update), update) for update in past) < 1e-12


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_a_long_history_of_fewer_digits_keeps_the_basis_orthonormal(dtype: torch.dtype, error: float) -> None:
    past = normal(1, 8, 12) + torch.stack([normal(1, 8, 12, seed=s) for s in range(1, 61)]).cumsum(0)
    vectors = flat(extended(past.to(dtype), dtype=dtype))
    assert vectors.shape == (60, 96)
    assert (vectors @ vectors.T - torch.eye(60, dtype=torch.float64)).abs().max() < error


def test_a_full_space_takes_no_more_directions() -> None:
    """60 updates of 8 numbers span 8 dimensions; whatever comes then is known already."""
    basis = extended(torch.stack([normal(1, 2, 4, seed=seed) for seed in range(60)]))
    assert basis.vectors.shape == (8, 1, 2, 4)
    assert rescale_history(normal(1, 2, 4, seed=99), basis, 0.0).update.abs().max() < 1e-10


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_known_adds_no_direction(dtype: torch.dtype, limit: int | None) -> None:
    """A repeated update, a linear combination of past ones, a zero one; each rounded to what memory holds."""
    past = torch.stack([normal(2, 6, 9, seed=seed) for seed in range(3)]).to(dtype)
    basis = extended(past, dtype=dtype, limit=limit)
    before = basis.vectors.clone()
    mixture = (0.3 * past[0].double() - 1.7 * past[1].double() + past[2].double()).to(dtype)
    for known in (past[0], past[2] * 3, mixture, torch.zeros_like(mixture), mixture * 1e-4):
        basis.extend(known)
        assert torch.equal(basis.vectors, before)
    basis.extend(normal(2, 6, 9, seed=7).to(dtype))
    assert basis.size == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_fewer_digits_span_what_the_full_ones_span(dtype: torch.dtype) -> None:
    """Of the same updates: projections differ from those of float64 vectors by rounding, over 12 updates."""
    past = torch.stack([normal(3, 6, 20, seed=seed) for seed in range(12)]).to(dtype)
    basis, reference = extended(past, dtype=dtype), extended(past.double())
    assert basis.vectors.dtype == dtype
    for update in (normal(3, 6, 20, seed=50), past[4].double()):
        for precision in (torch.float32, torch.float64):
            projected = in_span(basis, update.to(precision))
            assert projected.dtype == precision
            assert relative(projected, in_span(reference, update)) < ROUNDING[dtype]


@pytest.mark.parametrize("limit", [None, 2])
def test_what_lies_in_the_span_is_no_more_than_all_of_it(limit: int | None) -> None:
    """Vectors in bfloat16 are a little longer or shorter than 1."""
    past = torch.stack([normal(1, 4, 8, seed=seed) for seed in range(60)]).bfloat16()
    basis = Basis(1, (4, 8), dtype=torch.bfloat16, limit=limit)
    shares = []
    for update in past:
        basis.extend(update)
        shares.append(rescale_history(update.float(), basis, 0.5).history_share.item())
    assert 0.9 < max(shares) <= 1


def test_projection_agrees_with_pinv_for_each_factor() -> None:
    past = torch.stack([normal(3, 4, 10, seed=seed) for seed in range(5)])
    update = normal(3, 4, 10, seed=9)
    projected = in_span(extended(past), update)
    for i in range(3):
        torch.testing.assert_close(projected[i], pinv_project(update[i], list(past[:, i])), **EXACT)


def test_history_share_by_hand() -> None:
    """(3, 4) against a span of (1, 0): 9/25 of the energy; a zero update has share 0."""
    basis = extended(torch.tensor([[[[2.0, 0.0]], [[2.0, 0.0]]]], dtype=torch.float64))
    update = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]], dtype=torch.float64)
    result = rescale_history(update, basis, 0.5)
    assert result.history_share.tolist() == pytest.approx([0.36, 0.0], abs=1e-12)
    assert result.update.flatten().tolist() == pytest.approx([1.5, 4.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 10), (10, 4)])
def test_batched_calls_equal_single_calls(shape: tuple[int, int]) -> None:
    """Among the four factors one repeats its history and one has none, so that the basis is not rectangular."""
    updates = normal(4, *shape)
    histories = torch.stack([normal(4, *shape, seed=1), normal(4, *shape, seed=2)])
    histories[1, 1] = 5 * histories[0, 1]
    histories[:, 2] = 0
    short_term = truncate(updates, 0.8)
    batched = rescale_history(short_term.update, extended(histories), 0.25).update
    for i in range(4):
        single = refine(updates[i], list(histories[:, i]), energy=0.8, scale=0.25)
        torch.testing.assert_close(batched[i], single, rtol=0, atol=1e-12)


# -- capacity ----------------------------------------------------------------------------------------------------------


def history(stages: int, batch: int = 1, rows: int = 6, columns: int = 10) -> torch.Tensor:
    """Updates with a few strong directions, as (stages, batch, rows, columns)."""
    decay = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    return torch.stack([normal(batch, rows, columns, seed=seed) * decay for seed in range(stages)])


def test_two_directions_in_a_memory_of_one_by_hand() -> None:
    """m = 1. (2, 0) is held with energy 4. Then comes (0, 1): of the energies 4 and 1 the less leaves, and is taken from the
    other: (1, 0) stays with 3, and D = 1. Then (0, 3): 3 and 9 give (0, 1) with 6, and D = 4.
    """
    basis = Basis(1, (1, 2), limit=1)
    for update, kept, energy, merged in (((2.0, 0.0), (1, 0), 4, 0), ((0.0, 1.0), (1, 0), 3, 1), ((0.0, 3.0), (0, 1), 6, 4)):
        basis.extend(torch.tensor([[update]], dtype=torch.float64))
        assert basis.vectors.abs().flatten().tolist() == pytest.approx(kept, abs=1e-12)
        assert basis._energies.item() == pytest.approx(energy, abs=1e-12)
        assert basis.merged.item() == pytest.approx(merged, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_memory_with_room_is_exact(dtype: torch.dtype) -> None:
    past = history(8, 2).to(dtype)
    limited, unlimited = extended(past, dtype=dtype, limit=8), extended(past, dtype=dtype)
    assert torch.equal(limited.vectors, unlimited.vectors)
    assert not limited.merged.any()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-6), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("limit", [1, 4, 9])
def test_a_full_memory_keeps_its_bounds(limit: int, dtype: torch.dtype, error: float) -> None:
    """200 updates: 0 <= ‖H x‖² - xᵀ Vᵀ S V x <= D for every unit x, which bounds the eigenvalues of the difference; and
    D <= ‖H - H_k‖² / (m + 1 - k) for every k <= m. Errors are relative to ‖H‖².
    """
    past = history(200).to(dtype)
    basis = Basis(1, (6, 10), dtype=dtype, limit=limit)
    matrix = past.flatten(1).double()
    for done, update in enumerate(past, start=1):
        basis.extend(update)
        assert basis.size == min(limit, done)
        if done % 40:
            continue
        slack = error * matrix[:done].square().sum().item()
        vectors, merged = flat(basis), basis.merged.item()
        assert (vectors @ vectors.T - torch.eye(basis.size, dtype=torch.float64)).abs().max() < 10 * ROUNDING[dtype]
        missed = matrix[:done].T @ matrix[:done] - vectors.T @ basis._energies[0] @ vectors
        eigenvalues = torch.linalg.eigvalsh(missed)
        assert eigenvalues[0] >= -slack
        assert eigenvalues[-1] <= merged + slack
        squares = torch.linalg.svdvals(matrix[:done]).square()
        for k in range(limit + 1):
            assert merged <= squares[k:].sum().item() / (limit + 1 - k) + slack


def test_a_strong_direction_of_the_past_is_never_forgotten() -> None:
    """One direction, seen once with all of its energy, and 300 weak random ones in a memory of four."""
    strong = normal(1, 6, 10, seed=1000)
    weak = [0.02 * normal(1, 6, 10, seed=seed) for seed in range(300)]
    basis = extended(torch.stack([strong, *weak]), limit=4)
    assert basis.merged.item() < 0.5 * strong.square().sum().item()
    assert relative(in_span(basis, strong), strong) < 0.1


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e-9, 1e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_vectors_leave_a_full_memory_first(dtype: torch.dtype, magnitude: float) -> None:
    """Beside a factor that moves always, one that stands still every third time and one that then repeats itself.

    Each must hold what it holds alone, whatever the magnitude of its updates.
    """
    past = history(30, 3) * magnitude
    past[1::3, 1] = 0
    past[1::3, 2] = past[0::3, 2]
    past = past.to(dtype)
    together = extended(past, dtype=dtype, limit=4)
    update = normal(3, 6, 10, seed=500)
    found = in_span(together, update)
    for i in range(3):
        alone = extended(past[:, i : i + 1], dtype=dtype, limit=4)
        assert (flat(together, i).norm(dim=1) - 1).abs().max() < 1e-5, "a zero vector takes up room"
        assert together.merged[i].item() == pytest.approx(alone.merged.item(), rel=1e-4)
        assert relative(found[i], in_span(alone, update[i : i + 1])[0]) < (1e-9 if dtype == torch.float64 else 1e-4)


def test_a_factor_that_never_moves_holds_nothing() -> None:
    past = history(20, 2)
    past[:, 0] = 0
    basis = extended(past, limit=3)
    assert not flat(basis, 0).any()
    assert basis.merged[0].item() == 0
    assert basis.size == 3


def test_a_full_memory_is_the_same_when_filled_again() -> None:
    first, second = (extended(history(50, 2).float(), dtype=torch.float32, limit=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.merged, second.merged)


def test_an_update_that_is_not_finite_does_not_join() -> None:
    basis = extended(history(2))
    with pytest.raises(ValueError, match="not finite"):
        basis.extend(torch.full((1, 6, 10), math.nan))
    assert basis.size == 2
