"""Score adapters again: those that a run's tasks left, or one that was made of them; on the run's tasks, or on other rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from lifealign.assembly import make_evaluator, make_policy
from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, build, differences, load_run, resolved
from lifealign.data.tasks import Task, load_tasks
from lifealign.errors import UserError
from lifealign.evaluation.evaluate import Evaluation
from lifealign.evaluation.scores import ScoreBook, closing_table, format_score, metric_info
from lifealign.memory.edit import finished_adapters, task_adapter
from lifealign.models.adapter import load_adapter
from lifealign.models.loading import load_tokenizer
from lifealign.models.scoring import ReferenceLogps
from lifealign.runtime import distributed
from lifealign.runtime.engine import inference_engine
from lifealign.runtime.files import check_writable, read_json_lines, read_yaml, write_json, write_json_lines, write_text
from lifealign.runtime.terminal import console


class Scorer:
    """A run's base, and tasks, made ready to score adapters as the run scored its own.

    Answers that the run, or an earlier scoring of it, has generated from the same adapter, prompt and options are taken over.

    Args:
        folder: a run directory.
        overrides: ``key=value``, of which those of ``evaluation``, ``data`` and ``sequence.tasks`` make sense.

    Raises:
        UserError: where the folder holds no run, or the overrides ask for another adapter than the run's.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.config: Config = build(load_run(folder, overrides))
        own = build(load_run(folder))
        self.is_own_sequence = self.config.sequence.tasks == own.sequence.tasks
        distributed.start()
        tokenizer = load_tokenizer(self.config.model)
        self.tasks = load_tasks(self.config.sequence, self.config.data, tokenizer, SIX_DOMAINS)
        _check_adapter(own, self.config)
        self.policy = make_policy(self.config, self.tasks)
        self._evaluator = make_evaluator(self.config, self.policy, ReferenceLogps(self.config.cache), tokenizer)
        self._evaluator.known = known_answers(folder)
        self.answers: Counter[str] = Counter()  # how many were reused, how many generated

    def score(self, adapter: Path, tasks: Sequence[Task]) -> Iterator[tuple[Task, Evaluation]]:
        """Scores and predictions of an adapter's folder on each task."""
        load_adapter(self.policy, adapter)
        with inference_engine(self.policy, self.config.zero) as module:
            for task in tasks:
                result = self._evaluator.evaluate(module, task)
                answered = sum("prediction" in row for row in result.predictions)
                self.answers.update(reused=result.reused, generated=answered - result.reused)
                yield task, result


def _check_adapter(own: Config, config: Config) -> None:
    """Raises UserError where the run's adapters would not fit the policy that a configuration makes."""
    bases = [(c.model.path, c.model.quantization) for c in (own, config)]
    shapes = [c.strategy.lora(c.model.lora, len(c.sequence.tasks)) for c in (own, config)]
    if bases[0] != bases[1] or shapes[0] != shapes[1]:
        raise UserError(
            "the overrides ask for another base or another adapter than the run's: leave model.* as it is, and with "
            f"strategy=olora, whose adapter is as wide as its sequence is long, name {len(own.sequence.tasks)} tasks"
        )


def known_answers(folder: Path) -> dict[str, str]:
    """What a run and its earlier scorings have generated, by generation key; read by rank 0 for all."""
    known: dict[str, str] = {}
    if distributed.is_main():
        for path in [*folder.glob("tasks/*/predictions.jsonl"), *folder.glob("rescored/**/*predictions.jsonl")]:
            known |= {row["generation"]: row["prediction"] for row in read_json_lines(path) if "generation" in row}
    return distributed.broadcast_object(known)


