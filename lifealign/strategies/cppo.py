"""CPPO carried over to preference pairs (Zhang et al., ICLR 2024, openreview 86zAUE80pP)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from enum import Enum

import torch

from lifealign.errors import UserError
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, Seen, State, Strategy
from lifealign.strategies.lwf import OUTSIDE_AN_ENGINE, PairTable, reward_margins

log = logging.getLogger(__name__)

TYPES = ("normal", "high-performance", "overfitting", "high-variance", "noisy")
NORMAL, HIGH_PERFORMANCE, OVERFITTING, HIGH_VARIANCE, NOISY = range(5)

DIRECTIONS = torch.tensor([[0, 0], [1, 1], [1, -1], [1, -1], [-1, -1]], dtype=torch.float64)
"""The paper's table of types: how alpha and beta of each stand to those of a normal sample, 1 above and -1 below."""

LEARNING_STEPS, LEARNING_RATE = 300, 0.1  # of Adam, on the weights of one task


class Weighting(Enum):
    """Where a pair's weights come from."""

    heuristic = "heuristic"
    learned = "learned"


class Gain(Enum):
    """How far a heuristic weight moves away from 1."""

    linear = "linear"
    balanced = "balanced"


def deviations(values: torch.Tensor) -> torch.Tensor:
    """Values as standard deviations (of the population) from their mean, down each column; float64.

    Equal values deviate by 0: the smallest deviation divided by is 1e-8, far below what float32 log-probabilities resolve.
    """
    values = values.double()
    return (values - values.mean(0)) / values.std(0, correction=0).clamp(min=1e-8)


