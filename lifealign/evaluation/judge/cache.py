"""Verdicts on disk, found again by what was asked, so that none is paid for twice.

``FOLDER/verdicts.jsonl`` grows by one line a verdict: ``key``, the SHA-256 of everything that was asked; ``verdict``, the
reply; ``check``, which says whether the line is whole. A line is written in one piece under the file's lock and flushed to
disk before :meth:`VerdictCache.add` returns, so several processes may write and a killed one loses nothing that it has
counted. A line that is cut or damaged is passed over, and what it held is asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

from lifealign.errors import UserError

FILE = "verdicts.jsonl"


def question_key(*asked: object) -> str:
    """SHA-256, 64 hexadecimal digits, of what a verdict depends on."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class VerdictCache:
    """The verdicts of a folder as they are when this is made, and those added since; for any number of threads.

    Args:
        folder: made where it is missing.

    Raises:
        UserError: where the file cannot be read and written: a verdict that cannot be kept is not to be paid for.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.damaged = 0  # lines that were passed over
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                content = file.read()
            _flush_entry(folder)
        except OSError as error:
            raise self._unusable(error) from error
        self._verdicts = self._read(content)

    def get(self, key: str) -> str | None:
        return self._verdicts.get(key)

    def add(self, key: str, verdict: str) -> None:
        """Keep a verdict; it is on disk when this returns. Raises UserError where it cannot be written."""
        line = json.dumps({"key": key, "verdict": verdict, "check": _check(key, verdict)}).encode() + b"\n"
        try:
            with self._lock, open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
                file.write(line if _ends_whole(self.path) else b"\n" + line)
                file.flush()
                os.fsync(file.fileno())
                self._verdicts[key] = verdict
        except OSError as error:
            raise self._unusable(error) from error

    def _read(self, content: bytes) -> dict[str, str]:
        verdicts = {}
        for line in content.splitlines():
            try:
                row = json.loads(line)
                key, verdict, check = row["key"], row["verdict"], row["check"]
            except (ValueError, TypeError, KeyError):
                self.damaged += bool(line)
                continue
            if check == _check(key, verdict):
                verdicts[key] = verdict
            else:
                self.damaged += 1
        return verdicts

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: verdicts cannot be kept ({error.strerror}); make room, or choose another cache.dir")


def _check(key: str, verdict: str) -> str:
    return question_key(key, verdict)[:16]


def _ends_whole(path: Path) -> bool:
    """Whether a line may follow: not where a power cut has left half a one."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() in (b"", b"\n")


def _flush_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
