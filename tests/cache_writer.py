"""One of several processes that write a cache at once: ``python tests/cache_writer.py FOLDER N``. Starts without torch."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from lifealign.models.reference_cache import ReferenceCache

BASE = "a" * 64
ROOMY = 2**30


def keys(*names: object) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest() for name in names]


def values(*names: object) -> np.ndarray:
    """(names, 2) float32 that follow from the names, so that a reader knows what a writer must have meant."""
    return np.array([np.frombuffer(key[:4], np.uint16) / np.float32(-7) for key in keys(*names)], np.float32)


def write_many(folder: Path, number: int) -> None:
    """Twenty segments, every other one of which all writers write."""
    cache = ReferenceCache(folder, BASE, ROOMY)
    for turn in range(20):
        name = f"common {turn}" if turn % 2 else f"of {number} {turn}"
        cache.add(keys(name, f"{name} too"), values(name, f"{name} too"))


if __name__ == "__main__":
    write_many(Path(sys.argv[1]), int(sys.argv[2]))
