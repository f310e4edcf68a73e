"""The step loop of one stage: batches, losses, the check before a step, and the figures of each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from transformers import get_cosine_schedule_with_warmup

from lifealign.data.batch import collate
from lifealign.data.tokenize import Pair
from lifealign.errors import TrainingDiverged
from lifealign.runtime import distributed
from lifealign.runtime.engine import step
from lifealign.runtime.terminal import step_progress
from lifealign.runtime.tracking import Tracker
from lifealign.stages import Outcome, Stage, StageOptions
from lifealign.strategies import Context, Strategy


def plan_batches(lengths: Sequence[int], batch_size: int, epochs: int, generator: torch.Generator) -> list[list[int]]:
    """Indices of the rows of every global batch of a stage, in order.

    Each epoch is shuffled; within stretches of 16 batches rows are sorted by length before they are cut into batches,
    and the batches shuffled again, so that a batch holds rows of like length and little padding. A function of the
    generator's seed alone: not of ranks, micro-batches or time.
    """
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        epoch = []
        for start in range(0, len(order), 16 * batch_size):
            stretch = sorted(order[start : start + 16 * batch_size], key=lambda i: -lengths[i])
            epoch += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches


@dataclass
class Trainer:
    """Trains the policy inside ``engine`` through one stage.

    The loss of a step is the mean over its whole global batch, however that is split: each micro-batch's sum is divided
    by the count of the global batch, which every rank knows, and DeepSpeed's averaging over ranks and micro-batches is
    multiplied away.
    """

    engine: deepspeed.DeepSpeedEngine
    stage: Stage
    options: StageOptions
    strategy: Strategy
    context: Context
    tracker: Tracker
    pad_token_id: int
    log_every: int = 1
    steps_before: int = 0  # optimiser steps of the run before this stage, for the logged step number

    def train(self, pairs: Sequence[Pair]) -> int:
        """Run all epochs over ``pairs``; returns the number of optimiser steps taken."""
        accumulation = self.options.accumulation(self.stage.name, distributed.world_size())
        micro = self.options.micro_batch_size
        batch_size = self.options.global_batch(self.stage.name, distributed.world_size())
        lengths = [self.stage.row(p).length for p in pairs]
        batches = plan_batches(lengths, batch_size, self.options.epochs, self.context.generator("batches"))
        self.engine.train()
        with step_progress(f"{self.context.task.name} {self.stage.name}", len(batches)) as progress:
            for number, indices in enumerate(batches):
                started = time.perf_counter()
                batch = [pairs[i] for i in indices]
                values = self._step(batch, list(self._micro_batches(batch, micro, accumulation)), number)
                seconds = time.perf_counter() - started
                values |= {
                    "pairs_per_second": len(batch) / seconds,
                    "tokens_per_second": values.pop("tokens") / seconds,
                }
                if number % self.log_every == 0 or number + 1 == len(batches):
                    self._log(number, len(batches), values)
                figures = f"loss {values['loss']:.4f}  {values['pairs_per_second']:.1f} pairs/s"
                progress.update(progress.task_ids[0], advance=1, figures=figures)
        return len(batches)

    def _micro_batches(self, batch: list[Pair], micro: int, accumulation: int) -> Iterator[list[Pair]]:
        """This rank's share of a global batch; the last batch of an epoch may leave some of it empty."""
        for turn in range(accumulation):
            start = (turn * distributed.world_size() + distributed.rank()) * micro
            yield batch[start : start + micro]

    def _step(self, batch: list[Pair], shares: list[list[Pair]], number: int) -> dict[str, float]:
        """One optimiser step; returns its figures over the global batch."""
        count = sum(self.stage.size(p) for p in batch)
        upscale = distributed.world_size() * len(shares)
        lr = self.engine.get_lr()[0]
        sums = _Sums()
        for turn, share in enumerate(shares, 1):
            # A share without pairs still runs, with a loss of 0: the other ranks wait in the same collectives.
            pairs = share or batch[:1]
            rows = collate(
                [self.stage.row(p) for p in pairs],
                layout=self.engine.module.layout,
                pad_token_id=self.pad_token_id,
            ).to(distributed.device())
            logps = self.engine(rows)
            outcome = self.stage.outcome(logps, pairs)
            own_loss = outcome.loss / count * (1 if share else 0)
            terms = self.strategy.loss_terms(self.context, rows, logps)
            total = own_loss * upscale + sum(terms.values())
            self.engine.backward(total)
            sums.add(own_loss, terms, outcome, rows.tokens if share else 0, len(share))
            if turn == len(shares):
                values = sums.reduce(len(shares))
                self._check_finite(values, number)
            norm = step(self.engine)
        self._check_finite({"grad_norm": norm}, number, taken=True)
        return {**values, "lr": lr, "grad_norm": norm}

    def _check_finite(self, values: Mapping[str, float], number: int, *, taken: bool = False) -> None:
        """All ranks hold the same values, so all of them stop, or none; ``taken`` says whether the step was."""
        if not all(map(math.isfinite, values.values())):
            bad = next(k for k, v in values.items() if not math.isfinite(v))
            raise TrainingDiverged(
                f"{bad} is {values[bad]} at step {number + 1} of the {self.stage.name} stage of task "
                f"{self.context.task.name}; {'no checkpoint holds' if taken else 'the optimiser has not taken'} this step"
            )

    def _log(self, number: int, total: int, values: Mapping[str, float]) -> None:
        self.tracker.log(
            "step",
            {
                "step": self.steps_before + number + 1,
                "task": self.context.task.name,
                "task_number": self.context.task_number,
                "stage": self.stage.name,
                "stage_step": number + 1,
                "stage_steps": total,
                **values,
            },
        )


class _Sums:
    """Figures of one step, summed over micro-batches here and over ranks in :meth:`reduce`: one exchange a step."""

    def __init__(self) -> None:
        self.loss: list[torch.Tensor] = []
        self.terms: dict[str, torch.Tensor] = {}
        self.figures: dict[str, torch.Tensor] = {}
        self.tokens = self.pairs = 0

    def add(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor], outcome: Outcome, tokens: int, pairs: int) -> None:
        self.loss.append(loss.detach())
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value.detach()
        for name, value in outcome.figures.items():
            # Of a share without pairs nothing counts.
            self.figures[name] = self.figures.get(name, 0) + value[:pairs].sum()
        self.tokens += tokens
        self.pairs += pairs

    def reduce(self, accumulation: int) -> dict[str, float]:
        """Figures over the global batch, the same on every rank; the one host synchronisation of a step."""
        device = self.loss[0].device
        counts = torch.tensor([self.tokens, self.pairs], dtype=torch.float64, device=device)
        named = {"loss": sum(self.loss), **self.terms, **self.figures}
        sums = torch.cat([torch.stack([v.double() for v in named.values()]), counts])
        *totals, tokens, pairs = distributed.sum_over_ranks(sums).tolist()
        values = dict(zip(named, totals, strict=True))
        for name in self.terms:
            values[name] /= accumulation * distributed.world_size()
        for name in self.figures:
            values[name] /= pairs
        values["loss"] += sum(values[name] for name in self.terms)
        return {**values, "tokens": tokens}


def make_optimizer(options: StageOptions, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)


def make_schedule(options: StageOptions, steps: int, optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    return get_cosine_schedule_with_warmup(optimizer, round(options.warmup_share * steps), steps)
