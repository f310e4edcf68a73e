"""Elastic weight consolidation: weights that mattered to past tasks are held where they were.

Kirkpatrick et al., 2017, arXiv 1612.00796; its online form: Schwarz et al., 2018, arXiv 1805.06370.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.objectives import DPO, FPO, IPO, Objective, PreferenceLoss, Robust
from lifealign.objectives.preference import reference_rewards
from lifealign.registry import register
from lifealign.runtime import distributed
from lifealign.stages import PreferenceStage
from lifealign.strategies.base import Context, Run, State, Strategy
from lifealign.strategies.gradients import flatten, mean_squared_gradient, sample


class Mode(Enum):
    """How the penalties of several tasks go together."""

    separate = "separate"  # a penalty for each task, around the weights that the task left
    online = "online"  # one penalty: the newest weights, and a decaying sum of Fisher information


class RegisterAfter(Enum):
    """When Fisher information is taken, and the weights are held."""

    task = "task"  # of both stages, at the end of the task
    stage = "stage"  # of each stage when it ends


@dataclass(frozen=True)
class Quadratic:
    """The function sum_i a_i (theta_i - m_i)^2 + c of flat weights theta; vectors are (weights,)."""

    importance: torch.Tensor  # a, 0 or more
    anchor: torch.Tensor  # m
    rest: float = 0.0  # c

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        """() value, differentiable in the weights."""
        return (self.importance * (weights - self.anchor).square()).sum() + self.rest

    def plus(self, importance: torch.Tensor, anchor: torch.Tensor) -> Quadratic:
        """The sum with another such function without rest, again as one: a sum of parabolas is a parabola.

        With A = a + F its minimum lies at m + (F / A) (theta_t - m), and the two are a F / A (theta_t - m)^2 apart there.
        Nothing is subtracted but weights, so rounding does not grow with the number of tasks.
        """
        total = self.importance + importance
        share = torch.where(total > 0, importance / total, 1.0)  # a weight that nothing holds: 0 / 0
        moved = anchor - self.anchor
        apart = (self.importance * share * moved.square()).sum(dtype=torch.float64)
        return Quadratic(total, self.anchor + share * moved, self.rest + float(apart))

    def followed_by(self, importance: torch.Tensor, anchor: torch.Tensor, decay: float) -> Quadratic:
        """The one that stands for both in online EWC: what mattered fades, and is held where the weights are now."""
        return Quadratic(decay * self.importance + importance, anchor)


@register("strategy", "ewc")
class ElasticWeightConsolidation(Strategy):
    """Adds (strength / 2) sum_t sum_i F_{t,i} (theta_i - theta_{t,i})^2 over past tasks t (Kirkpatrick et al., eq. 3).

    F is the diagonal of the empirical Fisher information of a task, at the weights theta_t that the task left: the mean over
    its pairs of squared gradients of log-likelihoods. SFT's is divided by the mean number of target tokens, since its loss is a
    mean over tokens: F is then the curvature of the losses that were trained, and strength 1 weighs each past task as the
    present one. A task's is the sum of those of its stages that were trained. With
    ``mode=online`` it is (strength / 2) sum_i F_i (theta_i - theta_{newest,i})^2, and each task makes F <- decay F + F_t.
    """

    whole_parameters = "its Fisher information is made of whole gradients"

    strength: float = 1.0  # lambda: weight of the penalty
    mode: Mode = Mode.separate
    decay: float = 0.95  # of the Fisher information of earlier tasks; with mode=online
    fisher_pairs: int = 128  # pairs of a task that its Fisher information is a mean over, at most
    register_after: RegisterAfter = RegisterAfter.task

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UserError(f"strategy.strength={self.strength}: must be 0 or more, and finite")
        if not 0 <= self.decay <= 1:
            raise UserError(f"strategy.decay={self.decay}: must lie in [0, 1]")
        if self.fisher_pairs < 1:
            raise UserError(f"strategy.fisher_pairs={self.fisher_pairs}: must be at least 1")

    def setup(self, run: Run) -> None:
        self.likelihood = with_likelihoods(run)
        self.penalty: Quadratic | None = None  # of all that is registered, without strength / 2
        self.trained: list[str] = []  # stages that are not registered yet

    def loss_terms(self, context: Context) -> Mapping[str, torch.Tensor]:
        if self.penalty is None:
            return {}
        return {"ewc": self.strength / 2 * self.penalty(flatten(context.run.trained().values()))}

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        self.trained.append(context.stage)
        if self.register_after is RegisterAfter.stage:
            self._register(context)
        return ()

    def end_task(self, context: Context) -> None:
        if self.register_after is RegisterAfter.task:
            self._register(context)

    def _register(self, context: Context) -> None:
        """Hold the weights as they are, by what the stages trained since the last time say of them."""
        parameters = list(context.run.trained().values())
        pairs = sample(context.task.train, self.fisher_pairs, context.generator("fisher"))
        fisher = torch.stack([self._curvature(stage, pairs, parameters) for stage in self.trained]).sum(0)
        weights = flatten(parameters).detach()
        if self.penalty is None:
            self.penalty = Quadratic(fisher, weights)
        elif self.mode is Mode.online:
            self.penalty = self.penalty.followed_by(fisher, weights, self.decay)
        else:
            self.penalty = self.penalty.plus(fisher, weights)
        self.trained = []

    def _curvature(self, stage: str, pairs: Sequence[Pair], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """(weights,) Fisher information of a stage over the size of a pair in its loss: its target tokens in SFT, or 1."""
        sizes = [self.likelihood.stages[stage].size(pair) for pair in pairs]
        return mean_squared_gradient(self.likelihood, stage, pairs, parameters) * (len(pairs) / sum(sizes))

    def state_dict(self) -> State:
        if self.penalty is None:
            return State({"trained": self.trained})
        tensors = {"importance": self.penalty.importance.cpu(), "anchor": self.penalty.anchor.cpu()}
        return State({"trained": self.trained, "rest": self.penalty.rest}, tensors)

    def load_state_dict(self, state: State) -> None:
        self.trained = state.values["trained"]
        if "rest" in state.values:
            vectors = {name: tensor.to(distributed.device()) for name, tensor in state.tensors.items()}
            self.penalty = Quadratic(**vectors, rest=state.values["rest"])


class RootOfFisher(IPO):
    """In place of IPO's loss, sqrt(2) h, whose squared gradient is IPO's Fisher information.

    (h - target)^2 is the negative log-likelihood of a normal distribution of variance 1/2, and its information 2 (grad h)^2
    whatever the residual; the square of its own gradient would be none where a pair is learned to the point.
    """

    def __call__(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> PreferenceLoss:
        chosen, rejected = reference_rewards(policy.unbind(1), reference.unbind(1), math.sqrt(2))
        return PreferenceLoss(chosen - rejected, chosen.detach(), rejected.detach(), torch.ones_like(chosen))


def with_likelihoods(run: Run) -> Run:
    """The run with losses whose squared gradients are the Fisher information of what was trained, pair by pair.

    Negative log-likelihoods are such losses: SFT's, SimPO's, and DPO's -log sigmoid(r), the probability that the chosen
    response is preferred. FPO and robust DPO fit the same probability with other weights on the pairs. FPO's would make weights
    that a well-learned pair depends on look free, the better it is learned, and those are to be held; so both take DPO's.
    """
    stage = run.stages["preference"]
    assert isinstance(stage, PreferenceStage)
    match stage.objective:
        case FPO() | Robust():
            likelihood: Objective = DPO(beta=stage.objective.beta)
        case IPO():
            likelihood = RootOfFisher(beta=stage.objective.beta)
        case _:
            return run
    return replace(run, stages={**run.stages, "preference": PreferenceStage(likelihood, stage.reference)})
