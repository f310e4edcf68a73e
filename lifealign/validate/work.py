"""What a run would do: pairs a task trains on, steps of its stages, tokens through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from lifealign.config import Config
from lifealign.data.replay import ReplayBuffer, Reservoir
from lifealign.data.tasks import Task
from lifealign.data.tokenize import Pair
from lifealign.stages import StageOptions
from lifealign.strategies.er import Buffer, ExperienceReplay

STAGES = ("sft", "preference")


@dataclass(frozen=True)
class TaskWork:
    """One step of the sequence."""

    task: str
    own: int  # pairs
    replayed: int  # pairs of earlier tasks that it trains on, too
    steps: dict[str, int]  # optimiser steps by stage
    trained_tokens: int  # through forward and backward, all epochs of both stages
    read_tokens: int  # through forward alone: reference, scores, and answers of the longest length


def plan_work(config: Config, tasks: Sequence[Task], ranks: int) -> list[TaskWork]:
    """The run task by task. Joint training is one step."""
    work, buffer = [], _buffer(config)
    generator = torch.Generator().manual_seed(config.seed)
    for experience in config.strategy.plan(tasks):
        own = experience.task.train
        pairs = [*own, *(buffer.pairs if buffer is not None else ())]
        options: dict[str, StageOptions] = {stage: getattr(config, stage) for stage in STAGES}
        scored = [pair for on in experience.scored for pair in tasks[on].test]
        work.append(
            TaskWork(
                task=experience.task.name,
                own=len(own),
                replayed=len(pairs) - len(own),
                steps={stage: chosen.steps(len(pairs), stage, ranks) for stage, chosen in options.items()},
                trained_tokens=config.sft.epochs * _tokens(pairs, rejected=False)
                + config.preference.epochs * _tokens(pairs, rejected=True),
                read_tokens=_tokens(own, rejected=True) + _evaluated(scored, config),
            )
        )
        if buffer is not None:
            buffer.add(own, generator)
    return work


def _buffer(config: Config) -> ReplayBuffer | None:
    """An empty one of the kind that the strategy keeps, if it keeps one."""
    strategy = config.strategy
    if not isinstance(strategy, ExperienceReplay):
        return None
    uniform = strategy.buffer is Buffer.uniform
    return ReplayBuffer(strategy.buffer_size, strategy.buffer_fraction) if uniform else Reservoir(strategy.buffer_size)


def _tokens(pairs: Sequence[Pair], *, rejected: bool) -> int:
    return sum(len(p.prompt) + len(p.chosen) + (len(p.rejected) if rejected else 0) for p in pairs)


def _evaluated(pairs: Sequence[Pair], config: Config) -> int:
    """Tokens of one evaluation: pairs once, and each answer as long as it may be."""
    options = config.evaluation
    answered = pairs[: options.max_generations] if options.generates else ()
    return _tokens(pairs, rejected=True) + sum(len(p.prompt) + options.max_new_tokens for p in answered)


def batch_table(config: Config, ranks: int) -> Table:
    """How a step's pairs come together."""
    table = Table(title=f"Batches, on {ranks} {'rank' if ranks == 1 else 'ranks'}")
    heads = ("stage", "epochs", "pairs a rank holds", "× accumulation", "× ranks", "= pairs a step")
    for heading in heads:
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in STAGES:
        options: StageOptions = getattr(config, stage)
        accumulation = options.accumulation(stage, ranks)
        cells = options.epochs, options.micro_batch_size, accumulation, ranks, options.global_batch(stage, ranks)
        table.add_row(stage, *map(str, cells))
    return table


def step_table(work: Sequence[TaskWork]) -> Table:
    """Optimiser steps, task by task."""
    table = Table(title="Optimiser steps")
    for heading in ("task", "own pairs", "replayed", *STAGES):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in work:
        table.add_row(task.task, str(task.own), str(task.replayed), *(str(task.steps[stage]) for stage in STAGES))
    table.add_section()
    table.add_row("all", "", "", *(str(sum(task.steps[stage] for task in work)) for stage in STAGES))
    return table
