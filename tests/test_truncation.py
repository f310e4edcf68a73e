"""Truncation, against hand-made cases and plain SVDs (docs/method.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import normal, relative, svd_denoise, with_spectrum

from lifealign.memory import SVDMethod, truncation
from lifealign.memory.truncation import truncate

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 40), (40, 8), (13, 13)]
ONE_BY_ONE = torch.arange(1, 401, dtype=torch.float64)
SPECTRA = {
    "1/i": 1 / ONE_BY_ONE,
    "geometric": 0.9**ONE_BY_ONE,
    "slow geometric": 0.98**ONE_BY_ONE,
    "rank 100": torch.cat([1 / ONE_BY_ONE[:100], torch.zeros(300)]),
    "thirty above the rest": torch.cat([torch.ones(30), torch.full((370,), 1e-3)]).double(),
}


def test_threshold_by_hand() -> None:
    """diag(3, 1) has energies 9 and 1: the first holds 0.9 exactly, so θ = 0.9 keeps it alone; a little more, both."""
    update = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    kept = truncate(update, 0.9)
    torch.testing.assert_close(kept.update, torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64)), **EXACT)
    assert kept.kept_rank.item() == 1
    assert kept.kept_energy.item() == pytest.approx(0.9, abs=1e-12)
    assert kept.singular_values.tolist() == pytest.approx([3.0, 1.0], abs=1e-12)
    both = truncate(update, 0.9 + 1e-9)
    torch.testing.assert_close(both.update, update, **EXACT)
    assert both.kept_rank.item() == 2
    assert both.kept_energy.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", SVDMethod)
@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_met_but_for_rounding(seed: int, method: SVDMethod) -> None:
    """diag(3, 1) in rotated coordinates: 0.9 is now met to rounding only, and one direction must still do."""
    left, right = (torch.linalg.qr(normal(2, 2, seed=seed + k)).Q for k in (0, 100))
    update = left @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ right.T
    assert truncate(update, 0.9, method).kept_rank.item() == 1


@pytest.mark.parametrize("method", SVDMethod)
def test_directions_off_the_axes_by_hand(method: SVDMethod) -> None:
    """3·u·aᵀ + 1·v·bᵀ with u, v = (1, ±1)/√2, a = (1, 0, 0), b = (0, 0.6, 0.8): θ = 0.5 leaves 3·u·aᵀ."""
    u, v = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    a, b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]], dtype=torch.float64)
    update = 3 * torch.outer(u, a) + torch.outer(v, b)
    torch.testing.assert_close(truncate(update, 0.5, method).update, 3 * torch.outer(u, a), **EXACT)
    torch.testing.assert_close(truncate(update.T, 0.5, method).update, 3 * torch.outer(a, u), **EXACT)


def test_signs_and_order_of_the_diagonal_do_not_matter() -> None:
    """diag(1, −4, 2): energies 1, 16, 4 of 21. θ = 0.8 needs 16.8: both 16 and 4."""
    update = torch.diag(torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64))
    kept = truncate(update, 0.8)
    torch.testing.assert_close(kept.update, torch.diag(torch.tensor([0.0, -4.0, 2.0], dtype=torch.float64)), **EXACT)
    assert kept.kept_energy.item() == pytest.approx(20 / 21, abs=1e-12)
    assert kept.singular_values.tolist() == pytest.approx([4.0, 2.0, 1.0], abs=1e-12)


@pytest.mark.parametrize("method", SVDMethod)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_energy_keeps_everything(shape: tuple[int, int], dtype: torch.dtype, method: SVDMethod) -> None:
    update = normal(*shape).to(dtype)
    kept = truncate(update, 1.0, method)
    assert torch.equal(kept.update, update)
    assert (kept.kept_rank.item(), kept.kept_energy.item()) == (min(shape), 1.0)


@pytest.mark.parametrize("method", SVDMethod)
@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_update_stays_zero(shape: tuple[int, int], energy: float, method: SVDMethod) -> None:
    zero = torch.zeros(shape)
    kept = truncate(zero, energy, method)
    assert torch.equal(kept.update, zero)
    assert (kept.kept_rank.item(), kept.kept_energy.item()) == (0, 1.0)
    assert not kept.singular_values.any()


@pytest.mark.parametrize("method", [SVDMethod.gram, SVDMethod.exact])
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_svd(shape: tuple[int, int], energy: float, method: SVDMethod) -> None:
    for seed in range(3):
        update = normal(*shape, seed=seed) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
        expected, rank = svd_denoise(update, energy)
        kept = truncate(update, energy, method)
        torch.testing.assert_close(kept.update, expected, **EXACT)
        assert kept.kept_rank.item() == rank
        share = expected.square().sum() / update.square().sum()
        assert kept.kept_energy.item() == pytest.approx(share.item(), abs=1e-10)
        # The square root of a Gram matrix's eigenvalue has half its digits at the small end.
        torch.testing.assert_close(kept.singular_values, torch.linalg.svdvals(update), rtol=0, atol=1e-7)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_sketch_keeps_what_a_full_decomposition_keeps(name: str, energy: float) -> None:
    """The energy is a promise; the rank is at most one more than the smallest for these spectra. (400, 600), no short side."""
    update = with_spectrum(SPECTRA[name], 400, 600)
    kept, exact = (truncate(update, energy, method) for method in (SVDMethod.randomized, SVDMethod.exact))
    assert kept.kept_energy.item() >= energy * (1 - 1e-11)
    assert kept.kept_energy.item() <= exact.kept_energy.item() + 0.02
    assert exact.kept_rank.item() <= kept.kept_rank.item() <= exact.kept_rank.item() + 1
    assert kept.kept_energy.item() == pytest.approx((kept.update.norm() / update.norm()).item() ** 2, abs=1e-12)
    assert (kept.singular_values.diff() <= 0).all()
    rank = exact.kept_rank.item()
    torch.testing.assert_close(kept.singular_values[:rank], SPECTRA[name][:rank], rtol=0.05, atol=0)
    if SPECTRA[name][rank] < 0.95 * SPECTRA[name][rank - 1]:  # the truncation is the same matrix only where there is a gap
        assert relative(kept.update, exact.update) < 1e-3


def test_a_sketch_across_a_wide_gap_is_the_truncation() -> None:
    """Thirty directions stand a thousandfold above the rest: the sketch finds them to the last digits."""
    update = with_spectrum(SPECTRA["thirty above the rest"], 400, 600)
    kept = truncate(update, 0.99, SVDMethod.randomized)
    assert kept.kept_rank.item() == 30
    assert relative(kept.update, svd_denoise(update, 0.99)[0]) < 1e-12


def test_a_sketch_of_a_flat_spectrum_grows_until_the_energy_is_held() -> None:
    """400 equal singular values: half of the energy is 200 directions, whichever; and every sketch of them is exact."""
    update = with_spectrum(torch.ones(400, dtype=torch.float64), 400, 600)
    kept = truncate(update, 0.5, SVDMethod.randomized)
    assert kept.kept_rank.item() in (200, 201)
    assert 0.5 - 1e-12 <= kept.kept_energy.item() <= 201 / 400 + 1e-12
    torch.testing.assert_close(kept.singular_values, torch.ones_like(kept.singular_values), **EXACT)


@pytest.mark.parametrize("energy", [0.999999, 1 - 1e-10])
def test_a_sketch_of_a_matrix_of_low_rank_ends_with_its_rank(energy: float) -> None:
    """Blocks that come after all of the rank has been found are noise, and must add nothing."""
    update = with_spectrum(torch.full((50,), 2.0, dtype=torch.float64), 200, 300)
    kept = truncate(update, energy, SVDMethod.randomized)
    assert kept.kept_rank.item() == 50
    assert relative(kept.update, update) < 1e-12


def test_a_batch_of_sketches_is_its_members() -> None:
    """Three matrices that need sketches of different sizes, the last of them zero."""
    flat, steep = torch.ones(60, dtype=torch.float64), 0.3 ** torch.arange(60, dtype=torch.float64)
    batch = torch.stack([with_spectrum(flat, 60, 90), with_spectrum(steep, 60, 90), torch.zeros(60, 90).double()])
    kept = truncate(batch, 0.9, SVDMethod.randomized)
    assert kept.kept_rank.tolist() == [54, 1, 0]
    for i, matrix in enumerate(batch):
        single = truncate(matrix, 0.9, SVDMethod.randomized)
        torch.testing.assert_close(kept.update[i], single.update, rtol=0, atol=1e-13)
        assert kept.kept_energy[i].item() == pytest.approx(single.kept_energy.item(), abs=1e-13)
        found = len(single.singular_values)
        torch.testing.assert_close(kept.singular_values[i, :found], single.singular_values, rtol=0, atol=1e-13)
        assert not kept.singular_values[i, found:].any()


def test_a_sketch_is_the_same_when_repeated_and_of_the_transpose() -> None:
    update = normal(90, 130)
    torch.rand(3)  # the global generator plays no part
    first, again, turned = (truncate(m, 0.7, SVDMethod.randomized) for m in (update, update.clone(), update.T))
    assert torch.equal(first.update, again.update)
    assert torch.equal(first.singular_values, again.singular_values)
    torch.testing.assert_close(turned.update.T, first.update, rtol=0, atol=1e-13)
    assert turned.kept_rank.item() == first.kept_rank.item()


def test_auto_sketches_where_no_side_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit at 30, (30, 50) and (50, 30) go to the Gram matrix and (31, 50) to a sketch."""
    monkeypatch.setattr(truncation, "GRAM_LIMIT", 30)
    for shape, method in (((30, 50), SVDMethod.gram), ((50, 30), SVDMethod.gram), ((31, 50), SVDMethod.randomized)):
        update = normal(*shape)
        assert torch.equal(truncate(update, 0.5).singular_values, truncate(update, 0.5, method).singular_values)
    sketched = truncate(normal(31, 50), 0.1).singular_values
    assert len(sketched) < 31
    assert len(truncate(normal(30, 50), 0.1).singular_values) == 30


