"""What holds of truncation and refinement whatever the numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal, relative

from lifealign.memory import SVDMethod, refine
from lifealign.memory.truncation import truncate

quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)
shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))
shares = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0.0, 1.0))
methods = st.sampled_from(list(SVDMethod))


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int]) -> torch.Tensor:
    """Of small whole numbers, so often of low rank, or of random ones; of any magnitude."""
    rows, columns = shape
    if draw(st.booleans()):
        numbers = draw(st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns))
        matrix = torch.tensor(numbers, dtype=torch.float64).view(rows, columns)
    else:
        matrix = normal(rows, columns, seed=draw(st.integers(0, 10**6)))
    return matrix * 10.0 ** draw(st.integers(-6, 6))


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An update, and up to five earlier ones."""
    shape = draw(shapes)
    return draw(matrices(shape)), draw(st.lists(matrices(shape), max_size=5))


@quickly
@given(cases(), st.integers(0, 10**6), st.floats(-3, 3), shares)
def test_refinement_without_truncation_is_linear(
    case: tuple[torch.Tensor, list[torch.Tensor]], seed: int, factor: float, scale: float
) -> None:
    update, history = case
    other = normal(*update.shape, seed=seed)
    refined = lambda m: refine(m, history, energy=1.0, scale=scale)  # noqa: E731
    size = update.norm() + other.norm()
    assert (refined(update + other) - refined(update) - refined(other)).norm() <= 1e-12 * size
    assert (refined(factor * update) - factor * refined(update)).norm() <= 1e-12 * size * (1 + abs(factor))


@quickly
@given(cases())
def test_what_has_been_removed_once_is_gone(case: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    update, history = case
    once = refine(update, history, energy=1.0, scale=0.0)
    assert (refine(once, history, energy=1.0, scale=0.0) - once).norm() <= 1e-12 * update.norm()


@quickly
@given(cases(), shares, shares)
def test_refinement_adds_no_energy(case: tuple[torch.Tensor, list[torch.Tensor]], energy: float, scale: float) -> None:
    update, history = case
    assert refine(update, history, energy=energy, scale=scale).norm() <= update.norm() * (1 + 1e-12)


@quickly
@given(cases(), st.randoms(use_true_random=False), shares)
def test_history_has_no_order_and_counts_nothing_twice(
    case: tuple[torch.Tensor, list[torch.Tensor]], random: object, scale: float
) -> None:
    """A permutation of history, zero rows in it, and rows that occur again change the result by rounding alone."""
    update, history = case
    expected = refine(update, history, energy=1.0, scale=scale)
    shuffled = [*history, torch.zeros_like(update), *(past * 2 for past in history)]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    actual = refine(update, shuffled, energy=1.0, scale=scale)
    assert (actual - expected).norm() <= 1e-9 * update.norm()


@quickly
@given(shapes.flatmap(matrices), shares, methods)
def test_truncation_keeps_the_energy_and_no_direction_more(update: torch.Tensor, energy: float, method: SVDMethod) -> None:
    kept = truncate(update, energy, method)
    rank, squares = kept.kept_rank.item(), torch.linalg.svdvals(update).square()
    assert kept.kept_energy.item() >= energy * (1 - 1e-11)
    assert kept.kept_energy.item() <= 1 + 1e-12
    if rank:  # a direction fewer would not do
        assert squares[: rank - 1].sum() < energy * squares.sum() * (1 + 1e-11)
    if update.any():
        assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-11)
        assert ((kept.update.norm() / update.norm()).item() ** 2) >= energy * (1 - 1e-11)


@quickly
@given(shapes.flatmap(matrices), shares, methods)
def test_truncation_is_the_same_of_the_transpose(update: torch.Tensor, energy: float, method: SVDMethod) -> None:
    kept, turned = truncate(update, energy, method), truncate(update.T, energy, method)
    assert kept.kept_rank.item() == turned.kept_rank.item()
    if update.shape[0] != update.shape[1]:  # of a square matrix the other side is decomposed; ties may fall otherwise
        assert relative(turned.update.T, kept.update) < 1e-12
