"""Consolidation of products B A, against dense matrices in float64 (docs/method.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracles import normal, pinv_project, relative, svd_denoise

from lifealign.errors import ConsolidationFailed
from lifealign.memory import ConsolidationOptions, ProductConsolidator, Space, make_consolidator
from lifealign.memory.consolidation import Consolidated
from lifealign.memory.product import (
    Product,
    ProductHistory,
    best_adapter,
    inner,
    pair_factors,
    rank_holding,
    scaled,
    spectral,
    total,
)
from lifealign.runtime import distributed

Factors = dict[str, torch.Tensor]
LAYERS = {"wide": (7, 19, 3), "tall": (23, 5, 4), "square": (8, 8, 2), "row": (1, 9, 1), "column": (9, 1, 1), "full": (6, 6, 6)}
"""Rows, columns and rank of each."""


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def a_name(layer: str) -> str:
    return f"model.{layer}.lora_A.default.weight"


def b_name(layer: str) -> str:
    return f"model.{layer}.lora_B.default.weight"


def shapes_of(layers: Mapping[str, tuple[int, int, int]]) -> dict[str, torch.Size]:
    shapes = {}
    for layer, (rows, columns, rank) in layers.items():
        shapes |= {a_name(layer): torch.Size((rank, columns)), b_name(layer): torch.Size((rows, rank))}
    return shapes


def made(layers: Mapping[str, tuple[int, int, int]] = LAYERS, **options: Any) -> ProductConsolidator:
    consolidator = make_consolidator(Space.product, shapes_of(layers), ConsolidationOptions(**options))
    assert isinstance(consolidator, ProductConsolidator)
    return consolidator


def draw(seed: int, size: float = 1.0, layers: Mapping[str, tuple[int, int, int]] = LAYERS) -> Factors:
    return {n: (normal(*s, seed=1000 * seed + i) * size).float() for i, (n, s) in enumerate(shapes_of(layers).items())}


def fresh(layers: Mapping[str, tuple[int, int, int]] = LAYERS) -> Factors:
    """A is random and B is zero."""
    return {name: value * ("lora_A" in name) for name, value in draw(0, layers=layers).items()}


def moved(at: Mapping[str, torch.Tensor], by: Mapping[str, torch.Tensor]) -> Factors:
    return {name: at[name] + by[name] for name in at}


def product(factors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    return factors[b_name(layer)].double() @ factors[a_name(layer)].double()


def remembered(update: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    return update[f"model.{layer}.left"].double() @ update[f"model.{layer}.right"].double()


def random_product(rows: int, columns: int, rank: int, seed: int = 0) -> Product:
    return Product(normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 1))


def dense(p: Product) -> torch.Tensor:
    return p.left @ p.right


# -- products ----------------------------------------------------------------------------------------------------------


def test_arithmetic_of_products() -> None:
    a, b = random_product(6, 9, 2), random_product(6, 9, 3, seed=5)
    torch.testing.assert_close(dense(total([a, scaled(b, -2.0)])), dense(a) - 2 * dense(b))
    assert inner(a, b).item() == pytest.approx((dense(a) * dense(b)).sum().item(), rel=1e-12)
    assert a.norm() == pytest.approx(dense(a).norm().item(), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 9, 2), (9, 6, 6), (5, 4, 8), (1, 7, 3), (7, 1, 3), (3, 3, 1)])
def test_a_product_taken_apart(rows: int, columns: int, rank: int) -> None:
    """Also of more terms than the matrix has rows or columns."""
    p = random_product(rows, columns, rank)
    found, expected = spectral(p), torch.linalg.svdvals(dense(p))
    most = min(rows, columns, rank)
    torch.testing.assert_close(found.s[:most], expected[:most], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(found.leading(len(found.s))), dense(p), rtol=1e-12, atol=1e-12)
    eye = torch.eye(len(found.s), dtype=torch.float64)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vt @ found.vt.T, eye, rtol=0, atol=1e-12)


def test_rank_by_hand() -> None:
    """Energies 9, 1: 0.9 is met by the first exactly; of nothing, no rank is needed."""
    s = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert [rank_holding(s, energy) for energy in (0.0, 0.5, 0.9, 0.9 + 1e-9, 1.0)] == [0, 1, 1, 2, 2]
    assert rank_holding(torch.zeros(3, dtype=torch.float64), 0.9) == 0


# -- history -----------------------------------------------------------------------------------------------------------


def test_projection_agrees_with_pinv() -> None:
    """Six updates of very different lengths, among them a repeated, a mixed and a zero one."""
    past = [scaled(random_product(6, 9, 2, seed=10 * i), 10.0 ** (i - 2)) for i in range(4)]
    past += [scaled(past[1], 3.0), total([past[0], past[2]]), scaled(past[0], 0.0)]
    history = ProductHistory()
    assert history.project(past[0]) is None
    update = random_product(6, 9, 3, seed=99)
    for i, one in enumerate(past, start=1):
        history.extend(one)
        expected = pinv_project(dense(update), [dense(p) for p in past[:i]])
        found = history.project(update)
        assert found is not None
        assert relative(dense(found), expected) < 1e-5  # history is kept in float32


def test_a_history_of_nothing_has_no_span() -> None:
    history = ProductHistory()
    history.extend(scaled(random_product(4, 5, 2), 0.0))
    assert history.project(random_product(4, 5, 2)) is None


@pytest.mark.parametrize("magnitude", [1e-9, 1e6])
def test_scale_of_history_does_not_matter(magnitude: float) -> None:
    plain, other = ProductHistory(), ProductHistory()
    for i in range(3):
        plain.extend(random_product(5, 7, 2, seed=i))
        other.extend(scaled(random_product(5, 7, 2, seed=i), magnitude))
    update = random_product(5, 7, 2, seed=50)
    assert relative(dense(other.project(update)), dense(plain.project(update))) < 1e-5


# -- the best adapter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 1, 3, 4, 6])
@pytest.mark.parametrize(("rows", "columns", "r"), [(7, 19, 4), (23, 5, 4), (8, 4, 4), (6, 6, 6), (3, 9, 4)])
def test_the_best_adapter_of_a_rank(rows: int, columns: int, r: int, held: int) -> None:
    """Eckart-Young: the r leading singular directions. A's rows are orthogonal and as long as the old ones on average."""
    wanted, a = random_product(rows, columns, held, seed=3), normal(r, columns, seed=7) * 0.3
    if r == 4:
        a[2] = 0  # a row that did not move from zero
    adapter = best_adapter(spectral(wanted), a)
    assert adapter.left.shape == (rows, r)
    assert adapter.right.shape == (r, columns)
    u, s, vh = torch.linalg.svd(dense(wanted), full_matrices=False)
    expected = (u[:, :r] * s[:r]) @ vh[:r]
    torch.testing.assert_close(dense(adapter), expected, rtol=0, atol=1e-12)
    length = a.square().sum(1).mean().item()
    gram = adapter.right @ adapter.right.T
    torch.testing.assert_close(gram, length * torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_rest_of_a_is_of_what_it_spanned() -> None:
    """One direction is wanted, of two that A spans: the other row stays within A's span."""
    a = normal(2, 9, seed=1)
    wanted = Product(normal(5, 1), a[:1])
    adapter = best_adapter(spectral(wanted), a)
    within = torch.linalg.qr(a.T).Q
    torch.testing.assert_close(adapter.right @ within @ within.T, adapter.right, rtol=0, atol=1e-12)


def test_an_adapter_wider_than_its_layer_keeps_its_shape() -> None:
    """Rank 8 on a layer of 5 inputs: three rows of A more than there are directions."""
    layers = {"thin": (20, 5, 8)}
    before, after = draw(1, layers=layers), draw(2, layers=layers)
    values, update, _ = made(layers, energy=1.0).consolidate(before, after)
    assert {name: value.shape for name, value in values.items()} == shapes_of(layers)
    assert relative(product(values, "thin"), product(after, "thin")) < 1e-6
    assert relative(remembered(update, "thin"), product(after, "thin") - product(before, "thin")) < 1e-5


# -- whole stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "scale"), [(0.9, 0.5), (1.0, 0.0), (0.5, 1.0), (0.99, 0.2)])
def test_stages_agree_with_dense_matrices(energy: float, scale: float) -> None:
    consolidator = made(energy=energy, scale=scale)
    assert consolidator.owned == set(shapes_of(LAYERS))
    at = fresh()
    history: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for stage in range(1, 5):
        after = moved(at, draw(stage, 0.3))
        values, update, records = consolidator.consolidate(at, after)
        assert {name: value.shape for name, value in values.items()} == shapes_of(LAYERS)
        assert [record["factor"] for record in records] == sorted(f"model.{layer}" for layer in LAYERS)
        by_layer = {record["factor"].removeprefix("model."): record for record in records}
        for layer, (_, _, r) in LAYERS.items():
            begin, change = product(at, layer), product(after, layer) - product(at, layer)
            short_term, kept_rank = svd_denoise(change, energy)
            past = pinv_project(short_term, history[layer])
            wanted = begin + short_term - (1 - scale) * past
            u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
            best = (u[:, :r] * s[:r]) @ vh[:r]
            added, record = remembered(update, layer), by_layer[layer]
            assert relative(product(values, layer), best) < 3e-5  # float32 history, where singular values are close
            assert (added - (best - begin)).norm() < 3e-5 * best.norm()
            assert (product(values, layer) - begin - added).norm() < 1e-6 * best.norm()
            assert record["kept_rank"] == kept_rank
            assert record["kept_energy"] == pytest.approx((short_term.norm() / change.norm()).item() ** 2, rel=1e-9)
            assert record["history_share"] == pytest.approx((past.norm() / short_term.norm()).item() ** 2, abs=1e-5)
            assert record["update_norm"] == pytest.approx(change.norm().item(), rel=1e-9)
            assert record["refined_norm"] == pytest.approx(added.norm().item(), rel=1e-6)
            assert record["truncation_error"] == pytest.approx(s[r:].norm().item(), abs=1e-5 * wanted.norm().item())
            singular = torch.linalg.svdvals(change)
            known = min(len(singular), len(record["singular_values"]))
            assert record["singular_values"][:known] == pytest.approx(singular[:known].tolist(), abs=1e-9)
            assert set(record) == {
                "factor",
                "kept_rank",
                "kept_energy",
                "history_share",
                "update_norm",
                "refined_norm",
                "truncation_error",
                "singular_values",
            }
            history[layer].append(added)
        json.dumps(records, allow_nan=False)
        at = values


def test_records_by_hand() -> None:
    """A is the 2×2 unit matrix and B goes from 0 to diag(3, 1): rank 1 holds 0.9, and diag(3, 0) joins the history.

    Then B goes on by diag(4, 3): rank 2 is needed, 16/25 lie in the span, and diag(2, 3) is added.
    """
    layers = {"x": (2, 2, 2)}
    consolidator = made(layers, energy=0.9, scale=0.5)
    eye = torch.eye(2)
    at = {a_name("x"): eye, b_name("x"): torch.zeros(2, 2)}
    expected = (
        ((3.0, 1.0), (1, 0.9, 0.0, math.sqrt(10), 3.0, 0.0), (3.0, 0.0)),
        ((4.0, 3.0), (2, 1.0, 0.64, 5.0, math.sqrt(13), 0.0), (2.0, 3.0)),
    )
    keys = ("kept_rank", "kept_energy", "history_share", "update_norm", "refined_norm", "truncation_error")
    for change, numbers, added in expected:
        wanted = product(at, "x") + torch.diag(torch.tensor(change))
        at, update, (record,) = consolidator.consolidate(at, {a_name("x"): eye, b_name("x"): wanted.float()})
        assert tuple(record[key] for key in keys) == pytest.approx(numbers, abs=1e-5)
        torch.testing.assert_close(remembered(update, "x"), torch.diag(torch.tensor(added)).double(), rtol=0, atol=1e-5)


def test_two_adapters_of_one_product_are_one_model() -> None:
    """Turning the inner side, B Q · Qᵀ A, changes neither what is remembered nor the product that comes out."""
    turned = {}
    after = moved(fresh(), draw(1, 0.3))
    for layer, (_, _, r) in LAYERS.items():
        q = torch.linalg.qr(normal(r, r, seed=4)).Q
        turned[a_name(layer)] = (q.T @ after[a_name(layer)].double()).float()
        turned[b_name(layer)] = (after[b_name(layer)].double() @ q).float()
    plain, other = (made().consolidate(fresh(), factors) for factors in (after, turned))
    for layer in LAYERS:
        assert relative(product(other.values, layer), product(plain.values, layer)) < 1e-5
        assert relative(remembered(other.update, layer), remembered(plain.update, layer)) < 1e-5


def test_nothing_of_the_span_is_left_where_the_adapter_has_room() -> None:
    """λ = 0, θ = 1. Each stage changes one column of B, so its update has rank 1, and rank 6 holds all that comes of it.

    The third stage moves all three of the columns that have moved so far.
    """
    layers = {"x": (12, 15, 6)}
    consolidator = made(layers, energy=1.0, scale=0.0)
    at = fresh(layers)
    history: list[torch.Tensor] = []
    for stage in range(1, 4):
        after = {**at, b_name("x"): at[b_name("x")].clone()}
        after[b_name("x")][:, : 3 if stage == 3 else 1] += normal(12, 3 if stage == 3 else 1, seed=stage).float()
        change = product(after, "x") - product(at, "x")
        if history:
            after_mixture = change + 2.0 * history[0]  # some of the past on top, if the adapter can hold it
            u, s, vh = torch.linalg.svd(product(at, "x") + after_mixture, full_matrices=False)
            assert s[6:].norm() < 1e-6 * s.norm()
            after = {b_name("x"): (u[:, :6] * s[:6]).float(), a_name("x"): vh[:6].float()}
        at, update, (record,) = consolidator.consolidate(at, after)
        added = remembered(update, "x")
        assert record["truncation_error"] < 1e-6 * record["update_norm"]
        for past in history:
            assert abs((added * past).sum().item()) < 1e-5 * added.norm() * past.norm()
        history.append(added)


def test_a_repeated_update_is_weighed_whole_and_adds_nothing() -> None:
    """θ = 1, λ = 0.5: an update, then half of it, then half again; a new one is then weighed against one direction."""
    layers = {"x": (12, 15, 4)}
    consolidator = made(layers, energy=1.0, scale=0.5)
    begin = fresh(layers)
    step = draw(1, layers=layers)[b_name("x")]
    at, wanted = begin, 0.0
    first = step.double() @ begin[a_name("x")].double()
    for factor, share in ((1.0, 0.0), (0.5, 1.0), (0.5, 1.0)):
        after_product = product(at, "x") + first
        u, s, vh = torch.linalg.svd(after_product, full_matrices=False)
        after = {b_name("x"): (u[:, :4] * s[:4]).float(), a_name("x"): vh[:4].float()}
        at, update, (record,) = consolidator.consolidate(at, after)
        assert record["history_share"] == pytest.approx(share, abs=1e-5)
        assert relative(remembered(update, "x"), factor * first) < 1e-5
        wanted += factor
        assert relative(product(at, "x"), wanted * first) < 1e-5
    after = moved(at, draw(7, 0.2, layers))
    change = product(after, "x") - product(at, "x")
    (record,) = consolidator.consolidate(at, after).records
    expected = (pinv_project(change, [first]).norm() / change.norm()).item() ** 2
    assert record["history_share"] == pytest.approx(expected, abs=1e-4)


def test_a_zero_update_stays_zero() -> None:
    """Nothing is kept, nothing is remembered but nothing, and the span of history is as it was."""
    touched, straight = made(), made()
    at = touched.consolidate(fresh(), moved(fresh(), draw(1, 0.3))).values
    straight.consolidate(fresh(), moved(fresh(), draw(1, 0.3)))
    values, update, records = touched.consolidate(at, at)
    for layer in LAYERS:
        assert relative(product(values, layer), product(at, layer)) < 1e-6
        assert remembered(update, layer).norm() <= 1e-6 * product(at, layer).norm()
    for record in records:
        assert record["kept_rank"] == 0
        assert record["kept_energy"] == 1
        assert record["history_share"] == 0
    after = moved(at, draw(2, 0.3))
    left, right = (c.consolidate(at, after) for c in (touched, straight))
    for one, other in zip(left.records, right.records, strict=True):
        assert one["history_share"] == pytest.approx(other["history_share"], abs=1e-6)


def test_nothing_of_a_fresh_adapter_stays_nothing() -> None:
    """B is zero before and after: no rank, no norm, B stays zero, and A's rows stay as long as they were."""
    values, update, records = made().consolidate(fresh(), fresh())
    for layer in LAYERS:
        assert not values[b_name(layer)].any()
        assert values[a_name(layer)].norm().item() == pytest.approx(fresh()[a_name(layer)].norm().item(), rel=1e-6)
        assert not remembered(update, layer).any()
    assert all((r["kept_rank"], r["update_norm"], r["refined_norm"], r["kept_energy"]) == (0, 0, 0, 1) for r in records)


def test_what_is_passed_on_is_the_change_and_makes_no_history() -> None:
    consolidator, alone = made(), made()
    before, after = moved(fresh(), draw(3, 0.5)), moved(fresh(), draw(4, 0.5))
    values, update, records = consolidator.pass_on(before, after)
    assert all(torch.equal(values[name], after[name]) for name in after)
    for record in records:
        layer = record["factor"].removeprefix("model.")
        change = product(after, layer) - product(before, layer)
        assert relative(remembered(update, layer), change) < 1e-6
        assert record["update_norm"] == record["refined_norm"] == pytest.approx(change.norm().item(), rel=1e-9)
    later, fresh_one = (c.consolidate(before, after) for c in (consolidator, alone))
    assert later.records == fresh_one.records


def test_the_products_of_the_adapter_are_the_sum_of_memory() -> None:
    """Over six stages, to the rounding of the adapter itself: a ledger that drifts from it could not be scaled or reverted."""
    consolidator = made()
    at, start = fresh(), fresh()
    sums = {layer: product(start, layer) for layer in LAYERS}
    for stage in range(1, 7):
        at, update, _ = consolidator.consolidate(at, moved(at, draw(stage, 0.3)))
        for layer in LAYERS:
            sums[layer] += remembered(update, layer)
    assert max(relative(sums[layer], product(at, layer)) for layer in LAYERS) < 1e-5


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3])
def test_a_small_update_beside_a_large_adapter_is_remembered(magnitude: float) -> None:
    """The difference of two products in float32: the error is one of the adapter's rounding, not of the update's size."""
    at = moved(fresh(), draw(1, 1.0))
    after = moved(at, draw(2, magnitude))
    values, update, _ = made(energy=1.0, scale=1.0).consolidate(at, after)
    for layer in LAYERS:
        added, change = remembered(update, layer), product(after, layer) - product(at, layer)
        assert (product(values, layer) - product(at, layer) - added).norm() < 1e-5 * added.norm()
        assert (added - change).norm() < 1e-6 * product(at, layer).norm()


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ProductConsolidator.consolidate, ProductConsolidator.pass_on])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_named(value: float, call: Callable[..., Consolidated]) -> None:
    after = draw(1)
    after[b_name("tall")][2, 1] = value
    with pytest.raises(ConsolidationFailed, match=r"model\.tall\.lora_B\.default\.weight is not finite"):
        call(made(), fresh(), after)


