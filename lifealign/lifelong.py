"""The task loop: plan, train, consolidate, evaluate, commit; and where an interrupted run goes on."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, settings_hash
from lifealign.data.tasks import Task, load_tasks
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.evaluation.evaluate import Evaluator
from lifealign.evaluation.judge import Judge, judge_folder
from lifealign.evaluation.scores import ScoreBook
from lifealign.models.adapter import factor_shapes, read_added, read_factors, save_adapter, write_added, write_factors
from lifealign.models.loading import attach_lora, enable_gradient_checkpointing, load_base, load_tokenizer, pad_token_id
from lifealign.models.policy import Policy, choose_head, choose_layout, choose_operations
from lifealign.models.scoring import ReferenceLogps, pair_row
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.engine import deepspeed_config, inference_engine, training_engine
from lifealign.runtime.files import write_json, write_json_lines
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
    """

    def __init__(self, config: Config, folder: Path, tracker: Tracker, settings: Mapping[str, Any]) -> None:
        self.config, self.folder, self.tracker = config, folder, tracker
        self.timing: dict[str, float] = defaultdict(float)
        with self._timed("loading"):
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

    def run(self) -> None:
        """Go on from the newest checkpoint, or start, and run every phase that is left."""
        self._restore()
        while self.position.task < len(self.plan):
            number, phase = self.position.task, self.position.phase
            log.info("task %d of %d (%s): %s", number + 1, len(self.plan), self.plan[number].task.name, phase)
            if phase == PHASES[0]:
                self.strategy.begin_task(self._context(number))
            if phase == "commit":
                self._commit(number)
            else:
                self._train(number, self.stages[phase])
            self.position.advance()
            with self._timed("saving"):
                self._save()

    # Training

    def _context(self, number: int, stage: str = "") -> Context:
        return Context(self.run_info, self.plan[number].task, number, stage)

    def _train(self, number: int, stage: Stage) -> None:
        """One stage of a task: a fresh engine, its steps, and what the strategy makes of the update."""
        options: StageOptions = getattr(self.config, stage.name)
        if options.epochs == 0:
            return
        context = self._context(number, stage.name)
        pairs = self.strategy.train_data(context, context.task.train)
        self.strategy.begin_stage(context)
        torch.manual_seed(context.generator("dropout").initial_seed() % 2**32 + distributed.rank())
        accumulation = options.accumulation(stage.name, distributed.world_size())
        engine_config = deepspeed_config(
            self.config.zero,
            micro_batch_size=options.micro_batch_size,
            accumulation=accumulation,
            max_grad_norm=options.max_grad_norm,
        )
        steps = options.steps(len(pairs), stage.name, distributed.world_size())
        with training_engine(
            self.policy, engine_config, partial(make_optimizer, options), partial(make_schedule, options, steps)
        ) as engine:
            if stage.name == "preference":
                with self._timed("reference"):
                    self._ensure_reference(engine, pairs, context.task)
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
                between_steps=partial(self._probe, engine, context),
            )
            with self._timed(stage.name):
                self.steps += trainer.train(pairs)
        with self._timed("consolidation"):
            for record in self.strategy.end_stage(context):
                self.tracker.log("consolidation", {"task": context.task.name, "stage": stage.name, **record})

    def _probe(self, engine: torch.nn.Module, context: Context, steps: int) -> None:
        """Every few steps, look at how the tasks fare that were learned before this one (the stability gap)."""
        every = self.config.evaluation.probe_every
        if every is None or steps % every:
            return
        learned = {number for earlier in self.plan[: context.task_number] for number in earlier.scored}
        for task in (self.tasks[number] for number in sorted(learned)):
            where = {"step": self.steps + steps, "task": context.task.name, "stage": context.stage, "on": task.name}
            self.tracker.log("probe", {**where, **self.evaluator.probe(engine, task)})

    def _ensure_reference(self, engine: torch.nn.Module, pairs: Sequence[Pair], task: Task) -> None:
        counts = self.reference.ensure(
            engine,
            self.policy,
            pairs,
            batch_size=self.config.evaluation.batch_size,
            pad_token_id=pad_token_id(self.tokenizer),
        )
        self.tracker.log("reference", {"task": task.name, **counts._asdict()})

    # Evaluation and commit

    def _commit(self, number: int) -> None:
        """Close a task: the strategy's end of task, scores on what was seen, and the task's folder."""
        experience = self.plan[number]
        task = experience.task
        self.strategy.end_task(self._context(number))
        predictions: list[dict[str, Any]] = []
        scores: dict[str, dict[str, float]] = {}
        with self._timed("evaluation"), inference_engine(self.policy, self.config.zero) as module:
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
        left = self.folder / "tasks" / f"{number + 1:02d}_{task.name}"
        with self._timed("saving"):
            save_adapter(self.policy, left / "adapter")
            save_adapter(self.policy, self.folder / "adapter")
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
        strategy = self.strategy.state_dict()
        tensors = {f"adapter/{k}": v for k, v in read_factors(self.policy.model).items()}
        tensors |= {f"added/{k}": v for k, v in read_added(self.policy).items()}
        tensors |= {f"reference/{k}": v for k, v in self.reference.state_dict().items()}
        tensors |= {f"strategy/{k}": v for k, v in strategy.tensors.items()}
        if distributed.is_main():
            state = {
                "task": self.position.task,
                "phase": self.position.phase,
                "steps": self.steps,
                "scores": self.scores(),
                "strategy": strategy.values,
                "timing": dict(self.timing),
                "metrics_bytes": self.tracker.position(),
                "data": {task.name: task.data_hash for task in self.tasks},
            }
            number = self.position.task * len(PHASES) + PHASES.index(self.position.phase)
            checkpoint.save(self.folder / "checkpoints", number, state, tensors, keep=self.config.checkpoint.keep)
        distributed.barrier()

    def _restore(self) -> None:
        """Take up the newest checkpoint, where there is one."""
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is None:
            self.tracker.rewind(0)  # a run that never came to its first checkpoint starts over
            return
        state, parts = found.state, _by_prefix(found.tensors)
        self._check_data(state["data"])
        self.position = Position(state["task"], state["phase"])
        self.steps = state["steps"]
        self.book = self._extended(ScoreBook.from_json(state["scores"]))
        self.timing.update(state["timing"])
        self._check_weights(parts["adapter"], parts["added"])
        write_factors(self.policy.model, parts["adapter"], dict.fromkeys(parts["adapter"], 0))
        write_added(self.policy, parts["added"])
        self.reference.load_state_dict(parts["reference"])
        self.strategy.load_state_dict(State(state["strategy"], parts["strategy"]))
        self.tracker.rewind(state["metrics_bytes"])
        log.info("resumed at task %d, %s", self.position.task + 1, self.position.phase)

    def _extended(self, before: ScoreBook) -> ScoreBook:
        """Scores of a run that may go on with tasks added to its sequence; the tasks it has met stay as they were."""
        try:
            book = before.extended(self.book.tasks)
        except ValueError as error:
            raise UserError(f"sequence.tasks: {error}; a run can only be given further tasks at the end") from error
        if len(book.tasks) > len(before.tasks):
            if len(self.plan) != len(self.tasks):
                raise UserError(
                    f"sequence.tasks: strategy={self.strategy.name} trains on all of its tasks at once, so none can be added; "
                    "another run.dir starts anew"
                )
            self._fill_rows(book)
        return book

    def _fill_rows(self, book: ScoreBook) -> None:
        """Where models stay in use (STL), their scores stand in the rows of added tasks as well."""
        for metric in book.metrics:
            matrix = book.matrix(metric)
            for experience in self.plan[: self.position.task]:
                for task in experience.scored if len(experience.rows) > 1 else ():
                    book.record_rows(metric, experience.rows, task, matrix[experience.rows[0]][task])

    def _check_weights(self, adapter: Mapping[str, torch.Tensor], added: Mapping[str, torch.Tensor]) -> None:
        """What is trained may have another shape where a run goes on with changed settings."""
        saved = {name: value.shape for name, value in {**adapter, **added}.items()}
        if saved != factor_shapes(self.policy.model) | {name: value.shape for name, value in self.policy.added.items()}:
            raise UserError(
                f"{self.folder}: its adapter is of another shape; give it the model.lora.*, the strategy and, with "
                "strategy=olora, the tasks that it had, or another run.dir"
            )

    def _check_data(self, before: dict[str, str]) -> None:
        changed = [t.name for t in self.tasks if t.name in before and before[t.name] != t.data_hash]
        if changed and self.config.resume.value != "force":
            raise UserError(
                f"{self.folder}: the rows of task '{changed[0]}' are not those that the interrupted run was trained on; "
                "resume=force goes on all the same, resume=never starts over"
            )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing[what] += time.perf_counter() - started