def rescore(folder: Path, overrides: Sequence[str], adapter: str | None = None, to: Path | None = None) -> ScoreBook | None:
    """Score what the finished tasks of a run left; the run's own scores stay as they are.

    Each adapter is scored on the tasks that the run scored after it, and ``scores.json`` has their matrix. With ``adapter``,
    or where ``sequence.tasks`` is another one, adapters are scored on all tasks, and each gets a folder.

    Args:
        adapter: the finished task whose adapter is scored; None: those of all finished tasks.
        to: where scores and predictions go; None: ``folder/rescored``.

    Returns:
        The matrix, where there is one.

    Raises:
        UserError: where the folder holds no run, no such task of it is finished, or ``to`` holds scores made with other
            settings.
    """
    settings, to = resolved(load_run(folder, overrides)), to or folder / "rescored"
    chosen = finished_adapters(folder) if adapter is None else [task_adapter(folder, adapter)]
    distributed.start()
    with distributed.failing_together(UserError):
        if distributed.is_main():
            _refuse_other_scores(to, settings)
    scorer = Scorer(folder, overrides)
    with distributed.failing_together(UserError):
        if distributed.is_main():
            check_writable(to, "to")
            write_text(to / SETTINGS, yaml.safe_dump(settings, sort_keys=False))
    if adapter is None and scorer.is_own_sequence:
        book = _rescore_matrix(scorer, chosen, to)
    else:
        book = None
        _score_apart(scorer, chosen, to)
    if scorer.config.evaluation.generates:
        console.print(f"answers: {scorer.answers['reused']} taken over, {scorer.answers['generated']} generated")
    console.print(f"written: {to}", highlight=False, markup=False)
    return book


SETTINGS = "settings.yaml"
"""Beside scores: what they were made with."""


def _refuse_other_scores(to: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where a folder is a run's own, or holds scores that were made otherwise: nothing is written over."""
    place = to.resolve()
    owners = [place, *(folder.parent for folder in (place, *place.parents) if folder.name == "tasks")]
    if any((owner / "config.yaml").exists() and (owner / "metrics.jsonl").exists() for owner in owners):
        raise UserError(f"to={to}: here are a run's own scores, which are not written over; name another folder")
    scored = any(any(to.glob(names)) for names in ("scores.json", "*.predictions.jsonl", "[0-9]*_*/predictions.jsonl"))
    note = to / SETTINGS
    changed = differences(read_yaml(note), dict(settings)) if scored and note.exists() else []
    if changed:
        raise UserError(f"{to}: holds scores made with another {changed[0]}; name another folder, to=DIR, or remove this one")


def _rescore_matrix(scorer: Scorer, adapters: Sequence[Path], to: Path) -> ScoreBook:
    config, tasks = scorer.config, scorer.tasks
    book = ScoreBook([task.name for task in tasks])
    for adapter, experience in zip(adapters, config.strategy.plan(tasks), strict=False):
        scores, predictions = experience.scores(len(tasks), forward=config.evaluation.forward), []
        for (on, rows), (task, result) in zip(scores, scorer.score(adapter, [tasks[i] for i, _ in scores]), strict=True):
            predictions += _named(task, result)
            for metric, value in result.scores.items():
                book.record_rows(metric, rows, on, value)
        if distributed.is_main():
            write_json_lines(to / f"{adapter.parent.name}.predictions.jsonl", predictions)
    if distributed.is_main():
        write_json(to / "scores.json", book.to_json(config.strategy.name, config.objective.name, config.seed))
    console.print(closing_table(book))
    return book


def _score_apart(scorer: Scorer, adapters: Sequence[Path], to: Path) -> None:
    """Every adapter on every task; what is written has the names and the form of what a task of a run leaves."""
    metrics = scorer.config.evaluation.metrics
    table = Table("adapter after", "task", *(metric_info(metric).label for metric in metrics), title="Scores")
    for adapter in adapters:
        after, scores, predictions = adapter.parent.name.split("_", 1)[1], {}, []
        for task, result in scorer.score(adapter, scorer.tasks):
            scores[task.name] = result.scores
            predictions += _named(task, result)
            table.add_row(after, task.name, *(format_score(result.scores[metric]) for metric in metrics))
        if distributed.is_main():
            write_json_lines(to / adapter.parent.name / "predictions.jsonl", predictions)
            write_json(to / adapter.parent.name / "scores.json", {"after": after, "scores": scores})
    console.print(table)


def _named(task: Task, result: Evaluation) -> list[Mapping[str, Any]]:
    return [{"task": task.name, **row} for row in result.predictions]
