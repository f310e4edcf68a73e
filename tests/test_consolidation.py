"""Consolidation of a whole adapter, and the ledger on disk, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lifealign.memory import Consolidator, MemoryBank, refine
from lifealign.memory.bank import read_ledger
from lifealign.memory.consolidation import assign_owners
from lifealign.runtime import distributed

SHAPES = {
    f"layers.{layer}.{name}": torch.Size(shape)
    for layer in range(3)
    for name, shape in {"q.lora_A": (4, 24), "q.lora_B": (24, 4), "v.lora_A": (4, 24), "v.lora_B": (10, 4)}.items()
}
Factors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def updates(stage: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Random updates with decaying spectra; one factor does not move in stage 1 and repeats stage 0 in stage 2."""
    generator = torch.Generator().manual_seed(stage)
    decay = torch.logspace(0, -1, 4, dtype=torch.float64)
    result = {}
    for name, shape in SHAPES.items():
        update = torch.randn(shape, dtype=torch.float64, generator=generator)
        result[name] = (update * (decay[:, None] if shape[0] == 4 else decay)).to(dtype)
    if stage == 1:
        result["layers.0.q.lora_A"].zero_()
    if stage == 2:
        result["layers.0.q.lora_A"] = updates(0, dtype)["layers.0.q.lora_A"]
    return result


def equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected)


def test_owners_by_hand() -> None:
    """Costs, numel × short side: a 32·4 = 128, b and c 24·4 = 96, d 40·2 = 80 though it has the most numbers.

    Two ranks: a → 0 (128), b → 1 (96), c → 1 (192, since 96 < 128), d → 0 (208).
    """
    shapes = {"d": torch.Size((2, 20)), "c": torch.Size((4, 6)), "a": torch.Size((8, 4)), "b": torch.Size((6, 4))}
    expected = {"a": 0, "b": 1, "c": 1, "d": 0}
    assert assign_owners(shapes, 2) == expected
    assert assign_owners(dict(reversed(shapes.items())), 2) == expected
    for names in ("xyz", "zyx", "yxz"):  # equal costs go by name, whatever the order that they come in
        assert assign_owners(dict.fromkeys(names, torch.Size((3, 5))), 2) == {"x": 0, "y": 1, "z": 0}
    assert set(assign_owners(shapes, 1).values()) == {0}
    assert sorted(assign_owners(shapes, 7).values()) == [0, 1, 2, 3]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_owners_are_balanced(ranks: int) -> None:
    """No rank does more than its fair share and one factor on top."""
    shapes = {f"{i}.{side}": torch.Size((8, 64 * (1 + i % 3))) for i in range(28) for side in "qv"}
    cost = {name: shape[0] ** 2 * shape[1] for name, shape in shapes.items()}
    load = [0] * ranks
    for name, owner in assign_owners(shapes, ranks).items():
        load[owner] += cost[name]
    assert max(load) <= sum(load) / ranks + max(cost.values())
    assert max(load) - min(load) <= max(cost.values())


@pytest.mark.parametrize(("energy", "scale"), [(0.9, 0.5), (1.0, 0.0), (0.5, 1.0)])
def test_stages_equal_refine_with_explicit_history(energy: float, scale: float) -> None:
    consolidator = Consolidator(SHAPES, energy=energy, scale=scale)
    assert consolidator.owned == set(SHAPES)
    history: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    for stage in range(5):
        update = updates(stage, torch.float64)
        refined, _ = consolidator.consolidate(update)
        assert refined.keys() == SHAPES.keys()
        for name, past in history.items():
            expected = refine(update[name], past, energy=energy, scale=scale)
            torch.testing.assert_close(refined[name], expected, rtol=0, atol=1e-10)
            past.append(refined[name])


def test_a_first_consolidation_weighs_nothing_and_the_second_all_of_a_repeat() -> None:
    """θ = 1: with no history an update passes whole; again, it lies in the span, and λ = 0.25 leaves a quarter."""
    consolidator = Consolidator(SHAPES, energy=1.0, scale=0.25)
    update = updates(0)
    assert equal(consolidator.consolidate(update)[0], update)
    for name, refined in consolidator.consolidate(update)[0].items():
        torch.testing.assert_close(refined, update[name] / 4, rtol=1e-6, atol=1e-7)


