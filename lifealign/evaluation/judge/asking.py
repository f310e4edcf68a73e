"""Many questions: what is known is taken from disk, the rest is asked, a bounded number at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from signal import Signals

from lifealign.errors import Interrupted, UserError
from lifealign.evaluation.judge.budget import Budget, BudgetSpent
from lifealign.evaluation.judge.cache import VerdictCache
from lifealign.evaluation.judge.client import Endpoint, NoVerdict
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.rubrics import Question
from lifealign.runtime.signals import StopSignals

POLL_SECONDS = 0.05
"""From a signal to the last moment at which another request is sent."""


@dataclass(frozen=True)
class Replies:
    """What became of questions, in their order."""

    texts: list[str | None]  # None: no verdict after the last attempt
    cached: list[bool]  # whether it was on disk before
    requests: int  # sent for these questions, retries included
    failures: Mapping[str, int]  # reason of the last attempt -> questions, equal ones counted once


def ask_all(questions: Sequence[Question], options: JudgeOptions, folder: Path, budget: Budget) -> Replies:
    """Ask the endpoint what ``folder`` does not know yet; equal questions are asked once.

    Each reply is on disk before it is counted and the next question is sent in its place. However this ends, no thread goes
    on behind it: requests that are under way are waited for, and their replies are kept.

    Raises:
        UserError: when the budget is spent, and for what no further attempt would mend.
        Interrupted: once nothing is under way any more, where SIGTERM or SIGINT came.
    """
    cache = VerdictCache(folder)
    endpoint = Endpoint(options, budget)
    sent_before = budget.sent
    keys = [endpoint.key(question) for question in questions]
    cached = [cache.get(key) is not None for key in keys]
    missing = {key: question for key, question, known in zip(keys, questions, cached, strict=True) if not known}

    def still_open() -> str:
        return f"{sum(cache.get(key) is None for key in missing)} of {len(set(keys))} questions have no verdict yet"

    try:
        with StopSignals() as signals:
            failures = _ask_missing(missing, endpoint, cache, signals)
    except BudgetSpent:
        raise UserError(
            f"evaluation.judge.max_requests={budget.most}: all are sent, {still_open()}; verdicts so far are kept, and the "
            "same command goes on, with as many again"
        ) from None
    finally:
        endpoint.close()
    if signals.received is not None:
        raise Interrupted(
            f"judge: stopped by {Signals(signals.received).name}, {still_open()}; verdicts so far are kept, and the same "
            "command goes on",
            signals.received,
        )
    return Replies([cache.get(key) for key in keys], cached, budget.sent - sent_before, failures)


def _ask_missing(
    missing: Mapping[str, Question], endpoint: Endpoint, cache: VerdictCache, signals: StopSignals
) -> Counter[str]:
    """Why some stay without a verdict. Once a signal is noted nothing more is sent, and what is under way is waited for."""

    def ask(key: str, question: Question) -> None:
        cache.add(key, endpoint.ask(question))

    failures: Counter[str] = Counter()
    waiting, running = iter(missing.items()), set[Future[None]]()
    with ThreadPoolExecutor(endpoint.options.concurrency) as pool:
        try:
            while signals.received is None:
                free = endpoint.options.concurrency - len(running)
                running |= {pool.submit(ask, key, question) for key, question in islice(waiting, free)}
                if not running:
                    break
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    try:
                        future.result()
                    except NoVerdict as failure:
                        failures[failure.reason] += 1
        finally:
            endpoint.stopping.set()
    return failures
