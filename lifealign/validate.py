"""Check a configuration without training anything: its keys, data and model, and what it will take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from omegaconf import DictConfig
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, build
from lifealign.data.tasks import Task, load_tasks
from lifealign.memory import Space
from lifealign.models.adapter import factor_shapes
from lifealign.models.loading import attach_lora, load_tokenizer, resolve_path
from lifealign.models.options import BaseDtype
from lifealign.runtime import distributed
from lifealign.runtime.terminal import console
from lifealign.strategies.lifealign import LifeAlign

MIB = 2**20
FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes, estimated from shapes; activations are left out, since they depend on the attention implementation."""

    base: int  # a rank's share of the frozen base
    adapter: int  # weights, gradients and optimiser state of the adapter on a rank
    memory: int  # history of consolidated updates, over all ranks
    disk: int  # what the run directory will hold


def validate(composed: DictConfig) -> None:
    """Load rows and tokenizer, build the model without weights, and print what was found.

    Raises:
        UserError: for the first mistake.
    """
    config = build(composed)
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config.sequence, config.data, tokenizer, SIX_DOMAINS)
    config.check_batches({task.name: len(task.train) for task in tasks}, distributed.world_size())
    console.print(_task_table(tasks))
    console.print(_estimate_table(estimate(config, len(tasks))))
    console.print("The configuration is valid; nothing was trained.")


def estimate(config: Config, tasks: int) -> Estimate:
    """Memory and disk of a run, from the shapes of a model without weights."""
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_path(config.model)))
        skeleton.tie_weights()
        base = sum(p.numel() for p in skeleton.parameters())
        model = attach_lora(skeleton, config.strategy.lora(config.model.lora, tasks), seed=config.seed)
    factors = sum(shape.numel() for shape in factor_shapes(model).values())
    ranks, stage = distributed.world_size(), config.zero.stage
    width = torch.finfo(torch.bfloat16).bits // 8 if config.model.dtype is BaseDtype.bfloat16 else FLOAT32
    memory, disk = _history(config, tasks, factors)
    optimizer, gradient = (2 / ranks if stage >= 1 else 2), (1 / ranks if stage >= 2 else 1)
    return Estimate(
        base=int(base * width / (ranks if stage == 3 else 1)),
        adapter=int(factors * FLOAT32 * (1 + gradient + optimizer)),
        memory=memory,
        disk=disk + (tasks + 1 + config.checkpoint.keep) * factors * FLOAT32,
    )


def _history(config: Config, tasks: int, factors: int) -> tuple[int, int]:
    """Bytes of the directions that consolidation keeps at hand, and of the ledger's updates on disk."""
    strategy = config.strategy
    if not isinstance(strategy, LifeAlign):
        return 0, 0
    trained = [stage for stage in ("sft", "preference") if getattr(config, stage).epochs]
    directions = tasks * len({*trained} & {*strategy.consolidate_stages})
    if strategy.memory_rank is not None:
        directions = min(directions, strategy.memory_rank)
    parts = 2 if strategy.space is Space.product else 1  # the difference of two products has twice their rank
    width = getattr(torch, strategy.memory_dtype.value).itemsize
    return directions * parts * factors * width, tasks * len(trained) * parts * factors * width


def _task_table(tasks: list[Task]) -> Table:
    table = Table(title="Tasks")
    for name in ("task", "train", "held out", "dropped", "longest row (tokens)"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in tasks:
        longest = max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in [*task.train, *task.test])
        table.add_row(task.name, str(len(task.train)), str(len(task.test)), str(sum(task.dropped.values())), str(longest))
    return table


def _estimate_table(sizes: Estimate) -> Table:
    table = Table(title="Estimate, without activations")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for what, size in (
        ("base, a rank", sizes.base),
        ("adapter with gradients and optimiser, a rank", sizes.adapter),
        ("long-term memory, all ranks", sizes.memory),
        ("disk", sizes.disk),
    ):
        table.add_row(what, f"{size / MIB:.1f}")
    return table