def sample_types(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """(samples,) int64 index into :data:`TYPES`.

    Args:
        scores: (samples, 2) deviations of generation probability P and of reward R.
        threshold: k, in standard deviations. What deviates by no more is ordinary, and an ordinary P or R makes a sample
            normal.
    """
    high, low = (scores > threshold).unbind(1), (scores < -threshold).unbind(1)
    types = torch.full((len(scores),), NORMAL)
    types[high[0] & high[1]] = HIGH_PERFORMANCE
    types[high[0] & low[1]] = OVERFITTING
    types[low[0] & high[1]] = HIGH_VARIANCE
    types[low[0] & low[1]] = NOISY
    return types


def heuristic_weights(
    scores: torch.Tensor, types: torch.Tensor, threshold: float, gain: Gain, lower: float, upper: float
) -> torch.Tensor:
    """(samples, 2) float64 alpha and beta.

    ``balanced`` takes ``upper`` for what the table raises and ``lower`` for what it lowers. ``linear`` moves away from 1 by
    what a sample's score exceeds the threshold, alpha by that of P and beta by that of R, as far as those bounds.

    Args:
        scores: (samples, 2) deviations of P and R.
        types: (samples,) of :func:`sample_types` at the same threshold.
    """
    direction = DIRECTIONS[types]
    size = scores.abs() - threshold if gain is Gain.linear else torch.full_like(scores, math.inf)
    return torch.where(direction == 0, 1.0, 1 + direction * size).clamp(lower, upper)


def learning_loss(weights: torch.Tensor, types: torch.Tensor, pressure: float) -> torch.Tensor:
    """What learned weights make small: () of (samples, 2) alpha and beta, differentiable.

        mean (alpha - 1)^2 + mean (beta - 1)^2 + pressure * sum over types of direction * (normal - type)

    ``normal`` and ``type`` are mean weights over the samples of a type, for alpha and for beta, and ``direction`` is that of
    the table: each of its inequalities is a term that falls as it comes true. A type without samples has none.
    """
    members = torch.nn.functional.one_hot(types, len(TYPES)).to(weights.dtype)
    counts = members.sum(0)
    means = members.T @ weights / counts.clamp(min=1)[:, None]
    present = (counts > 0) & (counts[NORMAL] > 0)
    gaps = DIRECTIONS * (means[NORMAL] - means) * present[:, None]
    return (weights - 1).square().mean(0).sum() + pressure * gaps.sum()


def learned_weights(types: torch.Tensor, pressure: float, lower: float, upper: float) -> torch.Tensor:
    """(samples, 2) float64 alpha and beta, found by Adam on a parameter a weight; all start at 1.

    A weight is lower + (upper - lower) * sigmoid(parameter), so it cannot leave its bounds.
    """
    start = math.log((1 - lower) / (upper - 1))
    parameters = torch.full((len(types), 2), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=LEARNING_RATE)
    for _ in range(LEARNING_STEPS):
        optimizer.zero_grad()
        learning_loss(lower + (upper - lower) * parameters.sigmoid(), types, pressure).backward()
        optimizer.step()
    return lower + (upper - lower) * parameters.sigmoid().detach()


@register("strategy", "cppo")
class CPPO(Strategy):
    """Pairs are weighed by how probable and how good the policy before the task found them, and that policy is held on to.

    The paper's objective (its eq. 6) for the preference stage, with the stage's loss of a pair in the place of PPO's clipped
    loss (there is no value function, and no rollout)::

        mean of alpha(x) * loss(x) + retention * beta(x) * [(log pi(y_p|x) - log pi_old(y_p|x))^2 + the same of y_d]

    where pi_old is the policy before the task, and y_p, y_d are the chosen and the rejected response. Five types of samples,
    by the generation probability P and the reward R relative to mean +- k standard deviations::

        type               P      R      alpha  beta
        high-performance   high   high   up     up
        overfitting        high   low    up     down
        high-variance      low    high   up     down
        noisy              low    low    down   down
        normal             else          1      1

    The types, their directions, the squared drift and the two weightings are the paper's, as its authors' code has them.
    We could read that code, the abstract and reviews of the paper, but not its tables of formulas. Our reading are

    - the linear gain: the authors' code, 1 + (|score| - k) and 1 - (|score| - k), alpha by P and beta by R, with bounds on
      both and with the sign of a low score, which the code takes as it is, turned;
    - the loss of learned weights: the authors' code has the distance from 1 and the inequalities, with further terms as
      options; here every inequality of the table has its term, and ``pressure`` weighs them;
    - their optimisation over all of a task's pairs, in place of those of one batch of rollouts, from weights of 1.

    What changes with pairs is ours. A sample is a pair; P is the log-probability of its chosen response and R the implicit
    reward margin of the pair, both under the policy before the task. Mean and standard deviation are those over all of the
    task's pairs, so that types depend neither on the batch that a pair is in nor on the number of ranks. The old policy is
    asked once a task. In the first task there is none but the base, under which every margin is 0 (but SimPO's, which has no
    reference): nothing is weighed and nothing held, and it is the first task of ``seqft``.

    ``strategy=cppo_released`` has the settings of LifeAlign's released code: balanced gains, and sums in place of means over
    tokens. That code takes current values of the policy and statistics of each batch; ours are those of the task, as above.
    """

    whole_parameters = OUTSIDE_AN_ENGINE

    weighting: Weighting = Weighting.heuristic  # where weights come from: from scores by a formula, or learned
    gain: Gain = Gain.linear  # how far a heuristic weight moves; weighting=heuristic
    pressure: float = 0.1  # weight of the table's inequalities beside the distance from 1; weighting=learned
    threshold: float = 1.0  # k, in standard deviations
    lower: float = 0.5  # least weight, in [0, 1)
    upper: float = 2.0  # greatest weight, above 1
    retention: float = 1.0  # factor on the squared drift
    per_token: bool = True  # log-probabilities, in P and in the drift, are means over tokens and not sums

    def __post_init__(self) -> None:
        for key in ("threshold", "retention", "pressure"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be 0 or more, and finite")
        if not 0 <= self.lower < 1:
            raise UserError(f"strategy.lower={self.lower}: must lie in [0, 1), below the weight 1 of a normal pair")
        if not 1 < self.upper < math.inf:
            raise UserError(f"strategy.upper={self.upper}: must be finite and above 1, the weight of a normal pair")

    def setup(self, run: Run) -> None:
        self.before = PairTable()  # log-probabilities under the policy before the task, chosen and rejected
        self.weights: PairTable | None = None  # alpha and beta, once the task's reference log-probabilities are known

    def begin_task(self, context: Context) -> None:
        self.weights = None
        if context.task_number > 0:
            self.before = PairTable(context.task.train, context.run.score(context.task.train))

    def begin_stage(self, context: Context) -> None:
        if self._acts(context):
            self.before.check(context.task.train)

    def pair_weights(self, context: Context, seen: Seen) -> torch.Tensor | None:
        if not self._acts(context):
            return None
        return self._weights(context, seen)[:, 0]

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        if not self._acts(context):
            return {}
        logps = seen.logps.view(-1, 2)
        drift = logps - self.before.of(seen.pairs).to(logps.device, non_blocking=True)
        if self.per_token:
            lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in seen.pairs])
            drift = drift / lengths.to(logps.device, non_blocking=True)
        return {"retention": self.retention * self._weights(context, seen)[:, 1] * drift.square().sum(1)}

    def _acts(self, context: Context) -> bool:
        return context.stage == "preference" and context.task_number > 0

    def _weights(self, context: Context, seen: Seen) -> torch.Tensor:
        """(pairs, 2) alpha and beta of a micro-batch."""
        if self.weights is None:
            self.weights = PairTable(context.task.train, self._weigh(context).float())
        return self.weights.of(seen.pairs).to(seen.logps.device, non_blocking=True)

    def _weigh(self, context: Context) -> torch.Tensor:
        """(pairs, 2) float64 alpha and beta of all of the task's pairs; the same on every rank."""
        pairs = context.task.train
        old = self.before.of(pairs)
        lengths = torch.tensor([len(pair.chosen) if self.per_token else 1 for pair in pairs])
        scores = deviations(torch.stack([old[:, 0].double() / lengths, reward_margins(context.run, pairs, old)], dim=1))
        types = sample_types(scores, self.threshold)
        counted = zip(TYPES, torch.bincount(types, minlength=len(TYPES)), strict=True)
        log.info("cppo: %s", ", ".join(f"{count} {name}" for name, count in counted))
        if self.weighting is Weighting.learned:
            return learned_weights(types, self.pressure, self.lower, self.upper)
        return heuristic_weights(scores, types, self.threshold, self.gain, self.lower, self.upper)

    def state_dict(self) -> State:
        return State(tensors=self.before.state_dict())

    def load_state_dict(self, state: State) -> None:
        self.before.load_state_dict(state.tensors)
        self.weights = None
