"""The exceptions that a user is meant to see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 20
"""More names than this are not listed in a message of one line."""


class UserError(ValueError):
    """A mistake in what the user gave: a key, a file, a row. Its text is one line that names the place and the fix.

    Commands print the text alone and exit with status 2. What is nobody's known mistake keeps its traceback.
    """


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number. Raised on every rank, before the optimiser has taken the step.

    Commands print the text alone and exit with status 1.
    """


class ConsolidationFailed(RuntimeError):
    """An update of the adapter could not be made long-term memory. Raised on every rank; the raw update is never passed on.

    Commands print the text alone and exit with status 1.
    """


class StorageFailed(RuntimeError):
    """The run directory cannot be written: full, gone, read-only. Raised on every rank; what was written before stands.

    Commands print the text alone and exit with status 1.
    """


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


def check_name(key: str, name: str) -> None:
    """Raises UserError for a name that is to become part of a path and might lead elsewhere, or be no name of a file."""
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,199}", name):
        raise UserError(f"{key}={name!r}: a name becomes a folder's; use letters, digits and . _ - + = , @")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or ``"; known: a, b"`` where none is near and they are few."""
    names = sorted(str(k) for k in known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if len(names) <= LISTED else ""
