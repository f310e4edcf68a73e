"""What a judge is asked: the criteria and forms of ``conf/rubrics.yaml``, filled in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import lifealign.conf
from lifealign.errors import UserError, did_you_mean

SCORES = tuple(str(score) for score in range(1, 11))
FIRST, SECOND, NEITHER = "1", "2", "0"


@dataclass(frozen=True)
class Question:
    """One message to a judge, and the replies that are an answer to it."""

    text: str
    replies: tuple[str, ...]


def criterion(chosen: Mapping[str, str], task: str, of: str | None = None) -> str:
    """The text of the criterion that a task is judged by.

    Args:
        chosen: ``evaluation.judge.rubrics``: name of a criterion, or a file FILE.txt, by task.
        task: the task's name.
        of: the task whose rows it reads, if that is another one; its criterion is the second choice.

    Raises:
        UserError: where no criterion is chosen for the task, or the one chosen is unknown, unreadable or empty.
    """
    rubrics = _rubrics()
    source = {**rubrics["tasks"], **chosen}
    name = source.get(task) or source.get(of or "")
    key = f"evaluation.judge.rubrics.{task}"
    if name is None:
        raise UserError(f"{key}: task '{task}' has no criterion; give {key}=NAME, of {', '.join(rubrics['criteria'])}")
    if name.endswith(".txt"):
        return _own(key, Path(name))
    if name not in rubrics["criteria"]:
        raise UserError(
            f"{key}={name}: unknown criterion{did_you_mean(name, rubrics['criteria'])}; FILE.txt for one of your own"
        )
    return rubrics["criteria"][name]


def score_question(criterion: str, prompt: str, response: str) -> Question:
    """Asks for a grade, "1" to "10", of one answer."""
    return Question(_fill("score", criterion, prompt, first=response), SCORES)


def compare_question(criterion: str, prompt: str, first: str, second: str) -> Question:
    """Asks which of two answers, in this order, is better: "1", "2", or "0" for neither."""
    return Question(_fill("compare", criterion, prompt, first=first, second=second), (FIRST, SECOND, NEITHER))


def _fill(form: str, criterion: str, prompt: str, **answers: str) -> str:
    """One pass, so that braces in a text stay what they are; no text can contain the digest of itself."""
    texts = json.dumps([prompt, *answers.values()]).encode()
    tag = hashlib.sha256(texts).hexdigest()[:16]
    return _rubrics()["forms"][form].format(criterion=criterion, tag=tag, prompt=prompt, **answers)


@cache
def _rubrics() -> dict[str, Any]:
    path = Path(lifealign.conf.__file__).parent / "rubrics.yaml"
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


def _own(key: str, path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{key}={path}: cannot be read ({reason})") from error
    if not text:
        raise UserError(f"{key}={path}: the file is empty; write down what is judged and what 1 and 10 stand for")
    return text
