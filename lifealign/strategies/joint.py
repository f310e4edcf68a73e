"""What a sequence is measured against: one model a task (STL), and one model of all tasks at once (MTL)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from lifealign.data.tasks import Task
from lifealign.models.adapter import read_factors, write_factors
from lifealign.registry import register
from lifealign.strategies.base import Context, Experience, Run, Strategy


@register("strategy", "stl")
class SingleTask(Strategy):
    """Single-task learning: every task starts from the fresh adapter, and is scored by its own model alone.

    The models stand side by side, so a task keeps its own model's score in all rows of the matrix from its own on. Nothing is
    forgotten and nothing carried over: BWT is 0 by construction.
    """

    def setup(self, run: Run) -> None:
        self.fresh = read_factors(run.policy.model)

    def plan(self, tasks: Sequence[Task]) -> Sequence[Experience]:
        return [Experience(task, (number,), range(number, len(tasks))) for number, task in enumerate(tasks)]

    def begin_task(self, context: Context) -> None:
        write_factors(context.run.policy.model, self.fresh, dict.fromkeys(self.fresh, 0))


@register("strategy", "mtl")
class MultiTask(Strategy):
    """Multi-task learning: one training on the pairs of all tasks together, the upper bound of a sequence.

    Only the last row of the score matrix exists, so there is a ``Last``, and neither BWT nor AP.
    """

    def plan(self, tasks: Sequence[Task]) -> Sequence[Experience]:
        return [Experience(joint_task(tasks), range(len(tasks)), (len(tasks) - 1,))]


def joint_task(tasks: Sequence[Task]) -> Task:
    """All tasks as one."""
    dropped: Counter[str] = Counter()
    for task in tasks:
        dropped.update(task.dropped)
    return Task(
        name="joint",
        domain="all domains",
        train=[pair for task in tasks for pair in task.train],
        test=[pair for task in tasks for pair in task.test],
        dropped=dict(dropped),
        data_hash=hashlib.sha256("".join(task.data_hash for task in tasks).encode()).hexdigest(),
    )
