"""Gradient episodic memory: a step's gradient is turned so that, to first order, no past task loses by a step along it.

The optimiser here is AdamW, whose step is not along the gradient: momentum and the division by each weight's own scale may
still raise the loss of a past task. Both papers show their property for plain gradient descent.

GEM: Lopez-Paz and Ranzato, 2017, arXiv 1706.08840. A-GEM: Chaudhry et al., 2019, arXiv 1812.00420.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from lifealign.data.tokenize import Pair
from lifealign.errors import TrainingDiverged, UserError
from lifealign.registry import register
from lifealign.runtime import distributed
from lifealign.strategies.base import Context, Run, State, Strategy
from lifealign.strategies.gradients import flatten, inner_products, mean_gradients, sample, unflatten

_RANK_TOLERANCE = 1e-12
"""Eigenvalues below this share of the largest are taken for zeros: rounding of the inner products of long vectors."""


class Gradients(Enum):
    """Which gradients stand for past tasks."""

    current = "current"  # of the memory's loss in the current stage, at the current weights (the paper)
    stored = "stored"  # of each past stage: the running average of the gradients that its steps took


@dataclass
class EpisodicMemory(Strategy, ABC):
    """Keeps pairs of past tasks, and makes of a step's gradient g the sum g + G^T v, where the rows of G are of the past.

    A subclass says which gradients these are, and finds v. Where v is 0 the gradient is left as it is, bit for bit.
    """

    whole_parameters = "it compares whole gradients"

    memory_pairs: int = 256  # pairs of each past task that are kept, drawn uniformly
    micro_batch_size: int = 8  # of them, how many a rank takes through the model at once

    def __post_init__(self) -> None:
        for key in ("memory_pairs", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be at least 1")

    def setup(self, run: Run) -> None:
        self.memory: list[list[Pair]] = []  # of each past task
        self.steps = 0  # of the stage so far

    @property
    def transforms_gradients(self) -> bool:
        return bool(self.memory)

    def begin_stage(self, context: Context) -> None:
        self.steps = 0

    def kept_pairs(self) -> Sequence[Pair]:
        return [pair for pairs in self.memory for pair in pairs]

    def stage_state(self) -> State:
        return State({"steps": self.steps})  # a resumed stage draws what this one does

    def load_stage_state(self, state: State) -> None:
        self.steps = state.values["steps"]

    def transform_gradients(self, context: Context, gradients: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        self.steps += 1
        own, past = flatten(gradients.values()), self.past_gradients(context, gradients)
        products = inner_products(torch.cat([past, own[None]]))
        if not np.isfinite(products).all():
            raise TrainingDiverged(
                f"the gradient of step {self.steps} of the {context.stage} stage of task {context.task.name}, or one of "
                "the past, is not finite; the optimiser has not taken this step"
            )
        # Found on one rank: what two machines round differently must not let their weights drift apart.
        multiples = distributed.broadcast_object(self.multiples(products))
        if not multiples.any():
            return gradients
        return unflatten(own + torch.from_numpy(multiples).to(past) @ past, gradients)

    @abstractmethod
    def past_gradients(self, context: Context, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(t, elements) float32 flat gradients of the past over the parameters named in ``gradients``; at least one row."""

    @abstractmethod
    def multiples(self, products: np.ndarray) -> np.ndarray:
        """(t,) float64 v, from the (t + 1, t + 1) inner products of the rows of G and of g, which stands last."""

    def _draw(self, context: Context) -> torch.Generator:
        return context.generator(f"memory of step {self.steps}")

    def _mean_gradients(self, context: Context, sets: Sequence[Sequence[Pair]], names: Iterable[str]) -> torch.Tensor:
        """(sets, elements) of the current stage's mean loss over each set, at the current weights."""
        trained = context.run.trained()
        parameters = [trained[name] for name in names]
        return mean_gradients(context.run, context.stage, sets, parameters, at_once=self.micro_batch_size)

    def end_task(self, context: Context) -> None:
        self.memory.append(sample(context.task.train, self.memory_pairs, context.generator("memory")))

    def state_dict(self) -> State:
        return State({"memory": [[asdict(pair) for pair in pairs] for pairs in self.memory]})

    def load_state_dict(self, state: State) -> None:
        self.memory = [[Pair(**values) for values in pairs] for pairs in state.values["memory"]]


