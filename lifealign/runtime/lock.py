"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lifealign.errors import UserError


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[int]:
    """Inside, the folder belongs to this process; the system lets go of it when the process ends, however that happens.

    Yields the descriptor that holds the lock: processes that inherit it hold the lock too.

    Raises:
        UserError: with the text of ``refusal``, where it belongs to another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: {refusal}") from error
        yield file.fileno()
