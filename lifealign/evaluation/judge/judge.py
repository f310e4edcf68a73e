"""The judge of a run, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lifealign.errors import UserError
from lifealign.evaluation.judge.answers import Item, JudgeResult, check_judge, judge_answers
from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.runtime import distributed

log = logging.getLogger(__name__)


@dataclass
class Judge:
    """Grades answers to the prompts of tasks. Rank 0 asks, and every rank gets what it was told.

    Args:
        folder: where verdicts are kept.
        tasks: names, each with the task whose rows it reads, if that is another one.

    Raises:
        UserError: where no judge is named, its key is not in the environment, or a task has no criterion.
    """

    options: JudgeOptions
    folder: Path
    tasks: Mapping[str, str | None]
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = Budget(self.options.max_requests)
        with distributed.failing_together(UserError):  # the key may be in the environment of one machine alone
            if distributed.is_main():
                check_judge(self.options, list(self.tasks.items()))

    def grade(self, task: str, items: Sequence[Item]) -> JudgeResult:
        """Grades of answers to a task's prompts. Call on every rank.

        Raises:
            UserError: on every rank, where the budget is spent, the endpoint cannot be used, or nothing could be graded.
        """
        result: JudgeResult | None = None
        with distributed.failing_together(UserError):
            if distributed.is_main():
                of, where = self.tasks[task], self.folder
                result = judge_answers(self.options, items, task=task, of=of, folder=where, budget=self.budget)
                reasons = ", ".join(f"{reason}: {count}" for reason, count in result.failures.items())
                if result.score is None:
                    raise UserError(f"evaluation.judge: no answer of task '{task}' could be graded ({reasons})")
                if result.failed:
                    log.warning("judge: %d of %d answers of %s have no grade (%s)", result.failed, len(items), task, reasons)
        result = distributed.broadcast_object(result)
        assert result is not None
        return result
