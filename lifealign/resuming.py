"""Whether a run may go on from what it left, with the settings, rows and tasks that it is given now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lifealign.config import differences
from lifealign.data.tasks import Task
from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook
from lifealign.models.adapter import factor_shapes
from lifealign.models.policy import Policy
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.files import read_yaml, write_text
from lifealign.stages import StageOptions
from lifealign.strategies.base import Experience

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Midway:
    """What an interrupted stage goes on from, once it has begun again as it began then: its weights and all that moves them."""

    steps: int  # taken, or skipped
    batch_size: int  # pairs in each of them
    strategy: dict[str, Any]
    parts: dict[str, Tensors]  # adapter, added, optimizer, rng, strategy
    skipped: int = 0  # of the steps


def refuse_a_lost_run(folder: Path) -> None:
    """A run that has come somewhere has checkpoints; without them it must not start over unasked.

    Raises:
        UserError: on every rank, where any sees scores.
    """
    if any(distributed.gather_objects((folder / "scores.json").exists())):
        raise UserError(
            f"{folder}: holds a run without its checkpoints, which cannot go on; take them from a copy of the run, or "
            "name another run.dir to start anew"
        )


def changed_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a run and those it is given now; nothing where it has none.

    Raises:
        UserError: where ``config.yaml`` cannot be read.
    """
    held = folder / "config.yaml"
    if not held.exists():
        return []
    before = read_yaml(held)
    if not isinstance(before, dict):
        raise UserError(f"{held}: not what a run writes; take it from a copy of the run, or name another run.dir")
    return differences(before, dict(settings))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    write_text(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False))


def take_up_settings(folder: Path, settings: Mapping[str, Any], also: Sequence[str]) -> None:
    """Of a run that goes on: note what was forced, ``also`` what is no setting, and keep the settings. Rank 0 only."""
    changed = [*changed_settings(folder, settings), *also]
    if changed:
        checkpoint.record_forced(folder, changed)
    write_settings(folder, settings)


def check_rows(folder: Path, tasks: Sequence[Task], before: Mapping[str, str], *, force: bool) -> list[str]:
    """Compare each task's rows with those of the run, ``before`` by the task's name.

    Returns:
        What differs, where ``force`` allows it.

    Raises:
        UserError: where they are others.
    """
    changed = [t.name for t in tasks if t.name in before and before[t.name] != t.data_hash]
    if changed and not force:
        raise UserError(
            f"{folder}: the rows of task '{changed[0]}' are not those that the interrupted run was trained on; "
            "resume=force goes on all the same, resume=never starts over"
        )
    return [f"the rows of task {name}" for name in changed]


def check_strategy(folder: Path, before: str, now: str) -> None:
    """Raises UserError where the run was trained by another strategy, whose state says nothing to this one."""
    if before != now:
        raise UserError(
            f"{folder}: was trained with strategy={before}, whose state says nothing to strategy={now}; give it "
            f"strategy={before}, or another run.dir"
        )


def check_base(folder: Path, before: str, now: str, *, force: bool) -> list[str]:
    """Compare the hash of the base with that of the run's.

    Returns:
        What differs, where ``force`` allows it.

    Raises:
        UserError: where it is another.
    """
    if before != now and not force:
        raise UserError(
            f"{folder}: its base was another: other weights stand at model.path, or another device or version of transformers "
            "reads them; give it that one, or go on all the same with resume=force"
        )
    return ["the base"] if before != now else []


def check_weights(folder: Path, policy: Policy, adapter: Tensors, added: Tensors) -> None:
    """Raises UserError where what is trained has another shape than what was saved, as changed settings would have it."""
    saved = {name: value.shape for name, value in {**adapter, **added}.items()}
    if saved != factor_shapes(policy.model) | {name: value.shape for name, value in policy.added.items()}:
        raise UserError(
            f"{folder}: its adapter is of another shape; give it the model.lora.*, the strategy and, with "
            "strategy=olora, the tasks that it had, or another run.dir"
        )


def check_midway(folder: Path, midway: Midway, stage: str, options: StageOptions) -> None:
    """Raises UserError where the interrupted stage would now take its rows in other batches."""
    batch_size = options.global_batch(stage, distributed.world_size())
    if batch_size != midway.batch_size:
        raise UserError(
            f"{folder}: was interrupted in a stage with {midway.batch_size} pairs a step, which would now have "
            f"{batch_size}; run.dir={folder} resume=force {stage}.batch_size={midway.batch_size} goes on as it was"
        )


def check_steps(folder: Path, midway: Midway, stage: str, steps: int) -> None:
    """Raises UserError where the interrupted stage has come further than it now goes."""
    if midway.steps > steps:
        raise UserError(
            f"{folder}: was interrupted at step {midway.steps} of a stage that would now have {steps}; give it the "
            f"{stage}.epochs and the rows that it had"
        )


def check_batches(folder: Path, before: Mapping[str, int], now: Mapping[str, int], *, force: bool) -> list[str]:
    """Compare the pairs a step of each stage: where no batch size is set they go with the number of ranks.

    Returns:
        What differs, where ``force`` allows it.

    Raises:
        UserError: where they are others.
    """
    changed = [stage for stage, pairs in before.items() if now.get(stage, pairs) != pairs]
    if changed and not force:
        stage = changed[0]
        raise UserError(
            f"{folder}: was trained with {before[stage]} pairs a step in its {stage} stages, which would now have "
            f"{now[stage]}; run.dir={folder} resume=force {stage}.batch_size={before[stage]} goes on as it was, and without "
            "the latter with the new number"
        )
    return [f"pairs a step, {stage}: {before[stage]} -> {now[stage]}" for stage in changed]


def extended_book(before: ScoreBook, tasks: Sequence[str], plan: Sequence[Experience], done: int, strategy: str) -> ScoreBook:
    """Scores of a run that may go on with tasks added to its sequence; the tasks it has met stay as they were.

    Args:
        plan: of the strategy, for all ``tasks``; ``done`` of its entries are behind the run.

    Raises:
        UserError: where ``tasks`` does not begin with those of the run, or the strategy trains on all at once.
    """
    try:
        book = before.extended(tasks)
    except ValueError as error:
        raise UserError(f"sequence.tasks: {error}; a run can only be given further tasks at the end") from error
    if len(book.tasks) > len(before.tasks):
        if len(plan) != len(tasks):
            raise UserError(
                f"sequence.tasks: strategy={strategy} trains on all of its tasks at once, so none can be added; "
                "another run.dir starts anew"
            )
        _fill_rows(book, plan[:done])
    return book


def _fill_rows(book: ScoreBook, done: Sequence[Experience]) -> None:
    """Where models stay in use (STL), their scores stand in the rows of added tasks as well."""
    for metric in book.metrics:
        matrix = book.matrix(metric)
        for experience in done:
            for task in experience.scored if len(experience.rows) > 1 else ():
                book.record_rows(metric, experience.rows, task, matrix[experience.rows[0]][task])
