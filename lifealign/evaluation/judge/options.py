"""What a user may say about the judge."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lifealign.errors import UserError


@dataclass
class JudgeOptions:
    """``evaluation.judge.*``: who judges, by which criteria, and how much it may be asked.

    No field holds a key: ``api_key_env`` names the environment variable that does. What looks like a secret in the wrong
    place is refused, and the refusal does not repeat it.
    """

    base_url: str | None = None  # of an OpenAI-compatible endpoint, such as http://localhost:8000/v1
    model: str | None = None  # the name by which the endpoint knows the judge
    api_key_env: str | None = None  # name of the environment variable that holds the key; None: the endpoint needs none
    local: str | None = None  # folder or hub name of a model that judges in this process, in place of an endpoint
    rubrics: dict[str, str] = field(default_factory=dict)  # task -> criterion of conf/rubrics.yaml, or FILE.txt
    temperature: float | None = 0.0  # None: not sent, the endpoint's own
    max_tokens: int | None = 16  # of a reply; None: not sent, for models that think before they answer
    concurrency: int = 8  # requests under way at once
    timeout: float = 60.0  # seconds a request may take
    attempts: int = 6  # requests for one verdict, the first included, before it counts as failed
    backoff: float = 1.0  # seconds before the second attempt, doubled with each further one, up to a minute
    max_requests: int | None = 10_000  # requests of one command, retries included; None: no bound

    def __post_init__(self) -> None:
        for key in ("max_tokens", "concurrency", "attempts", "max_requests"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"evaluation.judge.{key}={value}: must be at least 1")
        for key in ("timeout", "backoff"):
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"evaluation.judge.{key}={getattr(self, key)}: must be a number of seconds above 0")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"evaluation.judge.temperature={self.temperature}: must lie in [0, 2]")
        self._check_endpoint()

    def check(self) -> None:
        """Raises UserError where no judge is named; for whoever is about to ask one."""
        if self.local is None and self.base_url is None:
            raise UserError(
                "evaluation.judge: no judge is named; give evaluation.judge.base_url=URL and evaluation.judge.model=NAME, "
                "or evaluation.judge.local=MODEL_PATH"
            )

    def _check_endpoint(self) -> None:
        if self.local is not None and (self.base_url is not None or self.model is not None):
            raise UserError("evaluation.judge.local: a local judge excludes evaluation.judge.base_url and .model; drop one")
        if (self.base_url is None) != (self.model is None):
            raise UserError("evaluation.judge: base_url and model go together; give both")
        if self.base_url is not None:
            _check_url(self.base_url)
        # Upper case only: so that a key given here by mistake is hardly ever taken for a name and shown.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise UserError(
                "evaluation.judge.api_key_env: must be the name of an environment variable, such as OPENAI_API_KEY "
                "(capitals, digits, underscores), and never the key itself"
            )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or "@" in url or "?" in url or "#" in url:
        raise UserError(
            "evaluation.judge.base_url: must be http://HOST[:PORT]/PATH or https://..., as in http://localhost:8000/v1, "
            "without a user name, a password or a query"
        )
