"""Orthogonal low-rank adaptation: a new block of the adapter a task (O-LoRA; Wang et al. 2023, arXiv 2310.14152)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

import torch

from lifealign.errors import UserError
from lifealign.models.adapter import ADAPTER, named_factors, read_factors, write_factors
from lifealign.models.options import LoraOptions
from lifealign.models.policy import Policy
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, Strategy

_DRAWN = "drawn"  # name of the adapter that lives while a block is drawn


class Overlap(Enum):
    """What is summed of the inner products of rows of A."""

    absolute = "absolute"
    squared = "squared"


@register("strategy", "olora")
class OLoRA(Strategy):
    r"""The run's one adapter has a block of ``model.lora.r`` rows of A and columns of B for each task of the sequence.

    All blocks are added up in every forward pass (eq. 7). Task t trains block t alone; blocks of later tasks stand at
    B = 0 until then, and those of earlier tasks never change again. A task that comes again gets a block of its own. The
    loss gains (eq. 8 and 9)

        orthogonality * sum over layers and i < t of |A_i A_t^T|,    A_i (r, d)

    where |.| is the sum of absolute values, as in the authors' code, whose weights are the paper's, or with
    ``overlap=squared`` the sum of squares that eq. 8 writes. The two need other weights: rows of A begin with inner products
    far below 1, where squares pull tens of times less. The loss also gains ``l2`` times the squared norm of block t, which is
    in the authors' code, as a norm, and not in the paper.

    Past blocks are kept as they are during a run. What it leaves is an ordinary LoRA adapter of rank r times tasks and the
    scaling of a block, and merging that adapter into the base (``launch/export.py --merge``) merges all blocks.
    """

    whole_parameters = "its penalty and its blocks need whole factors at every micro-batch"

    orthogonality: float = 0.5  # lambda_1: weight of the overlap of the new block's A with those before
    overlap: Overlap = Overlap.absolute  # inner products of rows: their absolute values, or their squares, are summed
    l2: float = 0.0  # lambda_2: weight of the squared norm of the new block

    def __post_init__(self) -> None:
        for key in ("orthogonality", "l2"):
            if getattr(self, key) < 0:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be 0 or more")

    def lora(self, options: LoraOptions, tasks: int) -> LoraOptions:
        """As wide as all blocks together; alpha / r stays that of one."""
        self.rank, self.tasks = options.r, tasks
        return replace(options, r=options.r * tasks, alpha=options.alpha * tasks)

    def setup_model(self, policy: Policy, seed: int) -> None:
        """Draw A block by block, so that the first task starts from the very A of ``strategy=seqft``."""
        model = policy.model
        narrow = copy.deepcopy(model.peft_config[ADAPTER])
        narrow.r, narrow.lora_alpha = self.rank, narrow.lora_alpha // self.tasks
        torch.manual_seed(seed)
        for block in range(self.tasks):
            model.add_adapter(_DRAWN, narrow)
            drawn = dict(model.named_parameters())
            for name, factor in named_factors(model):
                if f".{ADAPTER}." in name and "lora_A" in name:
                    value = drawn[name.replace(f".{ADAPTER}.", f".{_DRAWN}.")]
                    self._block(name, factor.data, block).copy_(value.data)
            model.delete_adapter(_DRAWN)

    def setup(self, run: Run) -> None:
        self.task = 0
        for name, factor in named_factors(run.policy.model):
            factor.register_hook(partial(self._own_gradient, name))

    def begin_stage(self, context: Context) -> None:
        self.task = context.task_number
        self.before = read_factors(context.run.policy.model)

    def loss_terms(self, context: Context) -> Mapping[str, torch.Tensor]:
        factors = dict(named_factors(context.run.policy.model))
        overlaps = [self._overlap(a) for name, a in factors.items() if "lora_A" in name]
        sizes = [self._block(name, factor, self.task).square().sum() for name, factor in factors.items()]
        return {"orthogonality": self.orthogonality * torch.stack(overlaps).sum(), "l2": self.l2 * torch.stack(sizes).sum()}

    def end_stage(self, context: Context) -> Sequence[Mapping[str, Any]]:
        """Blocks of other tasks go back to the bit: they have no gradient, but weight decay shrinks them meanwhile."""
        model, values = context.run.policy.model, self.before
        for name, after in read_factors(model).items():
            self._block(name, values[name], self.task).copy_(self._block(name, after, self.task))
        write_factors(model, values, dict.fromkeys(values, 0))
        return ()

    def _overlap(self, a: torch.Tensor) -> torch.Tensor:
        """Sum over past blocks i of |A_i A_t^T|; 0 in the first task."""
        past = a[: self.task * self.rank].detach()
        products = past @ self._block("lora_A", a, self.task).T
        return (products.square() if self.overlap is Overlap.squared else products.abs()).sum()

    def _block(self, name: str, factor: torch.Tensor, block: int) -> torch.Tensor:
        """View of a task's block: rows of an A, columns of a B."""
        return factor.narrow(0 if "lora_A" in name else 1, block * self.rank, self.rank)

    def _own_gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """A factor's gradient with nothing outside the current task's block."""
        own = torch.zeros_like(gradient)
        self._block(name, own, self.task).copy_(self._block(name, gradient, self.task))
        return own
