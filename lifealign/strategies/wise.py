"""Weight averaging over tasks.

WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903) carried on from task to task, and the sum or mean of task vectors (Ilharco
et al., 2023, arXiv 2212.04089).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

import torch

from lifealign.errors import UserError
from lifealign.models.adapter import read_factors, write_factors
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, State, Strategy

Factors = Mapping[str, torch.Tensor]


class Average(Enum):
    """What is averaged."""

    ema = "ema"
    task_vectors = "task_vectors"


class Merge(Enum):
    """How task vectors become one."""

    sum = "sum"
    mean = "mean"


@register("strategy", "wise")
class WeightAveraging(Strategy):
    """What a task leaves is an average of weights; inside a task nothing changes.

    ``average=ema``: a task starts from W_start, what the one before left, ends at W_end, and leaves::

        W = W_start + share * (W_end - W_start)

    which is WiSE-FT's interpolation (its eq. 1) between the model before a fine-tuning and the one after it, and over tasks
    an exponential moving average. ``share=1`` is ``seqft``.

    ``average=task_vectors``: every task starts from the initial adapter W_0; its task vector is tau = W_end - W_0, and after
    task t the model is::

        W = W_0 + scale * (tau_1 + ... + tau_t)            merge=sum; merge=mean divides the sum by t

    The first task counts like the others. All of this is done to the factors A and B each by itself. The weight that the
    model computes with is the base plus B A, which is not linear in them: the product of two averages is not the average of
    the products, so this is an average of adapters and not of whole weights. In return it is as cheap as a copy, and keeps
    the rank.
    """

    average: Average = Average.ema
    share: float = 0.5  # of a task's update that stays, in [0, 1]; average=ema
    merge: Merge = Merge.sum  # of task vectors; average=task_vectors
    scale: float = 0.4  # factor on that sum or mean, 0 or more; average=task_vectors

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"strategy.share={self.share}: must lie in [0, 1]")
        if not 0 <= self.scale < math.inf:
            raise UserError(f"strategy.scale={self.scale}: must be 0 or more, and finite")

    def setup(self, run: Run) -> None:
        self.start: Factors = read_factors(run.policy.model)  # of the task; in average=task_vectors that of all of them
        self.total: Factors = {name: torch.zeros_like(factor) for name, factor in self.start.items()}  # of task vectors

    def begin_task(self, context: Context) -> None:
        model = context.run.policy.model
        if self.average is Average.ema:
            self.start = read_factors(model)
        else:
            write_factors(model, self.start, dict.fromkeys(self.start, 0))

    def end_task(self, context: Context) -> None:
        model = context.run.policy.model
        end = read_factors(model)
        if self.average is Average.ema:
            after = {name: torch.lerp(self.start[name], end[name], self.share) for name in end}
        else:
            self.total = {name: self.total[name] + (end[name] - self.start[name]) for name in end}
            tasks = 1 if self.merge is Merge.sum else context.task_number + 1
            after = {name: self.start[name] + self.scale / tasks * self.total[name] for name in end}
        write_factors(model, after, dict.fromkeys(after, 0))

    def state_dict(self) -> State:
        kept = {"start": self.start} | ({"total": self.total} if self.average is Average.task_vectors else {})
        tensors = {f"{part}/{name}": factor for part, factors in kept.items() for name, factor in factors.items()}
        return State({"average": self.average.value}, tensors)

    def load_state_dict(self, state: State) -> None:
        before = state.values["average"]
        if before != self.average.value:
            raise UserError(
                f"strategy.average={self.average.value}: the run's weights are averaged by another; give it {before}"
            )
        parts = {"start": {}, "total": {}}
        for key, factor in state.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = factor
        self.start, self.total = parts["start"], parts["total"] or self.total
