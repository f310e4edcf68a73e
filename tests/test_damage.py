"""Damage to what a run would go on from: every file cut, deleted and a bit of it turned, on one rank and on two.

The file is its own worker: ``deepspeed --num_gpus 2 tests/test_damage.py FOLDER`` goes through every case in two ranks, in
one launch, and leaves what came out in FOLDER.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from endings import differences
from support import command, train_here

from lifealign.command import without_local_rank
from lifealign.errors import UserError
from lifealign.lifelong import Lifelong
from lifealign.memory import MemoryBank
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.checkpoint import NAME, Checkpoint, Finding
from lifealign.runtime.files import file_seal, write_json


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, place: int | None = None, bit: int = 0) -> None:
    """Turn a bit, of the byte in the middle where no place is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {"truncated": truncate, "deleted": os.unlink, "flipped": flip}

# -- checkpoints alone -------------------------------------------------------------------------------------------------

MEMORY = "memory/000_hc3_sft/shard-0.safetensors"


def saved(run: Path) -> Path:
    """Two checkpoints of a run, the newer of which needs a file beside them; returns the newer one's folder."""
    (run / MEMORY).parent.mkdir(parents=True)
    (run / MEMORY).write_bytes(bytes(range(40)))
    files = {MEMORY: file_seal(run / MEMORY)}
    for number, needs in enumerate(({}, files)):
        tensors = {"adapter/a": torch.arange(4.0) + number}
        checkpoint.save(run / "checkpoints", Checkpoint(f"0000{number}", {"task": number}, tensors, needs), keep=2)
    return run / "checkpoints" / "00001"


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", pytest.param("manifest.json", marks=pytest.mark.slow)])
def test_no_bit_of_a_checkpoint_turns_unseen(file: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert checkpoint._look_at(path) == Finding(None)
    whole = (path / file).read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            flip(path / file, place, bit)
            assert checkpoint._look_at(path).problem is not None, (place, bit)
            (path / file).write_bytes(whole)


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_used(damage: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    DAMAGE[damage](path / file)
    found = checkpoint.newest(path.parent)
    assert found is not None
    assert (found.name, found.state, found.files) == ("00000", {"task": 0}, {})
    assert capsys.readouterr().out.startswith(f"checkpoint 00001 is set aside as 00001.damaged: {file} ")


@pytest.mark.parametrize("which", ["file", "copy"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_beside_and_its_copy_are_made_again_from_each_other(
    damage: str, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path)
    (copy,) = (path.parent / "files").iterdir()
    both = {"file": tmp_path / MEMORY, "copy": copy}
    DAMAGE[damage](both[which])
    found = checkpoint.newest(path.parent)
    assert found is not None
    assert found.name == "00001"
    assert both["file"].read_bytes() == both["copy"].read_bytes() == bytes(range(40))
    assert f"{both[which]} is not what was written; made again from" in capsys.readouterr().out
    checkpoint.newest(path.parent)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_beside_that_is_lost_with_its_copy_makes_the_checkpoint_bad(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path)
    for lost in (tmp_path / MEMORY, *(path.parent / "files").iterdir()):
        DAMAGE[damage](lost)
    found = checkpoint.newest(path.parent)
    assert found is not None
    assert found.name == "00000"
    assert f"{MEMORY} is not what was written, nor is its copy" in capsys.readouterr().out


def test_where_none_is_good_all_stay_and_one_may_be_mended(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path.parent / "00000" / "state.json").unlink()
    whole = (path / "state.json").read_bytes()
    truncate(path / "state.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint is as it was written \(the newest, 00001: state\.json is not"):
            checkpoint.newest(path.parent)
    (path / "state.json").write_bytes(whole)
    found = checkpoint.newest(path.parent)
    assert found is not None
    assert found.name == "00001"


@pytest.mark.parametrize(
    "files",
    [
        {"../outside": {"bytes": 7, "sha256": "0" * 64}},
        {"/etc/hostname": {"bytes": 7, "sha256": "0" * 64}},
        {"memory/x": {"bytes": 7, "sha256": "../../outside"}},
    ],
)
def test_a_manifest_leads_nowhere_else(files: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "run")
    (tmp_path / "outside").write_text("outside")
    for value in files.values():
        if value["sha256"] == "0" * 64:
            value["sha256"] = file_seal(tmp_path / "outside")["sha256"]
    seals = json.loads((path / "manifest.json").read_text())["files"]
    assert checkpoint._read_seals(path) == seals
    write_json(path / "manifest.json", checkpoint._manifest({**seals, **files}))
    assert checkpoint._look_at(path).problem == "manifest.json is not what was written"


def test_a_manifest_that_names_no_possible_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    seals = {**checkpoint._read_seals(path), "memory/\0": {"bytes": 1, "sha256": "0" * 64}}
    write_json(path / "manifest.json", checkpoint._manifest(seals))
    assert "nor is its copy" in str(checkpoint._look_at(path).problem)


# -- runs --------------------------------------------------------------------------------------------------------------

SETTINGS = (
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "evaluation.metrics=[mean_log_sigmoid]",
    "cache.enabled=false",
    "sft.micro_batch_size=2",
    "preference.micro_batch_size=2",
)
NEWEST, BEFORE, ENTRY = "00005", "00004.000004", "memory/003_hc3_preference"
"""The run is ended once the second task's second stage is in the ledger and saved; the checkpoint before is within it."""


class Ended(Exception):
    """Stands for whatever ends a run."""


def end_early(folder: Path) -> None:
    save = Lifelong._save

    def save_and_end(self: Lifelong) -> None:
        save(self)
        if (self.position.task, self.position.phase) == (1, "commit"):
            raise Ended

    with mock.patch.object(Lifelong, "_save", save_and_end), pytest.raises(Ended):
        train_here(folder, *SETTINGS)


@dataclass(frozen=True)
class Case:
    """A file of the run directory that is damaged, and what the run is to go on from."""

    file: str
    damage: str
    with_copy: bool = False

    @property
    def goes_on_from(self) -> str:
        return BEFORE if self.file.startswith("checkpoints/") or self.with_copy else NEWEST

    def apply(self, run: Path) -> None:
        if self.with_copy:
            DAMAGE[self.damage](run / "checkpoints" / "files" / file_seal(run / self.file)["sha256"])
        DAMAGE[self.damage](run / self.file)

    def __str__(self) -> str:
        return f"{self.file}{' and its copy' if self.with_copy else ''} {self.damage}"


def cases(ranks: int) -> list[Case]:
    own = [f"checkpoints/{NEWEST}/{file}" for file in ("state.json", "tensors.safetensors", "manifest.json")]
    entry = [f"{ENTRY}/{file}" for file in ("details.json", *(f"shard-{rank}.safetensors" for rank in range(ranks)))]
    every = [Case(file, damage) for file in (*own, *entry, "memory/ledger.json") for damage in DAMAGE]
    return [*every, *(Case(file, damage, with_copy=True) for file in entry for damage in DAMAGE)]


def go_on(folder: Path) -> tuple[str, float]:
    """The same command again; returns what it went on from, and the seconds until it knew."""
    found, started = [], time.monotonic()
    newest = checkpoint.newest

    def noting(where: Path) -> Checkpoint | None:
        taken = newest(where)
        found.append(("" if taken is None else taken.name, time.monotonic() - started))
        return taken

    with mock.patch.object(checkpoint, "newest", noting):
        train_here(folder, *SETTINGS)
    return found[0]


def in_two_ranks(where: Path) -> None:
    """What the worker does: every case, and one that rank 1 alone can see."""
    train_here(where / "whole", *SETTINGS)
    end_early(where / "ended")
    for number, case in enumerate([*cases(2), None]):
        run = where / str(number)
        if distributed.is_main():
            shutil.copytree(where / "ended", run)
            if case is not None:
                case.apply(run)
        distributed.barrier()
        look_at = checkpoint._look_at

        def on_rank_1(path: Path, look_at: Callable[[Path], Finding] = look_at) -> Finding:
            return Finding("cannot be seen from here") if path.name == NEWEST and distributed.rank() == 1 else look_at(path)

        with mock.patch.object(checkpoint, "_look_at", look_at if case is not None else on_rank_1):
            from_where = distributed.gather_objects(go_on(run))
        if distributed.is_main():
            names, seconds = zip(*from_where, strict=True)
            outcome = {"from": names, "seconds": max(seconds), "differences": differences(run, where / "whole")}
            (where / f"{number}.json").write_text(json.dumps(outcome))
            shutil.rmtree(run)


if __name__ == "__main__":
    in_two_ranks(Path(without_local_rank(sys.argv[1:])[0]))
    distributed.stop()
    sys.exit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "run"
    end_early(folder)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir() if NAME.fullmatch(path.name))
    assert names[-2:] == [BEFORE, NEWEST]
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "adapter/adapter_model.safetensors",
        "tasks/01_instruct/adapter/adapter_model.safetensors",
        "tasks/02_hc3/predictions.jsonl",
        "scores.json",
    ],
)
def test_a_comparison_of_runs_sees_a_bit(file: str, whole: Path, tmp_path: Path) -> None:
    """Otherwise the tests below, and the soak, would pass for ever."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert differences(run, whole) == []
    flip(run / file, bit=2)
    assert differences(run, whole) in ([file], [file.rpartition("/")[0]])
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log.replace('"step": 3,', '"step": 4,', 1))
    assert "metrics.jsonl" in differences(run, whole)


def test_a_comparison_of_runs_sees_another_memory(whole: Path, tmp_path: Path) -> None:
    """A tensor, hashed anew: an update that is whole, and another one."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    bank = MemoryBank(run / "memory")
    bank.load(json.loads((run / "memory" / "ledger.json").read_text())["entries"][:-1], {})
    bank.append({"task": "hc3", "stage": "preference"}, {"a": torch.zeros(2)}, [], {})
    assert differences(run, whole) == ["memory/ledger.json"]


QUICK = [
    Case(f"checkpoints/{NEWEST}/tensors.safetensors", "flipped"),
    Case(f"{ENTRY}/shard-0.safetensors", "truncated", with_copy=True),
    Case("memory/ledger.json", "deleted"),
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c in QUICK else pytest.mark.slow) for c in cases(ranks=1)]
)
def test_a_damaged_run_goes_on_to_the_same_end(case: Case, ended: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    case.apply(run)
    found, seconds = go_on(run)
    assert found == case.goes_on_from
    assert seconds < 60
    assert (run / "checkpoints" / f"{NEWEST}.damaged").exists() == (found == BEFORE)
    assert differences(run, whole) == []


def test_without_a_good_checkpoint_the_run_does_not_start_over(ended: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    for path in (run / "checkpoints").glob("0*"):
        flip(path / "tensors.safetensors")
    log = (run / "metrics.jsonl").read_text()
    for _ in range(2):  # and stays so
        with pytest.raises(UserError, match=r"no checkpoint is as it was written"):
            train_here(run, *SETTINGS)
    assert (run / "metrics.jsonl").read_text() == log


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ended = command("deepspeed", "--num_gpus", "2", __file__, str(folder), timeout=1700)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(cases(2)) + 1), ids=[*map(str, cases(2)), "seen by rank 1 alone"])
def test_two_ranks_agree(number: int, two_ranks: Path) -> None:
    outcome = json.loads((two_ranks / f"{number}.json").read_text())
    expected = [*(case.goes_on_from for case in cases(2)), BEFORE][number]
    assert outcome["from"] == [expected, expected]
    assert outcome["seconds"] < 60
    assert outcome["differences"] == []
