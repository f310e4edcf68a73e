"""Consolidation of an adapter factor by factor, in one process and as several ranks would do it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracles import relative

from lifealign.errors import ConsolidationFailed
from lifealign.memory import ConsolidationOptions, Consolidator, FactorConsolidator, Space, SVDMethod, make_consolidator, refine
from lifealign.memory import consolidation as consolidation_module
from lifealign.memory.consolidation import Consolidated, assign_owners
from lifealign.runtime import distributed

Factors = dict[str, torch.Tensor]
SHAPES = {
    f"layers.{layer}.{name}": torch.Size(shape)
    for layer in range(3)
    for name, shape in {"q.lora_A": (4, 24), "q.lora_B": (24, 4), "v.lora_A": (4, 24), "v.lora_B": (10, 4)}.items()
} | {"row": torch.Size((1, 7)), "column": torch.Size((7, 1)), "square": torch.Size((13, 13)), "number": torch.Size((1, 1))}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def made(shapes: Mapping[str, torch.Size] = SHAPES, **options: Any) -> Consolidator:
    return make_consolidator(Space.factors, shapes, ConsolidationOptions(**options))


def start(shapes: Mapping[str, torch.Size] = SHAPES) -> Factors:
    generator = torch.Generator().manual_seed(99)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def zero(shapes: Mapping[str, torch.Size] = SHAPES) -> Factors:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def changes(stage: int) -> Factors:
    """Random changes with decaying spectra; one factor does not move in stage 1 and repeats stage 0 in stage 2."""
    generator = torch.Generator().manual_seed(stage)
    result = {}
    for name, shape in SHAPES.items():
        decay = torch.logspace(0, -1, shape[1])
        result[name] = torch.randn(shape, generator=generator) * decay
    if stage == 1:
        result["layers.0.q.lora_A"].zero_()
    if stage == 2:
        result["layers.0.q.lora_A"] = changes(0)["layers.0.q.lora_A"]
    return result


def moved(before: Mapping[str, torch.Tensor], change: Mapping[str, torch.Tensor]) -> Factors:
    return {name: before[name] + change[name] for name in before}


def owned(consolidator: Consolidator, factors: Mapping[str, torch.Tensor]) -> Factors:
    return {name: value for name, value in factors.items() if name in consolidator.owned}


def equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected)


def run(consolidator: Consolidator, stages: int, first: int = 0) -> list[Consolidated]:
    """Some stages, each from where the last one ended."""
    at, done = start(), []
    for stage in range(first, first + stages):
        mine = owned(consolidator, at)
        done.append(consolidator.consolidate(mine, owned(consolidator, moved(at, changes(stage)))))
        at = {**at, **done[-1].values}
    return done


def played(monkeypatch: pytest.MonkeyPatch, ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What ``work``, which may consolidate once, returns or raises on each of some ranks, played in turn.

    The first round finds out what each rank has to say, the second hears all of it.
    """
    said: dict[int, Any] = {}

    def listen(value: Any) -> list[Any]:
        said[distributed.rank()] = value
        return [value]

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for gather in (listen, lambda value: [said[r] for r in range(ranks)]):
        monkeypatch.setattr(distributed, "gather_objects", gather)
        results: list[Any] = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            try:
                results.append(work())
            except ConsolidationFailed as failure:
                results.append(failure)
    return results


# -- owners ------------------------------------------------------------------------------------------------------------


def test_owners_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks: a → 0 (128), b → 1 (96), c → 1 (192, since 96 < 128), d → 0 (208). Equal costs go by name."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    cost = {"d": 80.0, "c": 96.0, "a": 128.0, "b": 96.0}
    expected = {"a": 0, "b": 1, "c": 1, "d": 0}
    assert assign_owners(cost) == assign_owners(dict(reversed(cost.items()))) == expected
    for names in ("xyz", "zyx", "yxz"):
        assert assign_owners(dict.fromkeys(names, 1.0)) == {"x": 0, "y": 1, "z": 0}
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert set(assign_owners(cost).values()) == {0}
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert sorted(assign_owners(cost).values()) == [0, 1, 2, 3]


