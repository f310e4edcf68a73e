"""Many questions: what is known is taken from disk, the rest is asked, a bounded number at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from lifealign.errors import UserError
from lifealign.evaluation.judge.budget import Budget, BudgetSpent
from lifealign.evaluation.judge.cache import VerdictCache
from lifealign.evaluation.judge.client import Endpoint, NoVerdict
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.rubrics import Question


@dataclass(frozen=True)
class Replies:
    """What became of questions, in their order."""

    texts: list[str | None]  # None: no verdict after the last attempt
    cached: list[bool]  # whether it was on disk before
    requests: int  # sent for these questions, retries included
    failures: Mapping[str, int]  # reason of the last attempt -> questions, equal ones counted once


def ask_all(questions: Sequence[Question], options: JudgeOptions, folder: Path, budget: Budget) -> Replies:
    """Ask the endpoint what ``folder`` does not know yet; equal questions are asked once.

    Each reply is on disk before it is counted, and the next question of its thread is sent. However this ends, no thread
    goes on behind it: requests that are under way are waited for, and their replies are kept.

    Raises:
        UserError: when the budget is spent, and for what no further attempt would mend.
    """
    cache = VerdictCache(folder)
    endpoint = Endpoint(options, budget)
    sent_before = budget.sent
    keys = [endpoint.key(question) for question in questions]
    cached = [cache.get(key) is not None for key in keys]
    missing = {key: question for key, question, known in zip(keys, questions, cached, strict=True) if not known}
    try:
        failures = _ask_missing(missing, endpoint, cache)
    except BudgetSpent:
        left = sum(cache.get(key) is None for key in missing)
        raise UserError(
            f"evaluation.judge.max_requests={budget.most}: all are sent, {left} of {len(set(keys))} questions have no verdict "
            "yet; verdicts so far are kept, so raise the number and give the command again"
        ) from None
    finally:
        endpoint.close()
    return Replies([cache.get(key) for key in keys], cached, budget.sent - sent_before, failures)


def _ask_missing(missing: Mapping[str, Question], endpoint: Endpoint, cache: VerdictCache) -> Counter[str]:
    """Why some stay without a verdict."""

    def ask(key: str, question: Question) -> None:
        if not endpoint.stopping.is_set():
            cache.add(key, endpoint.ask(question))

    failures: Counter[str] = Counter()
    with ThreadPoolExecutor(endpoint.options.concurrency) as pool:
        try:
            futures: list[Future[None]] = [pool.submit(ask, key, question) for key, question in missing.items()]
            for future in as_completed(futures):
                try:
                    future.result()
                except NoVerdict as failure:
                    failures[failure.reason] += 1
        except BaseException:  # Ctrl-C too: what waits is dropped, what is under way ends
            endpoint.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures
