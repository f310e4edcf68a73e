"""Checkpoints of a run at the boundaries of stages: written whole or not at all, and found again.

A checkpoint is a folder ``checkpoints/NNNNN`` with ``state.json`` and ``tensors.safetensors``. It is written beside,
flushed, and renamed; what cannot be read as a finished checkpoint is not one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lifealign.runtime.files import flush_folder, read_json, write_json

STATE, TENSORS = "state.json", "tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two stages: JSON values, and tensors by name."""

    number: int
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def save(folder: Path, number: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, keep: int) -> None:
    """Write checkpoint ``number`` below ``folder`` and remove all but the newest ``keep``. Rank 0 only."""
    final = folder / f"{number:05d}"
    beside = folder / f"{number:05d}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, beside / TENSORS)
    write_json(beside / STATE, dict(state))
    flush_folder(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    flush_folder(folder)
    for old in _finished(folder)[:-keep]:
        shutil.rmtree(old)


def newest_folder(folder: Path) -> Path | None:
    """Where the newest checkpoint below ``folder`` stands; None where there is none."""
    finished = _finished(folder)
    return finished[-1] if finished else None


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint below ``folder``; None where there is none."""
    path = newest_folder(folder)
    if path is None:
        return None
    return Checkpoint(int(path.name), read_json(path / STATE), load_file(path / TENSORS))


def _finished(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.name.isdigit() and (p / STATE).exists())
