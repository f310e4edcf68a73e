"""Score a finished or interrupted run again: every task's adapter on the tasks seen by then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, build, load_run
from lifealign.data.tasks import load_tasks
from lifealign.errors import UserError
from lifealign.evaluation.evaluate import Evaluator
from lifealign.evaluation.scores import ScoreBook, closing_table
from lifealign.lifelong import make_policy
from lifealign.models.adapter import load_adapter
from lifealign.models.loading import load_tokenizer
from lifealign.models.scoring import ReferenceLogps
from lifealign.runtime import distributed
from lifealign.runtime.engine import inference_engine
from lifealign.runtime.files import write_json, write_json_lines
from lifealign.runtime.terminal import console


def rescore(folder: Path, overrides: Sequence[str]) -> ScoreBook:
    """Score what each finished task of a run left, into ``folder/rescored/``; the run's own scores stay as they are.

    Args:
        folder: a run directory.
        overrides: ``key=value``, of which those of ``evaluation`` and ``data.max_eval`` make sense.

    Raises:
        UserError: where the folder holds no run, or no task of it is finished.
    """
    config: Config = build(load_run(folder, overrides))
    distributed.start()
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config.sequence, config.data, tokenizer, SIX_DOMAINS)
    finished = sorted((folder / "tasks").glob("[0-9]*_*/adapter"))
    if not finished:
        raise UserError(f"{folder}: no task of this run is finished, so there is no adapter to score")
    policy = make_policy(config, tasks)
    evaluator = Evaluator(policy, ReferenceLogps(config.cache), tokenizer, config.evaluation, beta=config.objective.beta)
    book = ScoreBook([task.name for task in tasks])
    for number, adapter in enumerate(finished):
        load_adapter(policy.model, adapter)
        predictions = []
        with inference_engine(policy, config.zero) as module:
            for other, task in enumerate(tasks if config.evaluation.forward else tasks[: number + 1]):
                result = evaluator.evaluate(module, task)
                predictions += [{"task": task.name, **row} for row in result.predictions]
                for metric, value in result.scores.items():
                    book.record(metric, number, other, value)
        if distributed.is_main():
            write_json_lines(folder / "rescored" / f"{adapter.parent.name}.predictions.jsonl", predictions)
    if distributed.is_main():
        write_json(
            folder / "rescored" / "scores.json",
            book.to_json(config.strategy.name, config.objective.name, config.seed),
        )
    console.print(closing_table(book))
    return book