@register("strategy", "gem")
class GradientEpisodicMemory(EpisodicMemory):
    """The nearest gradient to g that has no negative inner product with that of any past task (eq. 8 to 11).

    A past task's gradient is that of the current stage's mean loss over its memory. ``gradients=stored`` does as LifeAlign's
    released code: every stage leaves the running average of its steps' gradients, 0.9 of the old and 0.1 of the new, which is
    a constraint on all stages after it, those of its own task included; no pairs are kept.
    """

    margin: float = 0.5  # gamma: least multiple of each past gradient that is added where any constraint is violated
    memory_batch: int | None = None  # pairs of each past task's memory that a step looks at; null, as in the paper: all
    gradients: Gradients = Gradients.current

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < math.inf:
            raise UserError(f"strategy.margin={self.margin}: must be 0 or more, and finite")
        if self.memory_batch is not None and self.memory_batch < 1:
            raise UserError(f"strategy.memory_batch={self.memory_batch}: must be at least 1; null takes all of the memory")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.stored: list[torch.Tensor] = []  # of each past stage, flat
        self.average: torch.Tensor | None = None  # of the steps of this one

    @property
    def transforms_gradients(self) -> bool:
        return self.gradients is Gradients.stored or super().transforms_gradients

    def begin_stage(self, context: Context) -> None:
        super().begin_stage(context)
        self.average = None

    def stage_state(self) -> State:
        return State(super().stage_state().values, {} if self.average is None else {"average": self.average.cpu()})

    def load_stage_state(self, state: State) -> None:
        super().load_stage_state(state)
        if "average" in state.tensors:
            self.average = state.tensors["average"].to(distributed.device())

    def transform_gradients(self, context: Context, gradients: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self.gradients is Gradients.current:
            return super().transform_gradients(context, gradients)
        changed = super().transform_gradients(context, gradients) if self.stored else gradients
        taken = flatten(changed.values())
        self.average = taken if self.average is None else torch.lerp(self.average, taken, 0.1)
        return changed

    def past_gradients(self, context: Context, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.gradients is Gradients.stored:
            return torch.stack(self.stored)
        generator = self._draw(context)
        batches = [sample(pairs, self.memory_batch, generator) for pairs in self.memory]
        return self._mean_gradients(context, batches, gradients)

    def multiples(self, products: np.ndarray) -> np.ndarray:
        return dual_solution(products, self.margin)

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        if self.average is not None:
            self.stored.append(self.average)
        return ()

    def end_task(self, context: Context) -> None:
        if self.gradients is Gradients.current:
            super().end_task(context)

    def state_dict(self) -> State:
        return State(super().state_dict().values, {str(i): stored.cpu() for i, stored in enumerate(self.stored)})

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.stored = [state.tensors[str(i)].to(distributed.device()) for i in range(len(state.tensors))]


@register("strategy", "agem")
class AveragedGradientEpisodicMemory(EpisodicMemory):
    """One constraint: the gradient g_ref of the current stage's mean loss on pairs drawn from all memories together (eq. 11).

    g - (g . g_ref / g_ref . g_ref) g_ref where g . g_ref < 0.
    """

    sample_pairs: int = 32  # pairs of all memories that a step looks at

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_pairs < 1:
            raise UserError(f"strategy.sample_pairs={self.sample_pairs}: must be at least 1")

    def past_gradients(self, context: Context, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        everything = [pair for pairs in self.memory for pair in pairs]
        batch = sample(everything, self.sample_pairs, self._draw(context))
        return self._mean_gradients(context, [batch], gradients)

    def multiples(self, products: np.ndarray) -> np.ndarray:
        (reference, with_own), _ = products
        return np.array([-with_own / reference if with_own < 0 else 0.0])


def dual_solution(products: np.ndarray, margin: float) -> np.ndarray:
    """The v >= margin at which |G^T v + g| is least: the dual of GEM's projection (Lopez-Paz and Ranzato, eq. 11).

    At margin 0 it is the paper's. A positive one is what the paper adds in favour of backward transfer, put into the
    constraint as its authors' code has it: the optimum then still has no negative inner product with any row of G.
    With v = u + margin this is a non-negative least-squares problem in u, and so needs neither independent rows nor a
    regulariser.

    Args:
        products: (t + 1, t + 1) float64 inner products of the t rows of G and of g, which stands last.

    Returns:
        (t,) float64; zeros where no row has a negative product with g.
    """
    if (products[:-1, -1] >= 0).all():
        return np.zeros(len(products) - 1)
    lengths = np.sqrt(np.diag(products))
    used = np.flatnonzero(lengths)  # a gradient of zeros constrains nothing; g is none, or no product were negative
    own_length, past_lengths = lengths[-1], lengths[used[:-1]]
    # Coordinates of the vectors, each scaled to length 1, in an orthonormal basis of their span. Where vectors are dependent
    # eigenvalues are rounding alone, and a solver would make much of it.
    values, vectors = np.linalg.eigh(products[np.ix_(used, used)] / np.outer(lengths[used], lengths[used]))
    values[values < _RANK_TOLERANCE * values[-1]] = 0
    coordinates = np.sqrt(values)[:, None] * vectors.T
    past, own = coordinates[:, :-1], coordinates[:, -1]
    least = margin * past_lengths / own_length  # the margin, for multiples of the scaled vectors
    above, _ = nnls(past, -(own + past @ least))
    multiples = np.full(len(products) - 1, margin)
    multiples[used[:-1]] += above * own_length / past_lengths
    return multiples