def test_owners_go_by_the_cost_of_the_gram_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """numel × short side: a 32·4 = 128, b and c 24·4 = 96, d 40·2 = 80 though it has the most numbers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    shapes = {"d": torch.Size((2, 20)), "c": torch.Size((4, 6)), "a": torch.Size((8, 4)), "b": torch.Size((6, 4))}
    assert made(shapes).owners == {"a": 0, "b": 1, "c": 1, "d": 0}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_owners_are_balanced(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank does more than its fair share and one factor on top."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cost = {f"{i}.{side}": float(8 * 8 * 64 * (1 + i % 3)) for i in range(28) for side in "qv"}
    load = [0.0] * ranks
    for name, owner in assign_owners(cost).items():
        load[owner] += cost[name]
    assert max(load) <= sum(load) / ranks + max(cost.values())
    assert max(load) - min(load) <= max(cost.values())


# -- what a stage becomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 200])
@pytest.mark.parametrize(("energy", "scale"), [(0.9, 0.5), (1.0, 0.0), (0.5, 1.0)])
def test_stages_equal_refine_with_explicit_history(
    energy: float, scale: float, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one factor, of two small ones, or all of a shape at once."""
    if batch is not None:
        monkeypatch.setattr(consolidation_module, "BATCH_ELEMENTS", batch)
    consolidator = made(energy=energy, scale=scale)
    assert consolidator.owned == set(SHAPES) == {name for name in SHAPES if consolidator.holds(name)}
    assert not consolidator.holds("another")
    history: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    before = start()
    for stage in range(5):
        after = moved(before, changes(stage))
        values, update, _ = consolidator.consolidate(before, after)
        assert values.keys() == update.keys() == SHAPES.keys()
        for name, past in history.items():
            change = (after[name] - before[name]).double()
            expected = refine(change, past, energy=energy, scale=scale)
            error = (update[name].double() - expected).norm() / (change.norm() or 1)
            assert update[name].shape == values[name].shape == SHAPES[name]
            assert update[name].dtype == values[name].dtype == torch.float32
            assert error < 1e-5
            past.append(update[name].double())
        before = values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 2])
def test_the_adapter_is_its_start_and_what_memory_holds(dtype: torch.dtype, limit: int | None) -> None:
    before = start()
    copy = {name: value.clone() for name, value in before.items()}
    consolidator = made(memory_dtype=dtype, memory_rank=limit)
    for stage in range(4):
        after = moved(before, changes(stage))
        values, update, records = consolidator.consolidate(before, after)
        assert all(value.dtype == dtype for value in update.values())
        assert equal(values, {name: before[name] + update[name].float() for name in before})
        for record in records:
            assert record["refined_norm"] == pytest.approx(update[record["factor"]].double().norm().item(), rel=1e-6)
        before = values
    assert equal(start(), copy)


def test_what_memory_holds_in_bfloat16_is_all_that_a_fresh_factor_becomes() -> None:
    """From zero, the new value is the stored update bit for bit, and it is the float32 result rounded once."""
    values, update, _ = made(memory_dtype=torch.bfloat16).consolidate(zero(), changes(0))
    assert equal(values, {name: part.float() for name, part in update.items()})
    full = made().consolidate(zero(), changes(0)).update
    assert equal(update, {name: part.bfloat16() for name, part in full.items()})


@pytest.mark.parametrize("limit", [None, 2])
def test_changing_what_was_returned_leaves_the_history(limit: int | None) -> None:
    touched, straight = made(memory_rank=limit), made(memory_rank=limit)
    for stage in range(3):
        done = touched.consolidate(zero(), changes(stage))
        straight.consolidate(zero(), changes(stage))
        for value in (*done.values.values(), *done.update.values()):
            value.fill_(7.0)
    assert equal(touched.consolidate(zero(), changes(3)).update, straight.consolidate(zero(), changes(3)).update)


def test_a_first_consolidation_weighs_nothing_and_the_second_all_of_a_repeat() -> None:
    """θ = 1: with no history a change passes whole; again, it lies in the span, and λ = 0.25 leaves a quarter."""
    consolidator = made(energy=1.0, scale=0.25)
    change = changes(0)
    assert equal(consolidator.consolidate(zero(), change).update, change)
    for name, update in consolidator.consolidate(zero(), change).update.items():
        torch.testing.assert_close(update, change[name] / 4, rtol=1e-5, atol=1e-7)


