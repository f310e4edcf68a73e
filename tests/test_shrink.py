"""The shrink control: SLMC's lengths, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import compose_config, train_here

from lifealign.config import build
from lifealign.errors import UserError
from lifealign.memory import ConsolidationOptions, FactorConsolidator, refine
from lifealign.memory.bank import read_ledger, read_update

SHAPES = {"a": torch.Size((4, 20)), "b": torch.Size((20, 4)), "c": torch.Size((4, 20))}


def rounds(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def test_directions_stay_and_lengths_are_those_of_refinement() -> None:
    """Three updates in turn. What the history holds are the shortened updates, so ``refine`` is asked with these."""
    energy, scale = 0.7, 0.3
    consolidator = FactorConsolidator(SHAPES, ConsolidationOptions(energy=energy, scale=scale, length_only=True))
    past: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    for updates in rounds(3):
        zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        values, kept, records = consolidator.consolidate(zero, updates)
        for name, update in updates.items():
            refined = refine(update, past[name], energy=energy, scale=scale)
            ratio = float(refined.norm() / update.norm())
            assert 0 < ratio < 0.99
            torch.testing.assert_close(values[name], ratio * update, rtol=1e-4, atol=1e-6)
            record = next(r for r in records if r["factor"] == name)
            assert record["refined_norm"] / record["update_norm"] == pytest.approx(ratio, rel=1e-4)
            past[name].append(kept[name])


def test_an_update_of_zero_stays_zero() -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    values, *_ = FactorConsolidator(SHAPES, ConsolidationOptions(length_only=True)).consolidate(zero, zero)
    assert all(not value.any() for value in values.values())


def test_the_adapter_is_its_start_and_what_the_ledger_holds(tmp_path: Path) -> None:
    run = train_here(
        tmp_path / "run",
        "strategy=shrink",
        "sft.epochs=1",
        "preference.epochs=1",
        "data.max_train=8",
        "evaluation.metrics=[preference_accuracy]",
    )
    entries = read_ledger(run / "memory")
    assert len(entries) == 4
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, value in final.items():
        if "lora_B" in name:  # starts at zero
            factor = name.replace(".weight", ".default.weight")
            total = sum(read_update(run / "memory", entry, factor.__eq__)[factor] for entry in entries)
            torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-7)


def test_products_are_refused() -> None:
    with pytest.raises(UserError, match=r"strategy\.space=product.*space=factors"):
        build(compose_config("+sequence=six_domains", "strategy=shrink", "strategy.space=product"))
