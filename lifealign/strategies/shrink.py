"""The control of LifeAlign: updates shortened as much as SLMC would, and not turned."""

from __future__ import annotations

from dataclasses import replace

from lifealign.errors import UserError
from lifealign.memory import ConsolidationOptions, Space
from lifealign.registry import register
from lifealign.strategies.lifealign import LifeAlign


@register("strategy", "shrink")
class Shrink(LifeAlign):
    """Replay as in LifeAlign, and W = W_0 + c (W_1 - W_0) with c = ||refined update|| / ||update||, for each factor.

    SLMC says only how long an update may be; its own direction is kept, and joins the history. What LifeAlign gains over
    this control is due to the directions that SLMC takes out; the rest could be had by a smaller step. All options are
    LifeAlign's.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space is not Space.factors:
            raise UserError(f"strategy.space={self.space.value}: strategy=shrink works on factors; use space=factors")

    def consolidation(self) -> ConsolidationOptions:
        return replace(super().consolidation(), length_only=True)