def test_a_factor_and_a_transpose_are_treated_alike() -> None:
    shapes = {"a": torch.Size((3, 8)), "b": torch.Size((8, 3))}
    consolidator = made(shapes, energy=0.8, scale=0.3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        change = torch.randn(3, 8, generator=generator)
        update = consolidator.consolidate(zero(shapes), {"a": change, "b": change.T.contiguous()}).update
        torch.testing.assert_close(update["b"].T, update["a"], rtol=1e-6, atol=1e-7)


def test_records_by_hand() -> None:
    """θ = 0.9, λ = 0.5. First diag(3, 1): rank 1 holds 0.9, and diag(3, 0) joins the history.

    Then diag(4, 3): 0.64 and 1 of 25, so rank 2 is needed; 16/25 = 0.64 lies in the span, diag(2, 3) has norm √13. Then
    nothing: rank 0, norms 0, and all of no energy is kept.
    """
    shapes = {"b": torch.Size((2, 2)), "a": torch.Size((2, 2))}
    consolidator = made(shapes, energy=0.9, scale=0.5)
    expected = [(1, 0.9, 0.0, math.sqrt(10), 3.0), (2, 1.0, 0.64, 5.0, math.sqrt(13)), (0, 1.0, 0.0, 0.0, 0.0)]
    keys = ("kept_rank", "kept_energy", "history_share", "update_norm", "refined_norm")
    for diagonal, values in zip(((3.0, 1.0), (4.0, 3.0), (0.0, 0.0)), expected, strict=True):
        change = torch.diag(torch.tensor(diagonal))
        records = consolidator.consolidate(zero(shapes), {"a": change, "b": change.flip(0)}).records
        assert [record["factor"] for record in records] == ["a", "b"]
        for record in records:
            assert set(record) == {"factor", "merged_energy", "singular_values", *keys}
            assert tuple(record[key] for key in keys) == pytest.approx(values, abs=1e-6)
            assert record["singular_values"] == pytest.approx([value for value in diagonal if value > 0], abs=1e-6)
            assert record["merged_energy"] == 0
        json.dumps(records, allow_nan=False)


def test_a_record_of_what_a_full_memory_merged_by_hand() -> None:
    """A memory of one direction, λ = 1, θ = 1: (2, 0) fills it, (0, 1) has the less energy and leaves, which is 1."""
    shapes = {"a": torch.Size((1, 2))}
    consolidator = made(shapes, energy=1.0, scale=1.0, memory_rank=1)
    for change, merged, share in (([2.0, 0.0], 0, 0), ([0.0, 1.0], 1, 0), ([3.0, 4.0], None, 0.36)):
        (record,) = consolidator.consolidate(zero(shapes), {"a": torch.tensor([change])}).records
        if merged is not None:
            assert record["merged_energy"] == pytest.approx(merged, abs=1e-6)
        assert record["history_share"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_passed_on_is_the_change_and_makes_no_history(dtype: torch.dtype) -> None:
    consolidator, fresh = made(memory_dtype=dtype), made(memory_dtype=dtype)
    before, after = start(), moved(start(), changes(0))
    values, update, records = consolidator.pass_on(before, after)
    assert equal(update, {name: after[name] - before[name] for name in before})
    assert equal(values, {name: before[name] + update[name] for name in before})
    assert [record["factor"] for record in records] == sorted(SHAPES)
    for record in records:
        expected = update[record["factor"]].double().norm().item()
        assert record["update_norm"] == record["refined_norm"] == pytest.approx(expected, rel=1e-6)
    later, alone = (c.consolidate(zero(), changes(1)) for c in (consolidator, fresh))
    assert equal(later.update, alone.update)
    assert later.records == alone.records


@pytest.mark.parametrize("limit", [None, 2])
def test_the_same_stages_give_the_same_bits(limit: int | None) -> None:
    for first, second in zip(run(made(memory_rank=limit), 4), run(made(memory_rank=limit), 4), strict=True):
        assert equal(first.values, second.values)
        assert first.records == second.records


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [Consolidator.consolidate, Consolidator.pass_on])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_factor_that_is_not_finite_is_named_on_every_rank(
    ranks: int, value: float, call: Callable[..., Consolidated], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = changes(0)
    after["layers.2.v.lora_B"][3, 1] = value

    def work() -> Consolidated:
        consolidator = made()
        return call(consolidator, owned(consolidator, zero()), owned(consolidator, after))

    told = played(monkeypatch, ranks, work)
    assert len(told) == ranks
    assert {type(one) for one in told} == {ConsolidationFailed}
    assert {str(one) for one in told} == {"consolidation: the update of layers.2.v.lora_B is not finite"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_decomposition_that_fails_is_named_on_every_rank(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver gives up on one matrix, known by its size; the others of its batch are found without fault."""
    solve = torch.linalg.eigh

    def fails(matrix: torch.Tensor) -> Any:
        if (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) > 1e6).any():
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    after = changes(0)
    after["layers.1.q.lora_A"] *= 1e4

    def work() -> Consolidated:
        consolidator = made()
        return consolidator.consolidate(owned(consolidator, zero()), owned(consolidator, after))

    told = played(monkeypatch, ranks, work)
    assert {type(one) for one in told} == {ConsolidationFailed}
    (text,) = {str(one) for one in told}
    assert [name for name in SHAPES if name in text] == ["layers.1.q.lora_A"]
    assert "did not converge" in text
    assert "\n" not in text


def test_a_full_memory_that_cannot_be_merged_names_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last decomposition of a stage is of the history's energies, (batch, limit + 1, limit + 1)."""
    shapes = {"a": torch.Size((4, 24)), "b": torch.Size((4, 24))}
    consolidator = made(shapes, memory_rank=1)
    change = {name: changes(0)[f"layers.{i}.q.lora_A"] for i, name in enumerate(shapes)}
    consolidator.consolidate(zero(shapes), change)
    solve = torch.linalg.eigh

    def fails(matrix: torch.Tensor) -> Any:
        if matrix.shape[-1] == 2 and (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) > 1e6).any():
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    change = {name: changes(1)[f"layers.{i + 1}.q.lora_A"] for i, name in enumerate(shapes)}
    with pytest.raises(ConsolidationFailed, match=r"did not converge") as failure:
        consolidator.consolidate(zero(shapes), {"a": change["a"], "b": 1e4 * change["b"]})
    assert "the linear algebra of b failed" in str(failure.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_that_is_not_finite_is_an_error(value: float) -> None:
    """Passed over in silence, the history would be shorter than the ledger says."""
    bad = changes(0)
    bad["layers.2.v.lora_B"][3, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        made().remember(bad)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("ranks", [2, 4, 20])
def test_ranks_share_the_factors_and_agree_with_one(monkeypatch: pytest.MonkeyPatch, ranks: int, limit: int | None) -> None:
    """Every rank is played in turn; nothing is exchanged before the end, so only the gathering of records is cut."""
    expected = run(made(memory_rank=limit), 4)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    seen: list[str] = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shared = made(memory_rank=limit)
        seen += shared.owned
        assert all(shared.holds(name) == (name in shared.owned) for name in SHAPES)
        for part, whole in zip(run(shared, 4), expected, strict=True):
            assert part.values.keys() == part.update.keys() == shared.owned
            for name in part.values:
                assert relative(part.values[name], whole.values[name]) < 1e-6
                assert relative(part.update[name], whole.update[name]) < 1e-5
            own = [record for record in whole.records if record["factor"] in part.values]
            assert [record["factor"] for record in part.records] == [record["factor"] for record in own]
            for left, right in zip(part.records, own, strict=True):
                for key in set(left) - {"factor"}:
                    assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-6)
    assert sorted(seen) == sorted(SHAPES)


def test_records_of_sketches_do_not_depend_on_what_they_are_batched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat spectrum needs a larger sketch than a steep one; each record lists what was found of its own factor."""
    shapes = {"flat": torch.Size((40, 50)), "steep": torch.Size((40, 50))}
    generator = torch.Generator().manual_seed(3)
    change = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    change["steep"] *= 0.3 ** torch.arange(50)
    together = made(shapes, svd=SVDMethod.randomized).consolidate(zero(shapes), change).records
    monkeypatch.setattr(consolidation_module, "BATCH_ELEMENTS", 1)
    alone = made(shapes, svd=SVDMethod.randomized).consolidate(zero(shapes), change).records
    for left, right in zip(together, alone, strict=True):
        assert left["kept_rank"] == right["kept_rank"]
        assert left["singular_values"] == pytest.approx(right["singular_values"], rel=1e-6, abs=1e-9)


def test_every_rank_hears_of_all_records(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made().consolidate(start(), moved(start(), changes(0))).records

    def work() -> Consolidated:
        consolidator = made()
        before = owned(consolidator, start())
        return consolidator.consolidate(before, moved(before, owned(consolidator, changes(0))))

    for done in played(monkeypatch, 2, work):
        assert [record["factor"] for record in done.records] == [record["factor"] for record in expected]
        for left, right in zip(done.records, expected, strict=True):
            assert left["kept_rank"] == right["kept_rank"]
            assert left["refined_norm"] == pytest.approx(right["refined_norm"], rel=1e-6)


def test_the_space_decides_the_consolidator() -> None:
    assert type(made()) is FactorConsolidator
