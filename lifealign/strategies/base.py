"""What a lifelong-learning strategy may do, and when."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lifealign.data.batch import Batch, collate
from lifealign.data.tasks import Task
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.loading import pad_token_id
from lifealign.models.options import LoraOptions
from lifealign.models.policy import Policy
from lifealign.models.scoring import score_pairs
from lifealign.runtime import distributed
from lifealign.runtime.engine import ZeroOptions
from lifealign.runtime.files import Seal
from lifealign.stages import Stage


@dataclass(frozen=True)
class Run:
    """What holds for the whole run."""

    policy: Policy
    folder: Path  # the run directory
    seed: int
    settings_hash: str  # of the configuration; what a ledger names
    tokenizer: PreTrainedTokenizerBase
    stages: Mapping[str, Stage]  # "sft" and "preference", with their losses
    batch_size: int  # pairs that a rank holds at once where nothing is trained

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """(pairs, 2) float32 log-probabilities of chosen and rejected under the policy as it is, on every rank; no gradient."""
        pad = pad_token_id(self.tokenizer)
        return score_pairs(self.policy, self.policy, pairs, batch_size=self.batch_size, pad_token_id=pad)

    def losses(self, stage: str, pairs: Sequence[Pair]) -> torch.Tensor:
        """(pairs,) loss of each pair in a stage, differentiable; of this rank's pairs, with no other rank involved.

        For strategies that look at gradients of their own (ZeRO stages 0 to 2). The preference stage needs pairs that
        the run has met in training, since it reads their reference log-probabilities.
        """
        rows = [self.policy.prefixed(self.stages[stage].row(pair)) for pair in pairs]
        batch = collate(rows, layout=self.policy.layout, pad_token_id=pad_token_id(self.tokenizer))
        logps = self.policy(batch.to(distributed.device()))
        return self.stages[stage].outcome(logps, pairs).losses

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name; in an order that all ranks share."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}


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
class Experience:
    """One step of a run: what is trained, and which scores follow (Avalanche's word for an element of the stream)."""

    task: Task
    scored: Sequence[int]  # positions of the tasks that are scored afterwards
    rows: Sequence[int]  # rows of the score matrix that these scores fill: more than one where a model stays in use

    def scores(self, tasks: int, *, forward: bool) -> list[tuple[int, Sequence[int]]]:
        """(position of a task, rows that its score fills); with ``forward`` the tasks still to come, in the first row alone."""
        ahead = range(max(self.scored) + 1, tasks) if forward else ()
        return [*((task, self.rows) for task in self.scored), *((task, self.rows[:1]) for task in ahead)]


class Seen(NamedTuple):
    """What a strategy may look at in a micro-batch of a stage."""

    pairs: Sequence[Pair]
    batch: Batch
    logps: torch.Tensor  # (num_sequences,) differentiable: a response each in SFT; chosen, rejected, chosen, ... else
    losses: torch.Tensor  # (pairs,) of the stage, each summed over what the stage's loss is a mean of; differentiable


@dataclass(frozen=True)
class State:
    """State of a strategy, as a checkpoint stores it."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    # Files that the strategy has written and that this state is nothing without, by their paths in the run directory. A
    # checkpoint holds their seals and counts as damaged where they are; they must stay as they are.
    files: dict[str, Seal] = field(default_factory=dict)


@dataclass
class Strategy:
    """How a model goes from task to task. Every hook does nothing by default; options are the fields of the subclass.

    Hooks are called on every rank. They return what they have to say and never reach into the trainer.
    """

    whole_parameters: ClassVar[str | None] = None  # why the strategy needs parameters that are not partitioned, if it does

    def check(self, zero: ZeroOptions) -> None:
        """When a configuration is composed.

        Raises:
            UserError: where the strategy cannot run with these options, with the reason.
        """
        name = getattr(type(self), "name", type(self).__name__)
        if zero.stage == 3 and self.whole_parameters is not None:
            raise UserError(f"strategy={name} does not run with zero=3: {self.whole_parameters}; use zero=2")
        if zero.offloads_optimizer and type(self).transform_gradients is not Strategy.transform_gradients:
            raise UserError(
                f"strategy={name} does not run with zero.settings.offload_optimizer: DeepSpeed would clip by the norm of the "
                "gradient that the strategy replaces; leave the optimiser on the device"
            )

    # The model

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the policy reads in front of every prompt."""
        return 0

    def lora(self, options: LoraOptions, tasks: int) -> LoraOptions:
        """The adapter that a run of so many tasks needs."""
        return options

    def setup_model(self, policy: Policy, seed: int) -> None:
        """Once the policy is made: add to it what is trained beside LoRA (``policy.added``), or freeze what is not."""

    # The run

    def setup(self, run: Run) -> None:
        """Once, before the first task and before any state is loaded; the policy has its initial weights."""

    def plan(self, tasks: Sequence[Task]) -> Sequence[Experience]:
        """What is trained in which order, and scored after it: task by task, each followed by all tasks seen so far."""
        return [Experience(task, range(number + 1), (number,)) for number, task in enumerate(tasks)]

    def begin_task(self, context: Context) -> None:
        """Before the first stage of a task, whether that is skipped or not."""

    def train_data(self, context: Context, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """The pairs a task trains on, in both stages; ``pairs`` are the task's own. The trainer shuffles."""
        return pairs

    def begin_stage(self, context: Context) -> None:
        """Before a stage's engine is made."""

    def kept_pairs(self) -> Sequence[Pair]:
        """Pairs of past tasks that a stage's loss is taken of beside what it trains on; the reference is asked of them, too."""
        return ()

    # A step

    def pair_weights(self, context: Context, seen: Seen) -> torch.Tensor | None:
        """(pairs,) factors on the stage's own loss of each pair; None leaves it as it is."""
        return None

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        """Named losses of each pair, (pairs,); their means over the pairs of the global batch are added to the loss."""
        return {}

    def loss_terms(self, context: Context) -> Mapping[str, torch.Tensor]:
        """Named scalars added to the loss, functions of the weights or of data that is not the batch.

        Called for each micro-batch on each rank, and averaged over them. Under ZeRO-3 a factor may stand partitioned
        here; read it inside ``lifealign.models.policy.gathered``.
        """
        return {}

    @property
    def transforms_gradients(self) -> bool:
        """Whether whole gradients are to be gathered for :meth:`transform_gradients`."""
        return type(self).transform_gradients is not Strategy.transform_gradients

    def transform_gradients(self, context: Context, gradients: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the optimiser is to take instead of the gradient of a step.

        Args:
            gradients: by the names of :meth:`Run.trained`, whole and float32, averaged over ranks and micro-batches; before
                clipping. Every rank has the same and must return the same.
        """
        return gradients

    # A checkpoint within a stage

    def stage_state(self) -> State:
        """What steps change beside the weights. Resuming calls :meth:`begin_stage` first and then hands this back."""
        return State()

    def load_stage_state(self, state: State) -> None:
        """Take up the state of an interrupted stage."""

    # The end of a stage, and of a task

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
