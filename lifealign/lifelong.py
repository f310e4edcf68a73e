"""The task loop: plan, train, consolidate, evaluate, commit; what a checkpoint holds, and where an interrupted run goes on."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError

from lifealign.assembly import make_evaluator, make_policy
from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, settings_hash
from lifealign.data.tasks import Task, load_tasks
from lifealign.data.tokenize import Pair
from lifealign.errors import Interrupted, storage_failed
from lifealign.evaluation.dashboard import show_task
from lifealign.evaluation.scores import ScoreBook
from lifealign.models.adapter import read_added, read_factors, save_adapter, write_added, write_factors
from lifealign.models.loading import load_tokenizer, pad_token_id
from lifealign.models.scoring import ReferenceLogps
from lifealign.resuming import (
    Midway,
    Tensors,
    changed_settings,
    check_base,
    check_batches,
    check_midway,
    check_rows,
    check_steps,
    check_strategy,
    check_weights,
    extended_book,
    refuse_a_lost_run,
    take_up_settings,
)
from lifealign.runtime import checkpoint, distributed, watchdog
from lifealign.runtime.checkpoint import Checkpoint, checkpoint_name
from lifealign.runtime.engine import deepspeed_config, inference_engine, training_engine
from lifealign.runtime.files import numbered_folders, write_json, write_json_lines
from lifealign.runtime.optimizer import read_optimizer, write_optimizer
from lifealign.runtime.options import Resume
from lifealign.runtime.randomness import read_rng, write_rng
from lifealign.runtime.signals import StopSignals, stopping_between_batches
from lifealign.runtime.terminal import console
from lifealign.runtime.timing import Timing
from lifealign.runtime.tracking import Tracker
from lifealign.stages import PreferenceStage, Stage, StageOptions, SupervisedStage
from lifealign.strategies import Context, Run, State
from lifealign.trainer import Trainer, make_optimizer, make_schedule

log = logging.getLogger(__name__)

PHASES = ("sft", "preference", "commit")
"""A task's phases, each ending in a checkpoint. ``commit`` updates the strategy, evaluates and writes what is left."""


@dataclass
class Position:
    """The next phase to run."""

    task: int = 0  # of the strategy's plan
    phase: str = PHASES[0]

    def advance(self) -> None:
        following = PHASES.index(self.phase) + 1
        if following == len(PHASES):
            self.task, self.phase = self.task + 1, PHASES[0]
        else:
            self.phase = PHASES[following]