def make_evaluator(config: Config, policy: Policy, reference: ReferenceLogps, tokenizer: PreTrainedTokenizerBase) -> Evaluator:
    """What scores a run's tasks, with the judge that it names, if any.

    Raises:
        UserError: where the judge cannot be asked; before hours of training, and not after.
    """
    options, sources, judge = config.evaluation, config.sequence.sources, None
    if "judge" in options.metrics:
        tasks = {task: sources[task].of if task in sources else None for task in config.sequence.tasks}
        judge = Judge(options.judge, judge_folder(config.cache.dir), tasks)
    return Evaluator(policy, reference, tokenizer, options, beta=config.objective.beta, judge=judge)


def make_policy(config: Config, tasks: Sequence[Task]) -> Policy:
    """Load the base, attach a fresh adapter, and choose how rows are laid out."""
    base = load_base(config.model, deepspeed_config(config.zero))
    model = attach_lora(base, config.strategy.lora(config.model.lora, len(tasks)), seed=config.seed)
    policy = Policy(model)
    config.strategy.setup_model(policy, config.seed)
    longest = max(policy.prefixed(pair_row(pair)).length for task in tasks for pair in [*task.train, *task.test])
    with inference_engine(policy, config.zero) as module:
        module.eval()
        choose_head(policy, distributed.device())
        choose_layout(policy, config.model.row_layout, longest_row=longest, device=distributed.device())
        choose_operations(policy, distributed.device())
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(model, zero_stage=config.zero.stage)
    return policy


def _by_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        parts[prefix][rest] = tensor
    return parts
