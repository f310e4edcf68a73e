"""A grade for each of many answers, and their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.rubrics import Question, criterion, score_question
from lifealign.models.reference_cache import reference_folder


@dataclass(frozen=True)
class Item:
    """What is judged."""

    prompt: str
    response: str


@dataclass(frozen=True)
class JudgeResult:
    """Grades of items. ``scored + failed`` is their number; ``cached`` of the scored ones cost nothing."""

    score: float | None  # ten times the mean grade of the scored items, 10 to 100; None where there is none
    grades: list[float | None]  # 1 to 10, one an item; None: no verdict. Whole numbers, but for a local judge
    cached: int
    requests: int  # sent in this call, retries and failures included
    failures: Mapping[str, int]  # why items have no grade

    @property
    def scored(self) -> int:
        return sum(grade is not None for grade in self.grades)

    @property
    def failed(self) -> int:
        return len(self.grades) - self.scored

    def counts(self) -> dict[str, object]:
        """What a log holds of it."""
        known = {"scored": self.scored, "failed": self.failed, "cached": self.cached, "requests": self.requests}
        return {**known, "failures": dict(self.failures)}


def judge_folder(chosen: str | None) -> Path:
    """Where verdicts are kept: beside the reference log-probabilities, below ``cache.dir`` or the environment's choice."""
    return reference_folder(chosen).parent / "judge"


def check_judge(options: JudgeOptions, tasks: Collection[tuple[str, str | None]]) -> None:
    """Whether these tasks could be judged; to be called before hours of training, since nothing is asked or loaded.

    Args:
        tasks: name of each, and the task whose rows it reads, if that is another one.

    Raises:
        UserError: where no judge is named, its key is not in the environment, or a task has no criterion.
    """
    options.check()
    for task, of in tasks:
        criterion(options.rubrics, task, of)
    if options.local is None:
        from lifealign.evaluation.judge.client import read_key

        read_key(options)


def judge_answers(
    options: JudgeOptions,
    items: Sequence[Item],
    *,
    task: str,
    folder: Path,
    of: str | None = None,
    budget: Budget | None = None,
) -> JudgeResult:
    """Have each item graded by the task's criterion. Call on one rank.

    Args:
        folder: where verdicts of an endpoint are kept, see :func:`judge_folder`.
        of: the task whose rows ``task`` reads, if that is another one.
        budget: of the whole command; None: ``options.max_requests`` for this call alone.

    Raises:
        UserError: where the options do not name a usable judge, or its budget is spent. Verdicts so far are kept.
        Interrupted: where SIGTERM or SIGINT came while an endpoint was asked, once the replies under way are kept.
    """
    options.check()
    text = criterion(options.rubrics, task, of)
    questions = [score_question(text, item.prompt, item.response) for item in items]
    if options.local is not None:
        return _by_local_model(options.local, questions)
    from lifealign.evaluation.judge.asking import ask_all

    replies = ask_all(questions, options, folder, budget or Budget(options.max_requests))
    grades = [None if reply is None else float(reply) for reply in replies.texts]
    return JudgeResult(_score(grades), grades, sum(replies.cached), replies.requests, replies.failures)


def _by_local_model(path: str, questions: Sequence[Question]) -> JudgeResult:
    """Its grades are expectations over the ten replies; they cost no request and are not kept."""
    from lifealign.evaluation.judge.local import TOO_LONG, LocalJudge

    judge = LocalJudge(path)
    grades = []
    for question in questions:
        shares = judge.shares(question)
        grades.append(None if shares is None else sum(int(reply) * share for reply, share in shares.items()))
    failures = Counter(TOO_LONG for grade in grades if grade is None)
    return JudgeResult(_score(grades), grades, cached=0, requests=0, failures=failures)


def _score(grades: Sequence[float | None]) -> float | None:
    known = [grade for grade in grades if grade is not None]
    return 10.0 * sum(known) / len(known) if known else None