@pytest.mark.parametrize("method", SVDMethod)
@pytest.mark.parametrize("shape", [(4, 10), (10, 4)])
def test_batched_calls_equal_single_calls(shape: tuple[int, int], method: SVDMethod) -> None:
    updates = normal(2, 3, *shape)
    updates[1, 1] = 0
    batched = truncate(updates, 0.8, method)
    assert batched.kept_rank.shape == batched.kept_energy.shape == (2, 3)
    for i, j in ((0, 0), (0, 2), (1, 1), (1, 2)):
        torch.testing.assert_close(batched.update[i, j], svd_denoise(updates[i, j], 0.8)[0], **EXACT)


@pytest.mark.parametrize("method", [SVDMethod.gram, SVDMethod.exact])
@pytest.mark.parametrize("shape", [(12, 5), (5, 700), (60, 90)])
def test_float32_in_float32_out(shape: tuple[int, int], method: SVDMethod) -> None:
    """Directions are found in float64, so that only the last product rounds, and by float32's rounding of the update."""
    update = normal(*shape).float()
    kept = truncate(update, 0.9, method)
    assert kept.update.dtype == torch.float32
    expected = svd_denoise(update.double(), 0.9)[0]
    error = (kept.update.double() - expected).norm() / update.double().norm()
    assert 0 < error < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("magnitude", [1e-18, 1e12])
