"""Win rates: two answers to a prompt, compared in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.rubrics import FIRST, NEITHER, SECOND, Question, compare_question, criterion

MIRRORED = {FIRST: SECOND, SECOND: FIRST, NEITHER: NEITHER}


@dataclass(frozen=True)
class Duel:
    """Two answers to a prompt; a win is one for ``ours``."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class WinRate:
    """Outcomes of duels: ``wins + ties + losses + failed`` is their number."""

    wins: int  # ours is better in both orders
    losses: int  # theirs is better in both orders
    ties: int  # all the rest that has a verdict in both orders
    contradicted: int  # of the ties: those where the order decided
    failed: int  # no verdict in one order or both
    requests: int

    @property
    def win_rate(self) -> float | None:
        """Wins among the duels with an outcome, in percent; ties count as not won. None where there is no outcome."""
        judged = self.wins + self.losses + self.ties
        return 100.0 * self.wins / judged if judged else None


def judge_pairs(
    options: JudgeOptions,
    duels: Sequence[Duel],
    *,
    task: str,
    folder: Path,
    of: str | None = None,
    budget: Budget | None = None,
) -> WinRate:
    """Have each duel judged twice, once in either order; arguments and errors are those of ``judge_answers``.

    Judges favour a place. An answer has won only where it is found better both as the first and as the second.
    """
    options.check()
    text = criterion(options.rubrics, task, of)
    forward = [compare_question(text, duel.prompt, duel.ours, duel.theirs) for duel in duels]
    backward = [compare_question(text, duel.prompt, duel.theirs, duel.ours) for duel in duels]
    replies, requests = _replies(options, [*forward, *backward], folder, budget)
    return _count(replies[: len(duels)], replies[len(duels) :], requests)


def _replies(
    options: JudgeOptions, questions: Sequence[Question], folder: Path, budget: Budget | None
) -> tuple[list[str | None], int]:
    """Replies, and how many requests they took; a local judge's reply is the one that it finds most likely."""
    if options.local is not None:
        from lifealign.evaluation.judge.local import LocalJudge

        judge = LocalJudge(options.local)
        shares = [judge.shares(question) for question in questions]
        return [None if share is None else max(share, key=share.__getitem__) for share in shares], 0
    from lifealign.evaluation.judge.asking import ask_all

    found = ask_all(questions, options, folder, budget or Budget(options.max_requests))
    return found.texts, found.requests


def _count(forward: Sequence[str | None], backward: Sequence[str | None], requests: int) -> WinRate:
    both = list(zip(forward, backward, strict=True))
    judged = [(there, MIRRORED[back]) for there, back in both if there is not None and back is not None]
    wins, losses = judged.count((FIRST, FIRST)), judged.count((SECOND, SECOND))
    contradicted = judged.count((FIRST, SECOND)) + judged.count((SECOND, FIRST))
    ties = len(judged) - wins - losses
    return WinRate(wins, losses, ties, contradicted, failed=len(both) - len(judged), requests=requests)