@pytest.mark.parametrize("call", [ProductConsolidator.consolidate, ProductConsolidator.pass_on])
def test_a_decomposition_that_fails_names_the_layer(call: Callable[..., Consolidated], monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.svd

    def fails(matrix: torch.Tensor, **options: Any) -> Any:
        if matrix.norm() > 1e6:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    after = draw(1)
    after[b_name("tall")] *= 1e8
    with pytest.raises(ConsolidationFailed, match="did not converge") as failure:
        call(made(), fresh(), after)
    assert "model.tall" in str(failure.value)


def test_memory_that_is_not_finite_is_an_error() -> None:
    update = made().consolidate(fresh(), draw(1)).update
    update["model.tall.left"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.tall"):
        made().remember(update)


def test_factors_and_their_pairs() -> None:
    names = ["x.lora_B.default.weight", "x.lora_A.default.weight", "e.lora_A.default.weight", "e.lora_B.default.weight"]
    expected = {"x": (names[1], names[0]), "e": (names[2], names[3])}
    assert pair_factors(names) == expected
    for lone in ("x.lora_A.default.weight", "x.lora_B.default.weight"):
        with pytest.raises(ValueError, match="x has no pair"):
            pair_factors([lone, *names[2:]])
        with pytest.raises(ValueError, match="x has no pair"):
            ProductConsolidator({lone: torch.Size((2, 3))}, ConsolidationOptions())


# -- ranks and resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 9])
def test_ranks_share_the_layers_and_agree_with_one(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's work depends on the layer alone, so ranks agree to the bit. Both factors of a layer have one owner."""
    begin, alone = fresh(), made()
    expected, at = [], begin
    for stage in range(1, 4):
        expected.append((at, alone.consolidate(at, moved(at, draw(stage, 0.3)))))
        at = expected[-1][1].values
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    seen: list[str] = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shared = made()
        seen += shared.owned
        assert all((a_name(layer) in shared.owned) == (b_name(layer) in shared.owned) for layer in LAYERS)
        for stage, (before, whole) in enumerate(expected, start=1):
            own = {name: before[name] for name in shared.owned}
            part = shared.consolidate(own, moved(own, draw(stage, 0.3)))
            assert part.values.keys() == shared.owned
            assert all(torch.equal(part.values[name], whole.values[name]) for name in part.values)
            assert all(torch.equal(part.update[name], whole.update[name]) for name in part.update)
            assert part.update.keys() == {name for name in whole.update if shared.holds(name)}
            assert part.records == [record for record in whole.records if a_name(record["factor"][6:]) in part.values]
    assert sorted(seen) == sorted(shapes_of(LAYERS))


def test_a_history_made_anew_is_the_same_to_the_bit() -> None:
    straight, resumed = (made() for _ in range(2))
    at = fresh()
    for stage in range(1, 4):
        at, update, _ = straight.consolidate(at, moved(at, draw(stage, 0.3)))
        resumed.remember(update)
    after = moved(at, draw(4, 0.3))
    left, right = straight.consolidate(at, after), resumed.consolidate(at, after)
    assert left.records == right.records
    assert all(torch.equal(left.values[name], right.values[name]) for name in left.values)
    assert all(torch.equal(left.update[name], right.update[name]) for name in left.update)
