"""The exceptions that a user is meant to see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

LISTED = 20
"""More names than this are not listed in a message of one line."""


class UserError(ValueError):
    """A mistake in what the user gave: a key, a file, a row. Its text is one line that names the place and the fix.

    Commands print the text alone and exit with status 2. What is nobody's known mistake keeps its traceback.
    """


DIVERGED = 3
"""Exit status of a run whose training diverged: the same command would meet the same, which is not so of other failures."""


SIGNALLED = 128
"""What shells add to the number of a signal that ended a command."""


class TrainingDiverged(RuntimeError):
    """The loss, a gradient's norm or a logged figure is no longer a number. Raised on every rank; no checkpoint holds the step.

    A stage knows its loss before the optimiser takes the step, and the norm after it.

    Commands print the text alone and exit with status 3.
    """


class ConsolidationFailed(RuntimeError):
    """An update of the adapter could not be made long-term memory. Raised on every rank; the raw update is never passed on.

    Commands print the text alone and exit with status 1.
    """


class StorageFailed(RuntimeError):
    """The run directory cannot be written: full, gone, read-only. Raised on every rank; what was written before stands.

    Commands print the text alone and exit with status 1.
    """


def storage_failed(folder: Path, error: Exception) -> StorageFailed:
    """What to raise on every rank where one of them met ``error`` as it wrote below a run directory."""
    kept = "the newest checkpoint stands, and the same command goes on"
    rest = kept if (folder / "checkpoints").exists() else "there is no checkpoint in it, so the run starts anew"
    return StorageFailed(f"{folder}: cannot be written ({error}); {rest}")


class Interrupted(Exception):
    """A signal asked the work to end, and all that was done of it is saved. Raised on every rank.

    Commands print the text alone and exit with status 128 plus the number of the signal.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        """Ranks send each other their errors, and an exception with two arguments is not put together again by itself."""
        return type(self), (str(self), self.signal)


FAILURES = (TrainingDiverged, ConsolidationFailed, StorageFailed, Interrupted)
"""What ends a run, on all ranks together, though the user made no mistake. Told in one line."""


def check_name(key: str, name: str) -> None:
    """Raises UserError for a name that is to become part of a path and might lead elsewhere, or be no name of a file."""
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,199}", name):
        raise UserError(f"{key}={name!r}: a name becomes a folder's; use letters, digits and . _ - + = , @")


LONGEST = 2_000
"""Characters of a message; what data says may be of any length."""


def printable(text: str) -> str:
    """A message in one line, whatever data is quoted in it: control characters, which terminals act on, are written out."""
    cut = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def library_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not endless."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def yaml_line(error: Exception, path: str | None = None) -> str:
    """What is wrong with a YAML file in one line, with the place where the reader knows it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = path or (mark.name if mark is not None else "YAML")
    if mark is not None:
        place += f", line {mark.line + 1}"
    return f"{place}: {' '.join(str(problem or error).split())}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or ``"; known: a, b"`` where none is near and they are few."""
    names = sorted(str(k) for k in known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if len(names) <= LISTED else ""
