"""Reference log-probabilities on disk, found again by content.

``FOLDER/BASE/`` holds what one base, known by its hash, says of pairs:

- ``SEGMENT.safetensors``: ``keys`` (n, 32) uint8, the hashes of n pairs' token ids, and ``logps`` (n, 2) float32;
- ``base.json``: what the base is, for people to read.

A segment never changes once it stands. It is written beside under a name that nobody else has, then renamed, so any number
of processes on any number of machines may read and write without locks; and it is named after the SHA-256 of its bytes, so
damage is noticed. Nothing here imports torch or talks to other ranks: a run calls it on rank 0, and ``launch/cache.py``
answers at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

log = logging.getLogger(__name__)

DEFAULT_MAX_MIB = 1024
KEY_BYTES = 32
SUFFIX, PARTIAL, ABOUT = ".safetensors", ".partial", "base.json"
LEFTOVER_SECONDS = 24 * 3600
"""A temporary file older than this is that of a process that was killed."""


def reference_folder(chosen: str | None) -> Path:
    """The cache's folder below ``cache.dir``, or, where that is None, below the place that the environment names."""
    if chosen is None:
        chosen = os.environ.get("LIFEALIGN_CACHE") or None
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lifealign" if chosen is None else Path(chosen)
    return root.expanduser() / "reference"


class _Segment(NamedTuple):
    keys: bytes  # KEY_BYTES a pair
    logps: np.ndarray  # (n, 2) float32

    def rows(self) -> Iterator[tuple[bytes, np.ndarray]]:
        starts = range(0, len(self.keys), KEY_BYTES)
        return zip((self.keys[start : start + KEY_BYTES] for start in starts), self.logps, strict=True)


_NOTHING = _Segment(b"", np.empty((0, 2), np.float32))


class ReferenceCache:
    """One base's part of the cache, for one process. A disk that fails costs a warning and the pairs on it, never the run.

    Args:
        folder: the cache's folder, made at the first write.
        base: hash of the base, 64 hexadecimal digits.
        max_bytes: size of all segments of all bases above which the least recently used ones leave.
        about: what ``base.json`` says.
    """

    def __init__(self, folder: Path, base: str, max_bytes: int, about: Mapping[str, str] | None = None) -> None:
        self.folder, self.home, self.max_bytes, self.about = folder, folder / base, max_bytes, dict(about or {})
        self._segments: dict[str, _Segment] = {}
        self._writes = True

    def lookup(self, keys: Collection[bytes]) -> dict[bytes, tuple[float, float]]:
        """Log-probabilities, chosen first, of those pairs that are there; segments of other processes are seen as well."""
        self._read_new()
        wanted, found = set(keys), {}
        for name, segment in self._segments.items():
            hits = {key: (float(row[0]), float(row[1])) for key, row in segment.rows() if key in wanted and key not in found}
            if hits:
                found.update(hits)
                with suppress(OSError):  # gone meanwhile, or not ours to touch
                    os.utime(self.home / name)
        return found

    def add(self, keys: Sequence[bytes], logps: np.ndarray) -> None:
        """Write pairs that were missing as one segment, and hold the cache to its size; ``logps`` is (keys, 2) float32."""
        if not self._writes or not keys:
            return
        whole = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "logps": np.ascontiguousarray(logps, np.float32),
        }
        content = save(whole)
        path = self.home / (_sha256(content) + SUFFIX)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            if not (self.home / ABOUT).exists():
                about = {**self.about, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                _write(self.home / ABOUT, json.dumps(about, indent=2).encode())
            _write(path, content)
            self._segments[path.name] = _Segment(whole["keys"].tobytes(), whole["logps"])
            _remove_leftovers(self.folder)
            _hold_bound(self.folder, self.max_bytes, keep=path)
        except OSError as error:
            self._writes = False
            log.warning("the cache of reference log-probabilities is not written any more: %s", error)

    def _read_new(self) -> None:
        paths: list[Path] = []
        with suppress(OSError):  # a folder that cannot be reached holds nothing
            paths = sorted(self.home.glob("*" + SUFFIX))
        for path in paths:
            if path.name not in self._segments and (segment := _read(path)) is not None:
                self._segments[path.name] = segment


def _read(path: Path) -> _Segment | None:
    """A segment; an empty one in the place of one that cannot be used, and None where it is gone."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # another process has made room
        return None
    except OSError as error:
        log.warning("%s cannot be read, its pairs are computed again: %s", path, error)
        return _NOTHING
    if _sha256(content) != path.stem:
        log.warning("%s is damaged; it is removed and its pairs are computed again", path)
        with suppress(OSError):  # another process was first, or the folder is read-only
            path.unlink()
        return _NOTHING
    tensors = load(content)
    return _Segment(tensors["keys"].tobytes(), tensors["logps"])


def _write(path: Path, content: bytes) -> None:
    """Write beside, under a name that no other process has, and rename; raises OSError and then leaves nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}{PARTIAL}")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("*/.*" + PARTIAL):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _hold_bound(folder: Path, max_bytes: int, *, keep: Path) -> None:
    """Remove the least recently used segments of all bases until the rest fits; ``keep`` stays whatever its size."""
    found = []
    for path in folder.glob("*/*" + SUFFIX):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        if path != keep:
            with suppress(OSError):  # not ours to remove
                path.unlink(missing_ok=True)
                total -= size


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- what a person may ask ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedBase:
    """What the cache holds of one base. ``last_used`` is in seconds since 1970."""

    name: str
    about: Mapping[str, Any]
    pairs: int
    size: int  # bytes
    last_used: float


def cached_bases(folder: Path) -> list[CachedBase]:
    """Every base that has a segment, the most recently used first."""
    bases = []
    for home in _homes(folder):
        stats, pairs = [], 0
        for path in home.glob("*" + SUFFIX):
            with suppress(FileNotFoundError):
                stats.append(path.stat())
                pairs += _count(path)
        if stats:
            used = max(stat.st_mtime for stat in stats)
            bases.append(CachedBase(home.name, _about(home), pairs, sum(stat.st_size for stat in stats), used))
    return sorted(bases, key=lambda base: -base.last_used)


def clear(folder: Path, name: str | None = None) -> None:
    """Remove what the cache holds of all bases, or of the one with this hash; nothing else that lies there.

    Raises:
        OSError: where something cannot be removed.
    """
    for home in _homes(folder):
        if name in (None, home.name):
            for path in [*home.glob("*" + SUFFIX), *home.glob(".*" + PARTIAL), home / ABOUT]:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a run is writing into it at this moment
                home.rmdir()


def _homes(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if re.fullmatch(r"[0-9a-f]{64}", path.name)]


def _count(path: Path) -> int:
    """Pairs in a segment by its header; none in a damaged one."""
    try:
        with safe_open(path, "numpy") as file:
            return file.get_slice("keys").get_shape()[0]
    except (SafetensorError, OSError):
        return 0


def _about(home: Path) -> dict[str, Any]:
    try:
        about = json.loads((home / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
