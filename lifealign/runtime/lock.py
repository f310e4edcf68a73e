"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lifealign.errors import UserError


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[int]:
    """Inside, the folder belongs to this process; the system lets go of it when the process ends, however that happens.

    Yields the descriptor that holds the lock: processes that inherit it hold the lock too.

    Raises:
        UserError: with the text of ``refusal``, where it belongs to another; or where its file is a symbolic link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open(folder / "lock")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: {refusal}") from error
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of the file, made where there is none; what it holds stays. A link may lead to a file of somebody's."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a symbolic link; a run writes to files of its own, so remove the link") from error
        raise