def test_records_by_hand() -> None:
    """θ = 0.9, λ = 0.5. First diag(3, 1): rank 1 holds 0.9, and diag(3, 0) joins the history.

    Then diag(4, 3): 0.64 and 1 of 25, so rank 2 is needed; 16/25 = 0.64 lies in the span, diag(2, 3) has norm √13. Then
    nothing: rank 0, norms 0, and all of no energy is kept.
    """
    consolidator = Consolidator({"b": torch.Size((2, 2)), "a": torch.Size((2, 2))}, energy=0.9, scale=0.5)
    expected = [(1, 0.9, 0.0, math.sqrt(10), 3.0), (2, 1.0, 0.64, 5.0, math.sqrt(13)), (0, 1.0, 0.0, 0.0, 0.0)]
    keys = ("kept_rank", "kept_energy", "history_share", "update_norm", "refined_norm")
    for diagonal, values in zip(((3.0, 1.0), (4.0, 3.0), (0.0, 0.0)), expected, strict=True):
        update = torch.diag(torch.tensor(diagonal))
        _, records = consolidator.consolidate({"a": update, "b": update.flip(0)})
        assert [record["factor"] for record in records] == ["a", "b"]
        for record in records:
            assert set(record) == {"factor", *keys}
            assert tuple(record[key] for key in keys) == pytest.approx(values, abs=1e-6)
        json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_named_and_leaves_no_trace(value: float) -> None:
    consolidator, fresh = (Consolidator(SHAPES, energy=0.9, scale=0.5) for _ in range(2))
    bad = updates(0)
    bad["layers.2.v.lora_B"][3, 1] = value
    with pytest.raises(ValueError, match=r"layers\.2\.v\.lora_B"):
        consolidator.consolidate(bad)
    assert equal(consolidator.consolidate(updates(1))[0], fresh.consolidate(updates(1))[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_that_is_not_finite_is_an_error(value: float) -> None:
    """Passed over in silence, the history would be shorter than the ledger says."""
    bad = updates(0)
    bad["layers.2.v.lora_B"][3, 1] = value
    with pytest.raises(ValueError):
        Consolidator(SHAPES, energy=0.9, scale=0.5).remember(bad)


@pytest.mark.parametrize("ranks", [2, 5, 20])
def test_ranks_share_the_factors_and_agree_with_one(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Every rank is played in turn; nothing is exchanged before the end, so only the gathering of records is cut."""
    alone = Consolidator(SHAPES, energy=0.9, scale=0.5)
    expected = [alone.consolidate(updates(stage)) for stage in range(3)]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    seen: list[str] = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shared = Consolidator(SHAPES, energy=0.9, scale=0.5)
        seen += shared.owned
        for stage, (refined, records) in enumerate(expected):
            update = updates(stage)
            part, part_records = shared.consolidate({name: update[name] for name in shared.owned})
            assert part.keys() == shared.owned
            for name in part:
                torch.testing.assert_close(part[name], refined[name], rtol=1e-6, atol=1e-7)
            assert part_records == [pytest.approx(record) for record in records if record["factor"] in part]
    assert sorted(seen) == sorted(SHAPES)


def fill(bank: MemoryBank, consolidator: Consolidator, stages: int) -> list[Factors]:
    """The refined updates of some stages, as a run would make and store them."""
    made = []
    for stage in range(stages):
        refined, records = consolidator.consolidate(updates(stage))
        bank.append(f"task{stage // 2}", ("sft", "preference")[stage % 2], refined, records)
        made.append(refined)
    return made


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_reload_continues_bit_for_bit(tmp_path: Path, count: int) -> None:
    """Stopped after four stages, taken up again at ``count``: what follows is as in a run that never stopped."""
    made = fill(MemoryBank(tmp_path), Consolidator(SHAPES, energy=0.9, scale=0.5), 4)
    straight, resumed = (Consolidator(SHAPES, energy=0.9, scale=0.5) for _ in range(2))
    for stage in range(count):
        straight.consolidate(updates(stage))
    bank = MemoryBank(tmp_path)
    loaded = list(bank.load(count, resumed.owned))
    assert len(loaded) == count
    for entry, original in zip(loaded, made, strict=False):
        assert equal(entry, original)
        resumed.remember(entry)
    for stage in range(count, count + 3):
        expected, records = straight.consolidate(updates(stage))
        actual, actual_records = resumed.consolidate(updates(stage))
        assert equal(actual, expected)
        assert actual_records == records


def test_the_ledger_tells_what_happened(tmp_path: Path) -> None:
    bank = MemoryBank(tmp_path)
    assert read_ledger(tmp_path) == []
    consolidator = Consolidator(SHAPES, energy=0.9, scale=0.5)
    refined, records = consolidator.consolidate(updates(0))
    bank.append("hc3", "sft", refined, records)
    (entry,) = read_ledger(tmp_path)
    assert (entry["task"], entry["stage"], entry["factors"]) == ("hc3", "sft", records)
    assert (tmp_path / entry["name"] / "shard-0.safetensors").exists()
    assert bank.entries == [entry]


def test_a_reload_reads_only_the_factors_asked_for(tmp_path: Path) -> None:
    (made,) = fill(MemoryBank(tmp_path), Consolidator(SHAPES, energy=0.9, scale=0.5), 1)
    wanted = ["layers.1.q.lora_A", "layers.2.v.lora_B"]
    (entry,) = MemoryBank(tmp_path).load(1, wanted)
    assert equal(entry, {name: made[name] for name in wanted})


def test_truncation_forgets_later_entries_for_good(tmp_path: Path) -> None:
    """Three entries, taken up at one; what is then appended becomes the second, also for the next reader."""
    first, *_ = fill(MemoryBank(tmp_path), Consolidator(SHAPES, energy=0.9, scale=0.5), 3)
    bank = MemoryBank(tmp_path)
    assert len(list(bank.load(1, SHAPES))) == len(bank.entries) == len(read_ledger(tmp_path)) == 1
    replacement = updates(7)
    bank.append("task0", "preference", replacement, [])
    entries = read_ledger(tmp_path)
    assert [(e["task"], e["stage"]) for e in entries] == [("task0", "sft"), ("task0", "preference")]
    loaded = list(MemoryBank(tmp_path).load(2, SHAPES))
    assert equal(loaded[0], first)
    assert equal(loaded[1], replacement)


def test_shards_of_other_ranks_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by two ranks, read by one: the number of ranks may change between runs."""
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    made, names = updates(0), sorted(SHAPES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        MemoryBank(tmp_path).append("hc3", "sft", {name: made[name] for name in names[rank::2]}, [])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    (entry,) = MemoryBank(tmp_path).load(1, SHAPES)
    assert equal(entry, made)


def test_a_ledger_shorter_than_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    fill(MemoryBank(tmp_path), Consolidator(SHAPES, energy=0.9, scale=0.5), 1)
    with pytest.raises(Exception, match="1 entries"):
        list(MemoryBank(tmp_path).load(2, SHAPES))
