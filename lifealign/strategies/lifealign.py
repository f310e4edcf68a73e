"""LifeAlign's strategy: replay, and Short-to-Long Memory Consolidation after each stage (arXiv 2509.17183).

The other half of the method, the focal objective, is ``objective=fpo``; the two compose freely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from lifealign.errors import UserError
from lifealign.memory import Consolidator, MemoryBank
from lifealign.models.adapter import factor_shapes, read_factors, write_factors
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, State
from lifealign.strategies.er import ExperienceReplay


@register("strategy", "lifealign")
class LifeAlign(ExperienceReplay):
    """Each stage's update of the adapter is denoised and weighed against the past before it becomes long-term memory."""

    denoise_energy: float = 0.9  # theta: share of an update's squared norm that truncation keeps, in [0, 1]
    projection_scale: float = 0.5  # lambda: factor on what lies in the span of history, in [0, 1]; 1 switches refinement off
    consolidate_stages: list[str] = field(default_factory=lambda: ["sft", "preference"])

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("denoise_energy", "projection_scale"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must lie in [0, 1]")
        unknown = set(self.consolidate_stages) - {"sft", "preference"}
        if unknown:
            raise UserError(f"strategy.consolidate_stages: '{min(unknown)}' is no stage; known: sft, preference")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.consolidator = Consolidator(
            factor_shapes(run.policy.model), energy=self.denoise_energy, scale=self.projection_scale
        )
        self.bank = MemoryBank(run.folder / "memory")

    def begin_stage(self, context: Context) -> None:
        if context.stage in self.consolidate_stages:
            self.stage_start = read_factors(context.run.policy.model, self.consolidator.owned)

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        """docs/method.md: W = W_0 + RSM, and RSM joins the history."""
        if context.stage not in self.consolidate_stages:
            return ()
        model, before = context.run.policy.model, self.stage_start
        after = read_factors(model, self.consolidator.owned)
        refined, records = self.consolidator.consolidate({name: after[name] - before[name] for name in after})
        write_factors(model, {name: before[name] + refined[name] for name in refined}, self.consolidator.owners)
        self.bank.append(context.task.name, context.stage, refined, records)
        return records

    def state_dict(self) -> State:
        return State({**super().state_dict().values, "memory_entries": len(self.bank.entries)})

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        for refined in self.bank.load(state.values["memory_entries"], self.consolidator.owned):
            self.consolidator.remember(refined)
