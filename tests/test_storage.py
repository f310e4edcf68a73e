"""A disk that is full, gone or read-only ends a run with one line, and what was written before it stands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import QUICK, Ended, end_here

from lifealign.command import hydra_command
from lifealign.memory import MemoryBank
from lifealign.run import train
from lifealign.runtime import checkpoint
from lifealign.runtime.checkpoint import NAME
from lifealign.trainer import Trainer

SMALL = "sequence.tasks=[instruct]", "checkpoint.every=1", "evaluation.metrics=[chosen_nll]", "cache.enabled=false"


def training(folder: Path, *overrides: str) -> Ended:
    return end_here(lambda: hydra_command(train), *QUICK, *SMALL, f"run.dir={folder}", *overrides)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of a test's own needs a right that is not given here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Until it takes no more, and it takes blocks of a page alone."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(1 << 16))
        except OSError:
            pass
    assert shutil.disk_usage(disk).free < 1 << 16


def fill_before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, disk: Path) -> None:
    """Fill the disk before the so manieth call of a function."""
    usual: Callable[..., object] = getattr(owner, name)
    calls: list[None] = []

    def call(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == number:
            fill(disk)
        return usual(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


MOMENTS = {"a step's line": (Trainer, "step", 3), "a checkpoint": (checkpoint, "save", 3), "memory": (MemoryBank, "append", 1)}


@pytest.mark.parametrize("moment", ["a step's line", *(pytest.param(m, marks=pytest.mark.slow) for m in [*MOMENTS][1:])])
def test_a_full_disk(moment: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = disk / "run"
    with monkeypatch.context() as patch:
        fill_before(patch, *MOMENTS[moment], disk)
        ended = training(folder)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {folder}: cannot be written ([Errno 28] No space left on device") or "os error 28" in line
    assert line.endswith("the newest checkpoint stands, and the same command goes on")
    finished = [path for path in (folder / "checkpoints").iterdir() if NAME.fullmatch(path.name)]
    assert finished and not [path for path in finished if checkpoint._look_at(path).problem]

    (disk / "filler").unlink()
    ended = training(folder)
    assert ended.code == 0, ended.err
    assert (folder / "report" / "index.html").exists()


def test_a_run_directory_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made again: what would come to stand there would be no run."""
    folder = tmp_path / "run"
    usual = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (usual(*a, **k), shutil.rmtree(folder))[0])
    ended = training(folder)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {folder}: cannot be written ([Errno 2]") and str(folder / "metrics.jsonl") in line
    assert line.endswith("the run starts anew")
    assert not folder.exists()


def test_a_run_directory_that_is_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = training(disk / "run")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: run.dir: [Errno 30]") and os.fspath(disk / "run") in line
