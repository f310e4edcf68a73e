"""What a lifelong-learning strategy may do, and when."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lifealign.data.batch import Batch
from lifealign.data.tasks import Task
from lifealign.data.tokenize import Pair
from lifealign.models.policy import Policy


@dataclass(frozen=True)
class Run:
    """What holds for the whole run."""

    policy: Policy
    folder: Path  # the run directory
    seed: int
    settings_hash: str  # of the configuration; what a ledger names


@dataclass(frozen=True)
class Context:
    """Where in the run a hook is called."""

    run: Run
    task: Task
    task_number: int  # 0-based position in the sequence
    stage: str  # "sft", "preference", or "" outside a stage

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers that depend on the seed, the place in the run and the purpose alone, so that resuming repeats them."""
        return seeded_generator(self.run.seed, self.task_number, self.stage, purpose)


def seeded_generator(*parts: object) -> torch.Generator:
    """A generator seeded by a hash of ``parts``; the same on every rank and in every run."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class State:
    """State of a strategy, as a checkpoint stores it."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Strategy:
    """How a model goes from task to task. Every hook does nothing by default; options are the fields of the subclass.

    Hooks are called on every rank. They return what they have to say and never reach into the trainer.
    """

    def setup(self, run: Run) -> None:
        """Once, before the first task and before any state is loaded."""

    def train_data(self, context: Context, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """The pairs a task trains on, in both stages; ``pairs`` are the task's own. The trainer shuffles."""
        return pairs

    def begin_stage(self, context: Context) -> None:
        """Before a stage's engine is made."""

    def loss_terms(self, context: Context, batch: Batch, logps: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Named scalars added to the loss of a micro-batch and logged under their names.

        Under ZeRO-3 a factor may stand partitioned here; read it inside ``lifealign.models.policy.gathered``.

        Args:
            logps: (num_sequences,) log-probabilities of the batch, differentiable.

        Returns:
            scalars on the scale of the whole loss: each is averaged over the micro-batches of a step.
        """
        return {}

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        """After a stage, with its engine gone. Returns rows to be logged, one a factor where the strategy works on factors."""
        return ()

    def end_task(self, context: Context) -> None:
        """After both stages and before the task is evaluated."""

    def state_dict(self) -> State:
        """All that a resumed run needs to go on as this one would."""
        return State()

    def load_state_dict(self, state: State) -> None:
        """Take up the state of an interrupted run."""