@pytest.mark.parametrize("method", SVDMethod)
def test_scale_of_the_update_does_not_matter(magnitude: float, method: SVDMethod) -> None:
    """LoRA updates of one short stage are tiny; thresholds must be relative."""
    update = normal(30, 40, seed=1)
    expected, actual = truncate(update, 0.9, method), truncate(update * magnitude, 0.9, method)
    torch.testing.assert_close(actual.update / magnitude, expected.update, **EXACT)
    assert actual.kept_rank.item() == expected.kept_rank.item()


@pytest.mark.parametrize("method", SVDMethod)
def test_no_energy_keeps_nothing(method: SVDMethod) -> None:
    """k' = 0 is the smallest k' with an energy of at least 0, so the truncated update is zero."""
    kept = truncate(torch.diag(torch.tensor([3.0, 1.0])), 0.0, method)
    assert kept.update.equal(torch.zeros(2, 2))
    assert (kept.kept_rank.item(), kept.kept_energy.item()) == (0, 0.0)


@pytest.mark.parametrize("method", SVDMethod)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_truncation_that_cannot_be_done_is_an_error(value: float, method: SVDMethod) -> None:
    bad = torch.eye(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        truncate(bad, 0.9, method)


@pytest.mark.parametrize("energy", [-0.1, 1.1, math.nan])
def test_an_energy_out_of_range_is_an_error(energy: float) -> None:
    with pytest.raises(ValueError, match="must lie"):
        truncate(torch.ones(2, 2), energy)
