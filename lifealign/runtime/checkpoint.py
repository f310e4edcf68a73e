"""Checkpoints of a run: written whole or not at all, checked before they are believed, and found again.

A checkpoint is a folder below ``checkpoints/``: ``NNNNN`` between two phases, ``NNNNN.SSSSSS`` after S steps of the stage
that follows. It holds ``state.json``, ``tensors.safetensors`` and, written last, ``manifest.json`` with the size and SHA-256
of both, of the files of the run directory without which it is nothing, and of itself. It is written beside, flushed and
renamed. One whose files are not what its manifest says is set aside, never used.

Of the files of the run directory a copy lies in ``checkpoints/files/`` under its SHA-256, one for all checkpoints that need
it. Where a file is damaged, or its copy, it is made again from the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.runtime.files import Seal, copy_file, file_seal, flush_folder, json_text, read_json, write_json, write_text
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
OWN = (STATE, TENSORS)
COPIES = "files"
NAME = re.compile(r"\d{5}(\.\d{6})?")
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two stages, or within one: JSON values, tensors by name, and files beside it."""

    name: str
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, Seal] = field(default_factory=dict)  # of the run directory that it needs, by their paths in it


def checkpoint_name(number: int, steps: int = 0) -> str:
    """Sorted as text, names are in the order in which checkpoints were made."""
    return f"{number:05d}.{steps:06d}" if steps else f"{number:05d}"


def save(folder: Path, new: Checkpoint, *, keep: int) -> None:
    """Write a checkpoint below ``folder`` and remove all but the newest ``keep``. Rank 0 only."""
    for file, seal in new.files.items():
        if not (copy := _copy(folder, seal)).exists():
            copy_file(folder.parent / file, copy)
    final, beside = folder / new.name, folder / f"{new.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in new.tensors.items()}, beside / TENSORS)
    write_text(beside / STATE, json.dumps(new.state, allow_nan=False))  # in one line: replayed pairs make it long
    seals = {**{file: file_seal(beside / file) for file in OWN}, **new.files}
    write_json(beside / MANIFEST, _manifest(seals))
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

    Newer ones, which are not as they were written, are renamed to ``NAME.damaged``, and a line says why.

    Raises:
        UserError: where there are checkpoints and none of them is good; they stay where they are, for one may want nothing
            but a file that a copy of the run has.
    """
    names = distributed.broadcast_object([path.name for path in _finished(folder)])
    bad: dict[str, str] = {}
    for name in reversed(names):
        findings = distributed.gather_objects(_look_at(folder / name))
        problem = next((finding.problem for finding in findings if finding.problem is not None), None)
        if problem is None:
            _set_aside(folder, bad)
            _mend({damaged for finding in findings for damaged in finding.damaged})
            return _read(folder / name)
        bad[name] = problem
    if any(distributed.gather_objects(folder.is_dir() and any(DAMAGED in path.name for path in folder.iterdir()))) or bad:
        why = "".join(f" (the newest, {name}: {problem})" for name, problem in list(bad.items())[:1])
        raise UserError(
            f"{folder}: no checkpoint is as it was written{why}, so the run cannot go on; take what is damaged from a copy "
            "of the run, or name another run.dir to start anew"
        )
    return None


FORCED = "forced.jsonl"
"""In the run directory: what ``resume=force`` went on with though it had changed, a line each time."""


def record_forced(run: Path, changed: Sequence[str]) -> None:
    """Note that a run goes on from its newest checkpoint with something that is no longer as it was. Rank 0 only."""
    newest = newest_folder(run / "checkpoints")
    row = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "from": newest.name if newest else None}
    with open(run / FORCED, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "changed": list(changed)}) + "\n")
    console.print(f"resume=force: goes on with {'; '.join(changed)}", markup=False, highlight=False)


class Damaged(NamedTuple):
    """A file of the run directory that is not what was written, or its copy, beside the other one, which is."""

    path: Path
    good: Path


class Finding(NamedTuple):
    """What a rank finds of a checkpoint."""

    problem: str | None  # why it cannot be used, if so
    damaged: tuple[Damaged, ...] = ()


def _look_at(path: Path) -> Finding:
    """Read every file that a checkpoint needs against the manifest."""
    folder, damaged = path.parent, []
    try:
        seals = _read_seals(path)
        for file in OWN:
            if file_seal(path / file) != seals[file]:
                return Finding(f"{file} is not what was written")
        with safe_open(path / TENSORS, "pt"):  # sealed by whoever wrote it, it may still be no file of tensors
            json.loads((path / STATE).read_bytes())
    except SafetensorError:
        return Finding(f"{TENSORS} holds no tensors")
    except OSError as error:
        return Finding(f"{Path(error.filename or path).name} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Finding(f"{MANIFEST} is not what was written")
    for file, seal in seals.items():
        if file not in OWN:
            both = folder.parent / file, _copy(folder, seal)
            good = [place for place in both if _is_sealed(place, seal)]
            if not good:
                return Finding(f"{file} is not what was written, nor is its copy")
            damaged += [Damaged(place, good[0]) for place in both if place not in good]
    return Finding(None, tuple(damaged))


def _manifest(seals: Mapping[str, Seal]) -> dict[str, Any]:
    return {"files": dict(seals), "sha256": hashlib.sha256(json_text(dict(seals)).encode()).hexdigest()}


def _read_seals(path: Path) -> dict[str, Seal]:
    """What the manifest says; ValueError, KeyError, TypeError or AttributeError where it is none, and OSError."""
    content = (path / MANIFEST).read_bytes()
    seals = json.loads(content)["files"]
    if content != json_text(_manifest(seals)).encode():
        raise ValueError("not as it was written")
    for file, seal in seals.items():
        where = PurePosixPath(file)
        if where.is_absolute() or ".." in where.parts or not re.fullmatch(r"[0-9a-f]{64}", seal["sha256"]):
            raise ValueError(f"{file} leads elsewhere")
    return seals


def _is_sealed(path: Path, seal: Seal) -> bool:
    try:
        return file_seal(path) == seal
    except (OSError, ValueError):  # such as a name that no file can have
        return False


def _copy(folder: Path, seal: Seal) -> Path:
    return folder / COPIES / seal["sha256"]


def _read(path: Path) -> Checkpoint:
    files = {file: seal for file, seal in _read_seals(path).items() if file not in OWN}
    return Checkpoint(path.name, read_json(path / STATE), load_file(path / TENSORS), files)


def _mend(damaged: Collection[Damaged]) -> None:
    """Make damaged files again."""
    for path, good in sorted(damaged) if distributed.is_main() else ():
        line = f"{path} is not what was written; made again from {good}"
        log.warning(line)
        console.print(line, markup=False)
        copy_file(good, path)
    distributed.barrier()


def _set_aside(folder: Path, bad: Mapping[str, str]) -> None:
    """Out of the way of checkpoints to come, which may have these names, and there to be looked at."""
    for name, problem in bad.items() if distributed.is_main() else ():
        line = f"checkpoint {name} is set aside as {name}{DAMAGED}: {problem}"
        log.warning(line)
        console.print(line, markup=False)
        shutil.rmtree(folder / f"{name}{DAMAGED}", ignore_errors=True)
        (folder / name).rename(folder / f"{name}{DAMAGED}")
    distributed.barrier()


def _finished(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if NAME.fullmatch(path.name))
