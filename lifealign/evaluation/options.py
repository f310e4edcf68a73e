"""What a user may say about evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from lifealign.errors import UserError, did_you_mean
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.preference import PREFERENCE_METRICS
from lifealign.evaluation.text import TEXT_METRICS


@dataclass
class EvaluationOptions:
    """``evaluation.*``."""

    metrics: list[str] = field(default_factory=lambda: [*PREFERENCE_METRICS, *TEXT_METRICS])
    forward: bool = False  # score tasks that are still to come, too
    batch_size: int = 32  # pairs, or prompts, a rank holds at once
    max_new_tokens: int = 64
    max_generations: int | None = None  # held-out prompts a task that are answered; None: all
    probe_every: int | None = None  # optimiser steps between two looks at old tasks while a new one is learned; None: never
    probe_pairs: int = 64  # held-out pairs a task that such a look takes
    judge: JudgeOptions = field(default_factory=JudgeOptions)  # asked where metrics name it

    def __post_init__(self) -> None:
        known = [*PREFERENCE_METRICS, *TEXT_METRICS, "judge"]
        for name in self.metrics:
            if name not in known:
                raise UserError(f"evaluation.metrics: unknown metric '{name}'{did_you_mean(name, known)}")
        for key in ("batch_size", "max_new_tokens", "max_generations", "probe_every", "probe_pairs"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"evaluation.{key}={value}: must be at least 1")

    @property
    def generates(self) -> bool:
        return any(name in TEXT_METRICS or name == "judge" for name in self.metrics)
