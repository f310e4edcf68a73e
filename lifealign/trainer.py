"""The step loop of one stage: batches, losses, the checks around a step, and the figures of what is logged."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from transformers import get_cosine_schedule_with_warmup

from lifealign.data.batch import Batch, Extent, Row, collate, extent
from lifealign.data.tokenize import Pair
from lifealign.errors import TrainingDiverged, storage_failed
from lifealign.runtime import distributed, watchdog
from lifealign.runtime.engine import read_gradients, skip, step, write_gradients
from lifealign.runtime.terminal import console, step_progress
from lifealign.runtime.tracking import Tracker
from lifealign.stages import Outcome, Stage, StageOptions
from lifealign.strategies import Context, Seen, Strategy

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of this rank works on."""

    pairs: Sequence[Pair]  # at least one
    rows: Batch
    counted: int  # how many of the pairs count: all, or none


@dataclass(frozen=True)
class StepBatch:
    """What one optimiser step of this rank works on, and how much all ranks have together."""

    micro_batches: Sequence[MicroBatch]
    size: int  # what the loss is divided by
    pairs: int
    tokens: int


@dataclass
class Trainer:
    """Trains the policy inside ``engine`` through one stage.

    The loss of a step is the mean over its whole global batch, however that is split: each micro-batch's sum is divided
    by the size of the global batch, which every rank knows, and DeepSpeed's averaging over ranks and micro-batches is
    multiplied away.

    A step fetches from the device once: the sum over ranks of its loss, before the optimiser takes it. The gradient norm,
    known only afterwards, comes with the next step's, and the logged line of a step is written then.
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
    between_steps: Callable[[int], None] | None = None  # called with the steps taken so far; every rank calls it
    asked_to_stop: Callable[[], bool] = lambda: False  # of this rank alone; all learn of it with the next step

    def __post_init__(self) -> None:
        self.stopping = False  # some rank was asked to stop; the same on every rank
        self.skipped = 0  # steps of this stage whose loss was no number
        self._taken = 0  # steps of this stage, those included
        self._norm = torch.zeros((), device=distributed.device())  # of the last of them
        self._window = _Window()
        self._line: dict[str, float] | None = None  # of the last step, where it is logged: all but its gradient norm

    def train(self, pairs: Sequence[Pair], *, taken: int = 0) -> int:
        """Run all epochs over ``pairs``; returns the number of optimiser steps of the stage.

        Args:
            taken: steps that have been taken before, by the run that this one goes on with.

        Raises:
            TrainingDiverged: a loss, a gradient norm or a logged figure is not finite; the same on every rank.
        """
        batch_size = self.options.global_batch(self.stage.name, distributed.world_size())
        read = self.read(pairs)
        lengths = [row.length for _, row in read]
        plan = plan_batches(lengths, batch_size, self.options.epochs, self.context.generator("batches"))
        self._tell_extent([row for _, row in read], plan, batch_size)
        batches = ([read[i] for i in indices] for indices in plan[taken:])
        self.engine.train()
        self._taken, self._window = taken, _Window()
        with (
            step_progress(f"{self.context.task.name} {self.stage.name}", len(plan)) as progress,
            closing(self._collated(batches)) as collated,
        ):
            progress.update(progress.task_ids[0], completed=taken)
            started = time.perf_counter()
            for number, batch in enumerate(collated, taken):
                watchdog.here.say(f"task {self.context.task.name}, {self.stage.name}, step {number + 1}")
                if self.between_steps is not None:
                    self.between_steps(number)
                last = number + 1 == len(plan)
                log_it = number % self.log_every == 0 or last or self.stopping  # one that stops is saved after a line
                loss = self.step(batch, steps=len(plan) if log_it else None)
                seconds = time.perf_counter() - started
                started += seconds
                figures = f"loss {loss:.4f}  {batch.pairs / seconds:.1f} pairs/s"
                progress.update(progress.task_ids[0], advance=1, figures=figures)
        self._fetch()
        return len(plan)

    @property
    def between_lines(self) -> bool:
        """Whether the last step taken was one whose line is logged, so that no figures wait for the next line."""
        return not self._window.losses

    def write_line(self) -> None:
        """Write the line of the last step now, not with the next step. Call on every rank, ``between_lines``."""
        self._fetch()

    def _tell_extent(self, rows: Sequence[Row], plan: Sequence[Sequence[int]], batch_size: int) -> None:
        """Say in the log how much this stage computes, and how much of that is padding."""
        layout, micro = self.engine.module.layout, self.options.micro_batch_size
        shares = (batch[i : i + micro] for batch in plan for i in range(0, len(batch), micro))
        extents = [extent([rows[i] for i in share], layout) for share in shares]
        whole = Extent(sum(e.tokens for e in extents), sum(e.positions for e in extents))
        log.info(
            f"{self.stage.name}: {whole.tokens:,} tokens in {len(plan):,} batches of {batch_size} pairs, "
            f"rows {layout.value}, {whole.positions:,} positions computed, {100 * whole.padding:.1f} % padding"
        )

    def read(self, pairs: Sequence[Pair]) -> list[tuple[Pair, Row]]:
        """Each pair with what the policy reads of it in this stage."""
        return [(pair, self.engine.module.prefixed(self.stage.row(pair))) for pair in pairs]

    def _collated(self, batches: Iterable[Sequence[tuple[Pair, Row]]]) -> Generator[StepBatch, None, None]:
        """The batches in order; a second thread collates each while the step before it is taken, and none earlier."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as thread:
            coming: Future[StepBatch] | None = None
            for batch in batches:
                due, coming = coming, thread.submit(self.collate, batch)
                if due is not None:
                    yield due.result()
            if coming is not None:
                yield coming.result()

    def collate(self, batch: Sequence[tuple[Pair, Row]]) -> StepBatch:
        """This rank's micro-batches of a global batch, on the host; the last batch of an epoch may leave some empty.

        Args:
            batch: pairs that have been :meth:`read`; at least one, and at most as many as an optimiser step sees.
        """
        layout, micro, ranks = self.engine.module.layout, self.options.micro_batch_size, distributed.world_size()
        micro_batches = []
        for turn in range(self.options.accumulation(self.stage.name, ranks)):
            start = (turn * ranks + distributed.rank()) * micro
            share = batch[start : start + micro]
            # A share without pairs still runs, with a loss of 0: the other ranks wait in the same collectives.
            pairs, rows = zip(*(share or batch[:1]), strict=True)
            collated = collate(rows, layout=layout, pad_token_id=self.pad_token_id)
            micro_batches.append(MicroBatch(pairs, collated, counted=len(share)))
        size = sum(self.stage.size(pair) for pair, _ in batch)
        tokens = extent([row for _, row in batch], layout).tokens
        return StepBatch(micro_batches, size, len(batch), tokens)

    def step(self, batch: StepBatch, *, steps: int | None = None) -> float:
        """Take one optimiser step; returns the loss over the global batch.

        Args:
            steps: how many the stage has, where this one is to be logged.

        Raises:
            TrainingDiverged: this step's loss, or what the step before left, is not finite; this step is not taken.
                With ``max_skipped_steps`` so many steps of a stage are left out instead, where it is their own loss.
        """
        lr, window = self.engine.get_lr()[0], self._window.copy()
        own_losses, pair_losses = [], []
        for turn, micro_batch in enumerate(batch.micro_batches, 1):
            own_loss, of_pairs = self._backward(micro_batch, batch)
            own_losses.append(own_loss)
            pair_losses.append(of_pairs)
            if turn == len(batch.micro_batches):
                loss, *sums = self._fetch(torch.stack(own_losses).sum(), *(self._window.sums() if steps is not None else ()))
                if not math.isfinite(loss):
                    rows = _culprits(batch, own_losses, pair_losses)
                    if self.skipped < self.options.max_skipped_steps:
                        self._skip(loss, rows, window)
                        return loss
                    self._check_finite({"loss": loss}, self._taken + 1, rows=rows)
                self._transform_gradients()
            norm = step(self.engine)
        assert norm is not None, "the last micro-batch of a step ends it"
        self._taken, self._norm = self._taken + 1, norm
        self._window.close_step(batch, loss)
        if steps is not None:
            self._line = {"stage_steps": steps, **self._window.means(sums), "lr": lr}
            self._window = _Window()
        return loss

    def _skip(self, loss: float, rows: str, window: _Window) -> None:
        """Leave out the step whose backward passes are done; its figures are dropped from those of the window."""
        skip(self.engine)
        self._taken, self.skipped, self._window = self._taken + 1, self.skipped + 1, window
        where = {"step": self.steps_before + self._taken, "task": self.context.task.name, "stage": self.stage.name}
        self.tracker.log("skipped", {**where, "stage_step": self._taken, "loss": loss, "skipped": self.skipped, "rows": rows})
        line = (
            f"step {self._taken} of the {self.stage.name} stage of task {self.context.task.name} is skipped: loss {loss}{rows}"
        )
        log.warning(line)
        console.print(f"{line}; {self.skipped} of {self.options.max_skipped_steps}", markup=False, highlight=False)

    def _backward(self, micro_batch: MicroBatch, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a micro-batch's gradient; returns its part of the loss over the global batch, () float64, and the stage's
        losses of its pairs, (pairs,); detached."""
        upscale = distributed.world_size() * len(batch.micro_batches)
        rows = micro_batch.rows.to(distributed.device())
        logps = self.engine(rows)
        outcome = self.stage.outcome(logps, micro_batch.pairs)
        seen = Seen(micro_batch.pairs, rows, logps, outcome.losses)
        own_loss, terms = self._loss(seen, micro_batch, batch)
        self.engine.backward(own_loss * upscale + sum(terms.values()))
        shares = {name: value.detach().double() / upscale for name, value in terms.items()}
        self._window.add(shares, outcome, micro_batch.counted)
        return own_loss.detach().double() + sum(shares.values()), outcome.losses.detach()

    def _loss(self, seen: Seen, micro_batch: MicroBatch, batch: StepBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A micro-batch's part of the stage's loss, and the strategy's terms on the scale of the whole loss."""
        weights = self.strategy.pair_weights(self.context, seen)
        losses = seen.losses if weights is None else seen.losses * weights
        counts = 1 if micro_batch.counted else 0
        upscale = distributed.world_size() * len(batch.micro_batches)
        of_pairs = self.strategy.pair_terms(self.context, seen)
        terms = {name: values.sum() / batch.pairs * counts * upscale for name, values in of_pairs.items()}
        return losses.sum() / batch.size * counts, {**terms, **self.strategy.loss_terms(self.context)}

    def _transform_gradients(self) -> None:
        """Let the strategy change the whole averaged gradient of a step, where it has anything to change."""
        if self.strategy.transforms_gradients:
            changed = self.strategy.transform_gradients(self.context, read_gradients(self.engine))
            write_gradients(self.engine, changed)

    def _fetch(self, *values: torch.Tensor) -> list[float]:
        """Sums over ranks of scalars, as numbers: one exchange, and the one host synchronisation of a step.

        The gradient norm of the step before comes with them; with it that step is checked, and logged where it is to be. So
        does whether any rank was asked to stop, and whether the lines of earlier steps could be written.

        Raises:
            TrainingDiverged: the norm, or a figure of the step's line, is not finite.
            StorageFailed: a line could not be written.
        """
        own_norm = self._norm.double() / distributed.world_size()  # every rank knows the same norm
        asked = torch.full((), float(self.asked_to_stop()), dtype=torch.float64, device=distributed.device())
        broken = torch.full_like(asked, float(self.tracker.failure is not None))
        scalars = torch.stack([value.double() for value in (own_norm, asked, broken, *values)])
        with watchdog.here.waiting():
            norm, asked_ranks, broken_ranks, *sums = distributed.sum_over_ranks(scalars).tolist()
        if broken_ranks:
            raise storage_failed(self.tracker.folder, self.tracker.failure or OSError("rank 0 says why"))
        self.stopping = self.stopping or asked_ranks > 0
        line, self._line = self._line, None
        self._check_finite({"grad_norm": norm, **(line or {})}, self._taken, taken=True)
        if line is not None:
            self._log({**line, "grad_norm": norm})
        return sums

    def _check_finite(self, values: Mapping[str, float], number: int, *, taken: bool = False, rows: str = "") -> None:
        """All ranks hold the same values, so all of them stop, or none; ``taken`` says whether step ``number`` was."""
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            raise TrainingDiverged(
                f"{bad} is {values[bad]} at step {number} of the {self.stage.name} stage of task "
                f"{self.context.task.name}{rows}; {'no checkpoint holds' if taken else 'the optimiser has not taken'} this step"
            )

    def _log(self, values: Mapping[str, float]) -> None:
        """Write the line of the last step taken."""
        self.tracker.log(
            "step",
            {
                "step": self.steps_before + self._taken,
                "task": self.context.task.name,
                "task_number": self.context.task_number,
                "stage": self.stage.name,
                "stage_step": self._taken,
                **values,
            },
        )


NAMED_ROWS = 5
"""Most rows of a rank that a message names."""


def _culprits(batch: StepBatch, own_losses: Sequence[torch.Tensor], pair_losses: Sequence[torch.Tensor]) -> str:
    """Which ranks and rows a loss comes from that is no number; the same on every rank, and so called on every rank.

    Where a strategy's term is to blame and not a pair, the rows are those of its whole micro-batch.
    """
    own: list[str] = []
    for micro_batch, loss, losses in zip(batch.micro_batches, own_losses, pair_losses, strict=True):
        if not torch.isfinite(loss):
            finite = torch.isfinite(losses).tolist()
            bad = [pair.id for pair, is_finite in zip(micro_batch.pairs, finite, strict=True) if not is_finite]
            own += bad or [pair.id for pair in micro_batch.pairs]
    told = []
    for rank, ids in enumerate(distributed.gather_objects(own)):
        if ids:
            more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
            told.append(f"rank {rank}: {', '.join(ids[:NAMED_ROWS])}{more}")
    return f" ({'; '.join(told)})"


class _Window:
    """The steps since the last logged one: sums of this rank's figures on the device, and what every rank knows."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.terms: dict[str, torch.Tensor] = {}  # () float64 each, as are the figures
        self.figures: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []  # a step each
        self.pairs = self.tokens = 0

    def copy(self) -> _Window:
        """The window as it is now; sums are replaced by what is added, and never changed."""
        same = copy.copy(self)
        same.terms, same.figures, same.losses = dict(self.terms), dict(self.figures), list(self.losses)
        return same

    def add(self, terms: Mapping[str, torch.Tensor], outcome: Outcome, counted: int) -> None:
        """Take in a micro-batch: its shares of a step's terms, and the figures of its pairs where they count."""
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value
        for name, value in outcome.figures.items():
            self.figures[name] = self.figures.get(name, 0) + value[:counted].sum(dtype=torch.float64)

    def close_step(self, batch: StepBatch, loss: float) -> None:
        """A step is taken whose micro-batches have been added."""
        self.losses.append(loss)
        self.pairs += batch.pairs
        self.tokens += batch.tokens

    def sums(self) -> list[torch.Tensor]:
        """Terms, then figures, to be summed over ranks; in the same order on every rank."""
        return [*self.terms.values(), *self.figures.values()]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Figures of the window from its sums over ranks: losses and terms are means over steps, the others over pairs."""
        seconds = time.perf_counter() - self.started
        of_terms, of_figures = sums[: len(self.terms)], sums[len(self.terms) :]
        return {
            "loss": math.fsum(self.losses) / len(self.losses),
            **{name: value / len(self.losses) for name, value in zip(self.terms, of_terms, strict=True)},
            **{name: value / self.pairs for name, value in zip(self.figures, of_figures, strict=True)},
            "pairs_per_second": self.pairs / seconds,
            "tokens_per_second": self.tokens / seconds,
        }


def make_optimizer(options: StageOptions, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)


def make_schedule(options: StageOptions, steps: int, optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    return get_cosine_schedule_with_warmup(optimizer, round(options.warmup_share * steps), steps)
