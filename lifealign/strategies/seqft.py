"""Sequential fine-tuning: one task after another, with nothing done about forgetting. The lower baseline."""

from __future__ import annotations

from lifealign.registry import register
from lifealign.strategies.base import Strategy


@register("strategy", "seqft")
class SeqFT(Strategy):
    """Train on each task in turn."""
