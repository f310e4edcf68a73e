"""The judge of a run, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from lifealign.errors import Interrupted, UserError
from lifealign.evaluation.judge.answers import Item, JudgeResult, check_judge, judge_answers
from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.runtime import distributed
from lifealign.runtime.signals import StopSignals

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
            UserError: on every rank, where the budget is spent, or the endpoint cannot be used.
            Interrupted: on every rank, where one of them received SIGTERM or SIGINT meanwhile; verdicts so far are kept.
        """
        result: JudgeResult | None = None
        with StopSignals() as signals:  # on all ranks: a launcher tells all, and none may be missing when rank 0 has ended
            with distributed.failing_together(UserError, Interrupted), distributed.waiting_for_main():
                if distributed.is_main():
                    result = self._grade_here(task, items)
            result, received = distributed.broadcast_object(result), signals.anywhere()
        if received is not None:
            raise Interrupted(
                f"judge: stopped by {Signals(received).name}; verdicts are kept, and the same command goes on", received
            )
        assert result is not None
        return result

    def _grade_here(self, task: str, items: Sequence[Item]) -> JudgeResult:
        of, where = self.tasks[task], self.folder
        result = judge_answers(self.options, items, task=task, of=of, folder=where, budget=self.budget)
        reasons = ", ".join(f"{reason}: {count}" for reason, count in result.failures.items())
        if result.failed:
            log.warning("judge: %d of %d answers of %s have no grade (%s)", result.failed, len(items), task, reasons)
        return result
