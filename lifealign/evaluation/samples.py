"""What training on a task did to the answers: one prompt before and after it, and the words that changed.

Pure but for :func:`read_changes`, which reads the predictions that a run's tasks left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lifealign.runtime.files import numbered_folders, read_json_lines

Marked = tuple[str, bool]
"""A stretch of text, and whether it is among what changed."""


@dataclass(frozen=True)
class Change:
    """An answer to a prompt of ``task`` before and after the training on ``trained``."""

    trained: str
    task: str
    prompt: str
    before: str | None  # None: no answer was generated then
    after: str
    reference: str
    changed: int = 0  # how many of the task's answers training changed, where there are answers from before
    of: int = 0

    def marked(self) -> tuple[list[Marked], list[Marked]]:
        """:func:`word_diff` of the two answers; nothing is marked where there is none from before."""
        return ([], [(self.after, False)]) if self.before is None else word_diff(self.before, self.after)


def word_diff(before: str, after: str) -> tuple[list[Marked], list[Marked]]:
    """Both texts cut into stretches: those that the other lacks are marked. The stretches of a text join to the text."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    left: list[Marked] = []
    right: list[Marked] = []
    for kind, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        left += [("".join(old[i1:i2]), kind != "equal")] if i1 < i2 else []
        right += [("".join(new[j1:j2]), kind != "equal")] if j1 < j2 else []
    return left, right


def read_changes(folder: Path) -> list[Change]:
    """Of every step of a run and every task that it scored, one prompt with its answers before and after that step.

    The first prompt whose answer changed is taken, else the first; without answers from before, the first. A task that was
    not scored in the step before (the one just trained, unless ``evaluation.forward`` is set) has none from before.

    Args:
        folder: the ``tasks`` folder of a run, with a folder for each finished task.
    """
    steps = [(left.name.split("_", 1)[1], _answers(left)) for left in numbered_folders(folder)]
    earlier: Mapping[str, list[dict[str, Any]]] = {}
    changes: list[Change] = []
    for trained, answers in steps:
        changes += [_change(trained, task, earlier.get(task, []), rows) for task, rows in answers.items()]
        earlier = answers
    return changes


def _answers(left: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows with a generation that a task's folder holds, by the task of their prompts."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in read_json_lines(left / "predictions.jsonl"):
        if "prediction" in row:
            by_task.setdefault(row["task"], []).append(row)
    return by_task


def _change(trained: str, task: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Change:
    was = {row["id"]: row["prediction"] for row in before}
    changed = list(_changed(was, after))
    row = (changed or after)[0]
    return Change(
        trained,
        task,
        prompt=row["prompt"],
        before=was.get(row["id"]),
        after=row["prediction"],
        reference=row["chosen"],
        changed=len(changed),
        of=sum(other["id"] in was for other in after),
    )


def _changed(was: Mapping[str, str], after: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for row in after:
        if row["id"] in was and row["prediction"] != was[row["id"]]:
            yield row
