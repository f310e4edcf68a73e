"""LifeAlign's strategy: replay, and Short-to-Long Memory Consolidation after each stage (arXiv 2509.17183).

The other half of the method, the focal objective, is ``objective=fpo``; the two compose freely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import Enum
from typing import Any

import torch

from lifealign.errors import UserError
from lifealign.memory import ConsolidationOptions, MemoryBank, Space, SVDMethod, make_consolidator
from lifealign.memory.bank import read_update
from lifealign.models.adapter import factor_shapes, read_factors, write_factors
from lifealign.registry import register
from lifealign.runtime import distributed
from lifealign.strategies.base import Context, Run, State
from lifealign.strategies.er import ExperienceReplay


class MemoryDtype(Enum):
    """What memory is kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@register("strategy", "lifealign")
class LifeAlign(ExperienceReplay):
    """Each stage's update of the adapter is denoised and weighed against the past before it becomes long-term memory."""

    denoise_energy: float = 0.9  # theta: share of an update's squared norm that truncation keeps, in [0, 1]
    projection_scale: float = 0.5  # lambda: factor on what lies in the span of history, in [0, 1]; 1 switches refinement off
    consolidate_stages: list[str] = field(default_factory=lambda: ["sft", "preference"])
    space: Space = Space.factors  # what is consolidated: A and B each by itself (the paper), or their product
    svd: SVDMethod = SVDMethod.auto  # how singular directions are found
    memory_rank: int | None = None  # most directions of the past a factor keeps; null: no bound
    memory_dtype: MemoryDtype = MemoryDtype.float32  # of the past, in memory and on disk

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("denoise_energy", "projection_scale"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must lie in [0, 1]")
        unknown = set(self.consolidate_stages) - {"sft", "preference"}
        if unknown:
            raise UserError(f"strategy.consolidate_stages: '{min(unknown)}' is no stage; known: sft, preference")
        if self.memory_rank is not None and self.memory_rank < 1:
            raise UserError(f"strategy.memory_rank={self.memory_rank}: must be at least 1; null sets no bound")
        of_factors = {"svd": SVDMethod.auto, "memory_rank": None, "memory_dtype": MemoryDtype.float32}
        for key, default in of_factors.items():
            if self.space is Space.product and getattr(self, key) is not default:
                raise UserError(f"strategy.{key} is an option of strategy.space=factors; leave it out with space=product")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.consolidator = make_consolidator(self.space, factor_shapes(run.policy.model), self.consolidation())
        self.bank = MemoryBank(run.folder / "memory")

    def consolidation(self) -> ConsolidationOptions:
        """How updates become memory."""
        return ConsolidationOptions(
            energy=self.denoise_energy,
            scale=self.projection_scale,
            svd=self.svd,
            memory_rank=self.memory_rank,
            memory_dtype=getattr(torch, self.memory_dtype.value),
        )

    def begin_stage(self, context: Context) -> None:
        self.stage_start = read_factors(context.run.policy.model, self.consolidator.owned)

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        """docs/method.md: W = W_0 + RSM, and RSM joins the history.

        A stage that is not consolidated enters the ledger as it is, so that the adapter stays the sum of its entries.
        """
        model, before = context.run.policy.model, self.stage_start
        after = read_factors(model, self.consolidator.owned)
        is_consolidated = context.stage in self.consolidate_stages
        take = self.consolidator.consolidate if is_consolidated else self.consolidator.pass_on
        values, update, records = take(before, after)
        if is_consolidated:
            write_factors(model, values, self.consolidator.owners)
        about = {
            "task": context.task.name,
            "task_number": context.task_number,
            "stage": context.stage,
            "space": self.space.value,
            "consolidated": is_consolidated,
        }
        hashes = {"data": context.task.data_hash, "configuration": context.run.settings_hash}
        self.bank.append(about, update, records, hashes)
        return records

    def state_dict(self) -> State:
        return State({**super().state_dict().values, "memory": list(self.bank.entries)}, files=dict(self.bank.files))

    def load_state_dict(self, state: State) -> None:
        """History is made anew from the ledger, each rank's share of it, however many ranks wrote it."""
        super().load_state_dict(state)
        entries = self.bank.load(state.values["memory"], state.files)
        other = next((entry["space"] for entry in entries if entry["space"] != self.space.value), None)
        if other is not None:
            raise UserError(f"strategy.space={self.space.value}: the run's memory is of space={other}; go on with that one")
        with distributed.failing_together(ValueError):  # a shard may be damaged that one rank alone reads
            for entry in entries:
                if entry["consolidated"]:
                    self.consolidator.remember(read_update(self.bank.folder, entry, self.consolidator.holds))
