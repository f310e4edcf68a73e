"""Checkpoints of a run: written whole or not at all, checked before they are believed, and found again.

A checkpoint is a folder below ``checkpoints/``: ``NNNNN`` between two phases, ``NNNNN.SSSSSS`` after S steps of the stage
that follows. It holds ``state.json``, ``tensors.safetensors`` and, written last, ``manifest.json`` with the size and SHA-256
of both. It is written beside, flushed and renamed. One whose files are not what its manifest says is set aside, never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.runtime.files import flush_folder, read_json, write_json
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
NAME = re.compile(r"\d{5}(\.\d{6})?")
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two stages, or within one: JSON values, and tensors by name."""

    name: str
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def checkpoint_name(number: int, steps: int = 0) -> str:
    """Sorted as text, names are in the order in which checkpoints were made."""
    return f"{number:05d}.{steps:06d}" if steps else f"{number:05d}"


def save(folder: Path, name: str, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, keep: int) -> None:
    """Write a checkpoint below ``folder`` and remove all but the newest ``keep``. Rank 0 only."""
    final, beside = folder / name, folder / f"{name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, beside / TENSORS)
    write_json(beside / STATE, dict(state))
    write_json(beside / MANIFEST, {file: _seal(beside / file) for file in (STATE, TENSORS)})
    flush_folder(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    flush_folder(folder)
    for old in _finished(folder)[:-keep]:
        shutil.rmtree(old)


def newest_folder(folder: Path) -> Path | None:
    """Where the newest checkpoint below ``folder`` stands, its content not looked at; None where there is none."""
    finished = _finished(folder)
    return finished[-1] if finished else None


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that every rank finds as it was written; None where none was ever made. Call on every rank.

    Those that are not as they were written are renamed to ``NAME.damaged``, and a line says why.

    Raises:
        UserError: where there are checkpoints and none of them is good.
    """
    names = distributed.broadcast_object([path.name for path in _finished(folder)])
    for name in reversed(names):
        problem = next((p for p in distributed.gather_objects(_problem(folder / name)) if p is not None), None)
        if problem is None:
            return Checkpoint(name, read_json(folder / name / STATE), load_file(folder / name / TENSORS))
        _set_aside(folder / name, problem)
    if any(distributed.gather_objects(folder.is_dir() and any(DAMAGED in path.name for path in folder.iterdir()))):
        raise UserError(
            f"{folder}: no checkpoint is as it was written, so the run cannot go on; take one from a copy of the run, or "
            "name another run.dir to start anew"
        )
    return None


FORCED = "forced.jsonl"
"""In the run directory: what ``resume=force`` went on with though it had changed, a line each time."""


def record_forced(run: Path, changed: Sequence[str]) -> None:
    """Note that a run goes on from its newest checkpoint with something that is no longer as it was. Rank 0 only."""
    newest = newest_folder(run / "checkpoints")
    row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "from": newest.name if newest else None}
    with open(run / FORCED, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "changed": list(changed)}) + "\n")
    console.print(f"resume=force: goes on with {'; '.join(changed)}", markup=False, highlight=False)


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, if so."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for file in (STATE, TENSORS):
            if _seal(path / file) != manifest[file]:
                return f"{file} is not what was written"
        with safe_open(path / TENSORS, "pt"):  # sealed by whoever wrote it, it may still be no file of tensors
            json.loads((path / STATE).read_bytes())
    except SafetensorError:
        return f"{TENSORS} holds no tensors"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not what was written"
    return None


def _set_aside(path: Path, problem: str) -> None:
    """Out of the way of checkpoints to come, which may have its name, and there to be looked at."""
    if distributed.is_main():
        line = f"checkpoint {path.name} is set aside as {path.name}{DAMAGED}: {problem}"
        log.warning(line)
        console.print(line, markup=False)
        shutil.rmtree(path.with_name(path.name + DAMAGED), ignore_errors=True)
        path.rename(path.with_name(path.name + DAMAGED))
    distributed.barrier()


def _seal(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _finished(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if NAME.fullmatch(path.name))
