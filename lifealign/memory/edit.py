"""An adapter as if some tasks had put in more, less, or nothing: the ledger's arithmetic, on files, without a model.

An adapter is its start plus the sum of the updates in its ledger, so a task's share is scaled by adding (s - 1) times its
updates. What later tasks learned on top of it stays as it was learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lifealign.errors import UserError, did_you_mean
from lifealign.memory.bank import Entry, read_ledger, read_update
from lifealign.memory.consolidation import Space
from lifealign.memory.contributions import tasks_of
from lifealign.memory.product import LEFT, RIGHT, Product, best_adapter, scaled, spectral, total
from lifealign.models.adapter import WEIGHTS, read_tensors, saved_name
from lifealign.runtime.files import numbered_folders

Tensors = dict[str, torch.Tensor]


class Edited(NamedTuple):
    """What an edit made."""

    entries: list[Entry]  # that the adapter holds
    factors: Tensors  # by the names of the adapter's file
    truncation_error: float  # share of the whole product that an adapter of this rank cannot hold; 0 in the space of factors


def finished_adapters(run: Path) -> list[Path]:
    """The adapter that each finished task of a run left, in the order of the tasks.

    Raises:
        UserError: where there is none.
    """
    finished = [adapter for task in numbered_folders(run / "tasks") if (adapter := task / "adapter").exists()]
    if not finished:
        raise UserError(f"{run}: no task of this run is finished, so there is no adapter")
    return finished


def task_adapter(run: Path, task: str) -> Path:
    """The adapter that a finished task of a run left.

    Raises:
        UserError: where no finished task has this name.
    """
    by_task = {adapter.parent.name.split("_", 1)[1]: adapter for adapter in finished_adapters(run)}
    if task not in by_task:
        raise UserError(f"{task}: no finished task of this name in {run}{did_you_mean(task, by_task)}")
    return by_task[task]


def edit(run: Path, factors: Mapping[str, float]) -> Edited:
    """The adapter after the last finished task with the updates of some tasks scaled; 0 takes a task back, 1 leaves it.

    Args:
        factors: by the name of the task.

    Raises:
        UserError: for a task that the adapter does not hold, a factor that is not finite or leads to what is not, or memory
            that is damaged.
    """
    finished = finished_adapters(run)
    entries = [entry for entry in read_ledger(run / "memory") if entry["task_number"] < len(finished)]
    for task, factor in factors.items():
        if task not in tasks_of(entries):
            raise UserError(f"{task}: no finished task of this name in {run}{did_you_mean(task, tasks_of(entries))}")
        if not math.isfinite(factor):
            raise UserError(f"{task}={factor}: give a number, such as 0.5")
    held = read_tensors(finished[-1] / WEIGHTS)
    chosen = [entry for entry in entries if factors.get(entry["task"], 1.0) != 1.0]
    if not chosen:
        return Edited(entries, held, 0.0)
    change = _product_change if Space(chosen[0]["space"]) is Space.product else _factor_change
    changed, truncation_error = change(run / "memory", held, chosen, factors)
    if not all(torch.isfinite(tensor).all() for tensor in changed.values()):
        raise UserError(f"{', '.join(f'{task}={factor:g}' for task, factor in factors.items())}: too large for float32")
    return Edited(entries, changed, truncation_error)


def _factor_change(
    folder: Path, held: Tensors, entries: Sequence[Entry], factors: Mapping[str, float]
) -> tuple[Tensors, float]:
    """In float64, so that nothing but the result is rounded."""
    changed = {name: tensor.double() for name, tensor in held.items()}
    for entry in entries:
        for name, update in read_update(folder, entry).items():
            changed[saved_name(name)] += (factors[entry["task"]] - 1) * update.double()
    return {name: tensor.to(held[name].dtype) for name, tensor in changed.items()}, 0.0


def _product_change(
    folder: Path, held: Tensors, entries: Sequence[Entry], factors: Mapping[str, float]
) -> tuple[Tensors, float]:
    """Layer by layer the best adapter of the same rank for the changed product."""
    updates = [(factors[entry["task"]] - 1, read_update(folder, entry)) for entry in entries]
    changed, lost, whole = dict(held), 0.0, 0.0
    for layer in (name.removesuffix(LEFT) for name in entries[0]["tensors"] if name.endswith(LEFT)):
        a_name, b_name = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        a = held[a_name]
        changes = [scaled(Product(u[layer + LEFT], u[layer + RIGHT]).double(), weight) for weight, u in updates]
        wanted = spectral(total([Product(held[b_name], a).double(), *changes]))
        adapter = best_adapter(wanted, a)
        changed[a_name], changed[b_name] = adapter.right.to(a.dtype).contiguous(), adapter.left.to(a.dtype).contiguous()
        lost, whole = lost + wanted.s[len(a) :].square().sum().item(), whole + wanted.s.square().sum().item()
    return changed, math.sqrt(lost / whole) if whole else 0.0
