"""Score adapters again: those that a run's tasks left, or one that was made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, build, load_run
from lifealign.data.tasks import Task, load_tasks
from lifealign.evaluation.evaluate import Evaluation
from lifealign.evaluation.scores import ScoreBook, closing_table
from lifealign.lifelong import make_evaluator, make_policy
from lifealign.memory.edit import finished_adapters
from lifealign.models.adapter import load_adapter
from lifealign.models.loading import load_tokenizer
from lifealign.models.scoring import ReferenceLogps
from lifealign.runtime import distributed
from lifealign.runtime.engine import inference_engine
from lifealign.runtime.files import write_json, write_json_lines
from lifealign.runtime.terminal import console


class Scorer:
    """A run's base and tasks, made ready to score adapters as the run scored its own.

    Args:
        folder: a run directory.
        overrides: ``key=value``, of which those of ``evaluation`` and ``data.max_eval`` make sense.

    Raises:
        UserError: where the folder holds no run.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.config: Config = build(load_run(folder, overrides))
        distributed.start()
        tokenizer = load_tokenizer(self.config.model)
        self.tasks = load_tasks(self.config.sequence, self.config.data, tokenizer, SIX_DOMAINS)
        self.policy = make_policy(self.config, self.tasks)
        reference = ReferenceLogps(self.config.cache)
        self._evaluator = make_evaluator(self.config, self.policy, reference, tokenizer)

    def score(self, adapter: Path, tasks: Sequence[Task]) -> Iterator[tuple[Task, Evaluation]]:
        """Scores and predictions of an adapter's folder on each task."""
        load_adapter(self.policy, adapter)
        with inference_engine(self.policy, self.config.zero) as module:
            for task in tasks:
                yield task, self._evaluator.evaluate(module, task)


def rescore(folder: Path, overrides: Sequence[str]) -> ScoreBook:
    """Score what each finished task of a run left, into ``folder/rescored/``; the run's own scores stay as they are.

    Raises:
        UserError: where the folder holds no run, or no task of it is finished.
    """
    scorer = Scorer(folder, overrides)
    config, tasks = scorer.config, scorer.tasks
    book = ScoreBook([task.name for task in tasks])
    for adapter, experience in zip(finished_adapters(folder), config.strategy.plan(tasks), strict=False):
        scores, predictions = experience.scores(len(tasks), forward=config.evaluation.forward), []
        for (on, rows), (task, result) in zip(scores, scorer.score(adapter, [tasks[i] for i, _ in scores]), strict=True):
            predictions += [{"task": task.name, **row} for row in result.predictions]
            for metric, value in result.scores.items():
                book.record_rows(metric, rows, on, value)
        if distributed.is_main():
            write_json_lines(folder / "rescored" / f"{adapter.parent.name}.predictions.jsonl", predictions)
    if distributed.is_main():
        write_json(
            folder / "rescored" / "scores.json",
            book.to_json(config.strategy.name, config.objective.name, config.seed),
        )
    console.print(closing_table(book))
    return book