class Lifelong:
    """A run: one model, a sequence of tasks, one strategy.

    Args:
        config: the whole configuration.
        folder: the run directory, the same on every rank.
        tracker: where numbers go.
        settings: the same configuration as plain values, as ``config.yaml`` holds it.
        signals: what asks the run to end.
    """

    def __init__(
        self, config: Config, folder: Path, tracker: Tracker, settings: Mapping[str, Any], signals: StopSignals | None = None
    ) -> None:
        self.config, self.folder, self.tracker, self.signals = config, folder, tracker, signals or StopSignals()
        self.settings = settings
        self.timing = Timing()
        with self.timing.of("loading"):
            self.tokenizer = load_tokenizer(config.model)
            self.tasks = load_tasks(config.sequence, config.data, self.tokenizer, SIX_DOMAINS)
            config.check_batches({task.name: len(task.train) for task in self.tasks}, distributed.world_size())
            self.policy = make_policy(config, self.tasks)
        self.reference = ReferenceLogps(config.cache)
        self.stages: dict[str, Stage] = {
            stage.name: stage for stage in (SupervisedStage(), PreferenceStage(config.objective, self.reference))
        }
        self.strategy = config.strategy
        self.plan = self.strategy.plan(self.tasks)
        self.run_info = Run(
            policy=self.policy,
            folder=folder,
            seed=config.seed,
            settings_hash=settings_hash(settings),
            tokenizer=self.tokenizer,
            stages=self.stages,
            batch_size=config.evaluation.batch_size,
        )
        self.strategy.setup(self.run_info)
        self.evaluator = make_evaluator(config, self.policy, self.reference, self.tokenizer)
        self.book = ScoreBook([task.name for task in self.tasks])
        self.position = Position()
        self.steps = 0
        self._between_phases = Checkpoint("", {}, {})  # what one holds that is made there, as it was last
        self._midway: Midway | None = None  # of the stage to come, where it was interrupted

    def run(self) -> None:
        """Go on from the newest checkpoint, or start, and run every phase that is left.

        Raises:
            Interrupted: on every rank, once all that was done is saved, where any rank received a signal that asks for it.
        """
        with self.timing.of("resuming"):
            self._restore()
        while self.position.task < len(self.plan):
            self._stop_if_asked()
            number, phase = self.position.task, self.position.phase
            watchdog.here.say(f"task {self.plan[number].task.name}, {phase}")
            log.info("task %d of %d (%s): %s", number + 1, len(self.plan), self.plan[number].task.name, phase)
            if phase == PHASES[0]:
                self.strategy.begin_task(self._context(number))
            if phase == "commit":
                self._commit(number)
            else:
                self._train(number, self.stages[phase])
            self.position.advance()
            with self.timing.of("saving"):
                self._save()

    def _stop_if_asked(self) -> None:
        received = self.signals.anywhere()
        if received is not None:
            where = f"task {self.position.task + 1}, {self.position.phase}"
            text = f"{self.folder}: stopped by {Signals(received).name} and saved ({where}); the same command goes on"
            raise Interrupted(text, received)

    # Training

    def _context(self, number: int, stage: str = "") -> Context:
        return Context(self.run_info, self.plan[number].task, number, stage)

    def _train(self, number: int, stage: Stage) -> None:
        """One stage of a task: a fresh engine, its steps, and what the strategy makes of the update."""
        options: StageOptions = getattr(self.config, stage.name)
        midway, self._midway = self._midway, None  # also where the stage is now left out: it is not the next one's
        if options.epochs == 0:
            return
        context = self._context(number, stage.name)
        pairs = self.strategy.train_data(context, context.task.train)
        self.strategy.begin_stage(context)
        if midway is not None:  # before there is an engine, which copies the weights
            self._take_up_weights(midway)
        torch.manual_seed(context.generator("dropout").initial_seed() % 2**32 + distributed.rank())
        accumulation = options.accumulation(stage.name, distributed.world_size())
        engine_config = deepspeed_config(
            self.config.zero,
            micro_batch_size=options.micro_batch_size,
            accumulation=accumulation,
            max_grad_norm=options.max_grad_norm,
        )
        steps = options.steps(len(pairs), stage.name, distributed.world_size())
        if midway is not None:
            check_steps(self.folder, midway, stage.name, steps)
        with training_engine(
            self.policy, engine_config, partial(make_optimizer, options), partial(make_schedule, options, steps)
        ) as engine:
            if stage.name == "preference" and self.config.objective.needs_reference:
                with self.timing.of("reference"), stopping_between_batches(self._stop_if_asked):
                    kept = self.strategy.kept_pairs()
                    self._ensure_reference(engine, [*pairs, *kept], context.task, log_it=midway is None)
            trainer = Trainer(
                engine=engine,
                stage=stage,
                options=options,
                strategy=self.strategy,
                context=context,
                tracker=self.tracker,
                pad_token_id=pad_token_id(self.tokenizer),
                log_every=self.config.tracking.log_every,
                steps_before=self.steps,
                asked_to_stop=lambda: self.signals.received is not None,
            )
            taken = 0 if midway is None else midway.steps
            trainer.skipped = 0 if midway is None else midway.skipped
            trainer.between_steps = self._between_steps(trainer, taken)
            if midway is not None:
                self._take_up_progress(engine, midway)
            with self.timing.of(stage.name):
                self.steps += trainer.train(pairs, taken=taken)
        with self.timing.of("consolidation"), self._told():
            for record in self.strategy.end_stage(context):
                self.tracker.log("consolidation", {"task": context.task.name, "stage": stage.name, **record})

    def _between_steps(self, trainer: Trainer, saved: int) -> Callable[[int], None]:
        """What is done before each step of a stage: a checkpoint where one is due, and a look at old tasks.

        Args:
            saved: steps of the stage that a checkpoint holds already.
        """
        every = self.config.checkpoint.every

        def between(steps: int) -> None:
            nonlocal saved
            due = trainer.stopping or (every is not None and steps - saved >= every)
            if due and steps > saved and trainer.between_lines:
                with self.timing.of("saving"):
                    self._save_midway(trainer, steps)
                saved = steps
                self._stop_if_asked()
            self._probe(trainer.engine, trainer.context, steps)

        return between

    def _take_up_weights(self, midway: Midway) -> None:
        write_factors(self.policy.model, midway.parts["adapter"], dict.fromkeys(midway.parts["adapter"], 0))
        write_added(self.policy, midway.parts["added"])

    def _take_up_progress(self, engine: deepspeed.DeepSpeedEngine, midway: Midway) -> None:
        write_optimizer(engine, midway.parts["optimizer"])
        for _ in range(midway.steps):  # a schedule is a function of the number of steps
            engine.lr_scheduler.step()
        self.strategy.load_stage_state(State(midway.strategy, midway.parts["strategy"]))
        write_rng(midway.parts["rng"])

    def _probe(self, engine: torch.nn.Module, context: Context, steps: int) -> None:
        """Every few steps, look at how the tasks fare that were learned before this one (the stability gap)."""
        every = self.config.evaluation.probe_every
        if every is None or steps % every:
            return
        learned = {number for earlier in self.plan[: context.task_number] for number in earlier.scored}
        still = learned.intersection(self.plan[context.task_number].scored)  # not by models of their own (STL)
        for task in (self.tasks[number] for number in sorted(still)):
            where = {"step": self.steps + steps, "task": context.task.name, "stage": context.stage, "on": task.name}
            self.tracker.log("probe", {**where, **self.evaluator.probe(engine, task)})

    def _ensure_reference(self, engine: torch.nn.Module, pairs: Sequence[Pair], task: Task, *, log_it: bool) -> None:
        counts = self.reference.ensure(
            engine,
            self.policy,
            pairs,
            batch_size=self.config.evaluation.batch_size,
            pad_token_id=pad_token_id(self.tokenizer),
        )
        if log_it:  # a stage that goes on has its line
            self.tracker.log("reference", {"task": task.name, **counts._asdict()})

    # Evaluation and commit

    def _commit(self, number: int) -> None:
        """Close a task: the strategy's end of task, scores on what was seen, and the task's folder."""
        experience = self.plan[number]
        task = experience.task
        self.strategy.end_task(self._context(number))
        predictions: list[dict[str, Any]] = []
        scores: dict[str, dict[str, float]] = {}
        # Nothing of it need be saved to stop within: this phase began with a checkpoint, and is begun again.
        stopping = stopping_between_batches(self._stop_if_asked)
        with self.timing.of("evaluation"), stopping, inference_engine(self.policy, self.config.zero) as module:
            for other, rows in experience.scores(len(self.tasks), forward=self.config.evaluation.forward):
                on = self.tasks[other]
                result = self.evaluator.evaluate(module, on)
                scores[on.name] = result.scores
                predictions += [{"task": on.name, **row} for row in result.predictions]
                for metric, value in result.scores.items():
                    self.book.record_rows(metric, rows, other, value)
                where = {"after": task.name, "on": on.name}
                self.tracker.log("reference", {**where, **result.reference._asdict()})
                self.tracker.log("evaluation", {**where, **result.scores})
                if result.judged is not None:
                    self.tracker.log("judge", {**where, **result.judged.counts()})
        with self.timing.of("tracking"):
            show_task(self.tracker, self.book, self.config.objective, predictions)
        left = self.folder / "tasks" / f"{number + 1:02d}_{task.name}"
        with self.timing.of("saving"):
            for folder in (left, self.folder):
                with self._writing():
                    save_adapter(self.policy, folder / "adapter")
            with self._writing():
                if distributed.is_main():
                    write_json_lines(left / "predictions.jsonl", predictions)
                    write_json(left / "scores.json", {"after": task.name, "scores": scores})
                    write_json(self.folder / "scores.json", self.scores())

    def scores(self) -> dict[str, Any]:
        """``scores.json``."""
        return self.book.to_json(self.config.strategy.name, self.config.objective.name, self.config.seed)

    # Checkpoints

    def _save(self) -> None:
        """Write a checkpoint of everything that the phases to come depend on."""
        self._between_phases = self._state()
        self._write_checkpoint()

    def _state(self) -> Checkpoint:
        """All that the phases to come depend on. Call on every rank."""
        strategy = self.strategy.state_dict()
        tensors = _prefixed(adapter=read_factors(self.policy.model), added=read_added(self.policy), strategy=strategy.tensors)
        values = {
            "task": self.position.task,
            "phase": self.position.phase,
            "steps": self.steps,
            "scores": self.scores(),
            "strategy": strategy.values,
            "data": {task.name: task.data_hash for task in self.tasks},
            "batch_sizes": self._batch_sizes(),
            "base": self.reference.base,
        }
        return Checkpoint("", values, tensors, strategy.files)

    def _batch_sizes(self) -> dict[str, int]:
        """Pairs a step of each stage that is trained, over all ranks."""
        options = {name: getattr(self.config, name) for name in self.stages}
        return {name: own.global_batch(name, distributed.world_size()) for name, own in options.items() if own.epochs}

    def _save_midway(self, trainer: Trainer, steps: int) -> None:
        """Write a checkpoint within a stage: the one before the stage, and how far the stage has come."""
        trainer.write_line()
        strategy = self.strategy.stage_state()
        parts = _prefixed(
            adapter=read_factors(self.policy.model),
            added=read_added(self.policy),
            optimizer=read_optimizer(trainer.engine),
            rng=read_rng(),
            strategy=strategy.tensors,
        )
        batch_size = trainer.options.global_batch(trainer.stage.name, distributed.world_size())
        midway = {"steps": steps, "batch_size": batch_size, "strategy": strategy.values, "skipped": trainer.skipped}
        self._write_checkpoint(midway, parts)

    def _write_checkpoint(self, midway: Mapping[str, Any] | None = None, parts: Tensors | None = None) -> None:
        with self._writing():
            if not distributed.is_main():
                return
            before = self._between_phases
            metrics = {"metrics_bytes": self.tracker.position(), "metrics_sha256": self.tracker.digest()}
            volatile = {"timing": self.timing.now(), **metrics}
            number = self.position.task * len(PHASES) + PHASES.index(self.position.phase)
            new = Checkpoint(
                checkpoint_name(number, 0 if midway is None else midway["steps"]),
                {**before.state, **volatile, "midway": midway},
                {**before.tensors, **_prefixed(reference=self.reference.state_dict(), midway=parts or {})},
                before.files,
            )
            checkpoint.save(self.folder / "checkpoints", new, keep=self.config.checkpoint.keep)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, rank 0 writes; where it cannot, all ranks end together. What ranks exchange there they exchange first."""
        with self._told():
            with distributed.failing_together(OSError):
                self.tracker.check()
            with distributed.failing_together(OSError, SafetensorError):
                yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Inside, every rank meets the same errors of storage, which are told in a line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise storage_failed(self.folder, error) from error

    def _restore(self) -> None:
        """Take up the newest checkpoint, where there is one."""
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is None:
            refuse_a_lost_run(self.folder)
            self.tracker.rewind(0)  # a run that never came to its first checkpoint starts over
            self._between_phases = self._state()
            return
        state, parts = found.state, _by_prefix(found.tensors)
        force = self.config.resume is Resume.force
        check_strategy(self.folder, state["scores"]["strategy"], self.strategy.name)
        forced = check_rows(self.folder, self.tasks, state["data"], force=force)
        self.position = Position(state["task"], state["phase"])
        if state["midway"] is not None:
            self._midway = Midway(**state["midway"], parts=_by_prefix(parts["midway"]))
            check_midway(self.folder, self._midway, self.position.phase, getattr(self.config, self.position.phase))
        if self.position.task < len(self.plan):
            forced += check_batches(self.folder, state.get("batch_sizes", {}), self._batch_sizes(), force=force)
        self.steps = state["steps"]
        before = ScoreBook.from_json(state["scores"])
        self.book = extended_book(before, self.book.tasks, self.plan, self.position.task, self.strategy.name)
        self.timing.go_on(state["timing"])
        check_weights(self.folder, self.policy, parts["adapter"], parts["added"])
        write_factors(self.policy.model, parts["adapter"], dict.fromkeys(parts["adapter"], 0))
        write_added(self.policy, parts["added"])
        base = state.get("base")
        other: list[str] = []
        if base is not None and self.position.task < len(self.plan):
            other = check_base(self.folder, base, self.reference.identify(self.policy), force=force)
        forced += other
        if not other:  # another base says other things of the same pairs
            self.reference.load_state_dict(parts["reference"])
        with self._told():
            self.strategy.load_state_dict(State(state["strategy"], parts["strategy"], found.files))
        if force and self.position.phase == PHASES[-1] and self.config.objective.needs_reference:
            # No stage comes before the strategy is asked what it makes of the task: of its pairs and base as they are now.
            stopping = stopping_between_batches(self._stop_if_asked)
            with stopping, inference_engine(self.policy, self.config.zero) as module:
                task = self.plan[self.position.task].task
                self._ensure_reference(module, task.train, task, log_it=False)
        self.tracker.rewind(state["metrics_bytes"], state["metrics_sha256"])
        between_phases = {name: tensor for name, tensor in found.tensors.items() if not name.startswith("midway/")}
        self._between_phases = replace(found, state={**state, "base": self.reference.base or base}, tensors=between_phases)
        with self._writing():
            if distributed.is_main():
                if self.position.task < len(self.plan):
                    take_up_settings(self.folder, self.settings, forced)
                elif changed_settings(self.folder, self.settings):
                    line = f"{self.folder}: nothing is left to do, so its settings stay what it was trained with"
                    console.print(line, markup=False)
                ahead = numbered_folders(self.folder / "tasks")[self.position.task :]
                for folder in ahead:  # of a checkpoint that was damaged: they will be made again
                    shutil.rmtree(folder)
        log.info("resumed at task %d, %s, from checkpoint %s", self.position.task + 1, self.position.phase, found.name)


def _prefixed(**parts: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}/{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}


def _by_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        parts[prefix][rest] = tensor
    return parts
