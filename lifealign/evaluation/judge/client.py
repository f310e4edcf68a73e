"""One question to an OpenAI-compatible endpoint: asked, asked again with back-off, and given up in good order."""

from __future__ import annotations

import os
import random
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, OpenAI
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_when_event_set
from tenacity.nap import sleep_using_event

from lifealign.errors import UserError
from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.cache import question_key
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.rubrics import Question

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_RETRY_AFTER = 600.0
"""Seconds that an endpoint's Retry-After is obeyed; one that asks for more is asked again all the same."""

WORTH_ANOTHER_TRY = (408, 409, 429)
"""Below 500; other refusals of a request are final."""


class NoVerdict(Exception):
    """A question that stays unanswered. ``reason`` is of our own words: a server's might repeat the key."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Passing(NoVerdict):
    """What another attempt may mend.

    Args:
        retry_after: seconds that the endpoint asks us to wait.
        answered: whether the endpoint is known to have dealt with the request; the next one is then another request to it.
    """

    def __init__(self, reason: str, retry_after: float = 0.0, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.retry_after, self.answered = retry_after, answered


def read_key(options: JudgeOptions) -> str:
    """The key, from the environment and from nowhere else; a placeholder where the endpoint needs none.

    Raises:
        UserError: where the variable is not set, or holds what cannot be a key.
    """
    if options.api_key_env is None:
        return "none"  # given all the same: without one, the openai package would look for the user's OPENAI_API_KEY
    key = os.environ.get(options.api_key_env, "").strip()
    if not key:
        raise UserError(f"evaluation.judge.api_key_env: the environment variable {options.api_key_env} is not set; export it")
    if not (key.isascii() and key.isprintable()):  # a header cannot hold it, which would come out hours later
        raise UserError(
            f"evaluation.judge.api_key_env: the environment variable {options.api_key_env} holds characters that no key has, "
            "such as a typographic quote or an ellipsis; export the key anew"
        )
    return key


def _client(options: JudgeOptions) -> OpenAI:
    """What the openai package reads from the environment besides is the user's, for other endpoints: further headers, one
    of which may be a key, and the names of an organisation and a project."""
    key = read_key(options)
    others = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("OPENAI_")}
    try:
        return OpenAI(base_url=options.base_url, api_key=key, timeout=options.timeout, max_retries=0)
    finally:
        os.environ.update(others)


class Endpoint:
    """A judge behind a URL; for any number of threads. Once ``stopping`` is set waits end, and no request is sent any more."""

    def __init__(self, options: JudgeOptions, budget: Budget) -> None:
        assert options.base_url is not None and options.model is not None, "JudgeOptions.check comes first"
        self.options, self.budget, self.stopping = options, budget, threading.Event()
        self._reached = False
        self._random = random.Random()  # of its own: waits must not change what a seeded run draws
        self._client = _client(options)
        sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._sampling: dict[str, Any] = {key: value for key, value in sampling.items() if value is not None}

    def close(self) -> None:
        self._client.close()

    def key(self, question: Question) -> str:
        """Under which the verdict is kept. The question's text holds form, criterion, prompt and answers, whole."""
        return question_key(question.text, self.options.model, self._sampling)

    def ask(self, question: Question) -> str:
        """One of the question's replies.

        Raises:
            NoVerdict: after the last attempt, or for a refusal that no further attempt would mend.
            BudgetSpent: before the request that would be one too many.
            UserError: where the endpoint refuses the key or knows no such model, or nothing listens at its address.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(Passing),
            stop=stop_after_attempt(self.options.attempts) | stop_when_event_set(self.stopping),
            wait=self._wait,
            sleep=sleep_using_event(self.stopping),
            reraise=True,
        )
        answered = 0

        def attempt() -> str:
            nonlocal answered
            try:
                return self._once(question, self.key(question) + (f"-{answered}" if answered else ""))
            except Passing as failure:
                answered += failure.answered
                raise

        try:
            return retrying(attempt)
        except Passing as failure:
            if failure.reason == "no connection" and not self._reached and not self.stopping.is_set():
                raise UserError(
                    f"evaluation.judge.base_url={self.options.base_url}: no connection in {self.options.attempts} attempts; "
                    "check the address, and that the server runs"
                ) from None
            raise

    def _once(self, question: Question, idempotency_key: str) -> str:
        """One request. An endpoint that knows idempotency keys answers two requests with the same one once: the second gets
        what the first did, also where nobody was there to read it."""
        if self.stopping.is_set():
            raise NoVerdict("stopped")
        self.budget.take()
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=str(self.options.model),
                messages=[{"role": "user", "content": question.text}],
                extra_headers={"Idempotency-Key": idempotency_key},
                **self._sampling,
            ).http_response
        except APITimeoutError:
            raise Passing("time-out", answered=False) from None
        except APIConnectionError:
            raise Passing("no connection", answered=False) from None
        except APIStatusError as error:
            self._reached = True
            raise self._refusal(error.status_code, _seconds(error.response.headers.get("retry-after"))) from None
        except APIError:
            raise Passing("unparsable reply") from None
        self._reached = True
        reply = _content(response)
        if reply not in question.replies:
            raise Passing("unparsable reply")
        return reply

    def _refusal(self, status: int, retry_after: float) -> Exception:
        options = self.options
        if status in (401, 403):
            name = "none is given" if options.api_key_env is None else f"environment variable {options.api_key_env}"
            return UserError(f"evaluation.judge.api_key_env: {options.base_url} refuses the key ({name}; HTTP {status})")
        if status == 404:
            return UserError(f"evaluation.judge: {options.base_url} knows no model '{options.model}', or is no /v1 (HTTP 404)")
        if status in WORTH_ANOTHER_TRY or status >= 500:
            return Passing(f"HTTP {status}", retry_after)
        return NoVerdict(f"HTTP {status}")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: what the endpoint asks for, and a jittered back-off on top, so that not all come
        back at once."""
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after if isinstance(failure, Passing) else 0.0
        backoff = min(self.options.backoff * 2 ** (state.attempt_number - 1), LONGEST_BACKOFF)
        return asked + backoff * self._random.uniform(0.5, 1.0)


def _content(response: Any) -> str:
    """The reply's text; empty for a body that is no chat completion."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return content.strip() if isinstance(content, str) else ""


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header, which holds seconds or a date; 0 where it is missing or says neither."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else 0.0  # NaN is not above 0
