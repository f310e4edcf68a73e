"""Interrupted within a stage under ZeRO 0 to 3: the same to the bit on as many ranks, the same rows and losses on others.

The file is its own worker: ``deepspeed --num_gpus 2 tests/test_resume_ranks.py FOLDER PART STAGE...`` runs a part of the test
in two ranks, in one launch, into FOLDER.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from endings import differences
from support import command, train_here

from lifealign.command import without_local_rank
from lifealign.lifelong import Lifelong
from lifealign.runtime import distributed

STAGES = (0, 1, 2, 3)

COMMON = ("checkpoint.every=1", "evaluation.metrics=[mean_log_sigmoid,chosen_nll]", "cache.enabled=false", "objective=dpo")
"""Two tasks of four or more steps in each of two stages."""


class Stopped(Exception):
    """Stands for whatever ends a run."""


def run(folder: Path, stage: int, *more: str, stop_at: tuple[int, str, int] | None = None) -> None:
    """Train, or go on; with ``stop_at`` until a checkpoint in that task, phase and step is written."""
    settings = ("zero.settings.stage3_param_persistence_threshold=0",) if stage == 3 else ()
    with mock.patch.object(Lifelong, "_save_midway", _stopping(Lifelong._save_midway, stop_at)):
        if stop_at is None:
            train_here(folder, *COMMON, f"zero={stage}", *settings, *more)
            return
        with pytest.raises(Stopped):
            train_here(folder, *COMMON, f"zero={stage}", *settings, *more)


def _stopping(save: Callable[..., None], stop_at: tuple[int, str, int] | None) -> Callable[..., None]:
    def save_and_stop(self: Lifelong, trainer: Any, steps: int) -> None:
        save(self, trainer, steps)
        if (self.position.task, self.position.phase, steps) == stop_at:
            raise Stopped

    return save_and_stop


FIRST, SECOND = (0, "sft", 2), (1, "preference", 3)
WENT_ON = (
    "resumed at task 1, sft, from checkpoint 00000.000002",
    "resumed at task 2, preference, from checkpoint 00004.000003",
)
DROPOUT = "model.lora.dropout=0.1"  # drawn anew by each rank, so that both must go on with their own draws

if __name__ == "__main__":
    where, part, *stages = without_local_rank(sys.argv[1:])
    for zero_stage in map(int, stages):
        own = Path(where) / str(zero_stage)
        if part == "same":
            run(own / "whole", zero_stage, DROPOUT)
            run(own / "resumed", zero_stage, DROPOUT, stop_at=FIRST)
            run(own / "resumed", zero_stage, DROPOUT, stop_at=SECOND)
            run(own / "resumed", zero_stage, DROPOUT)
        else:
            run(own, zero_stage, stop_at=SECOND)
    distributed.stop()
    sys.exit()


def in_two_ranks(folder: Path, part: str, *stages: int) -> None:
    ended = command("deepspeed", "--num_gpus", "2", __file__, str(folder), part, *map(str, stages), timeout=290)
    assert ended.returncode == 0, ended.stderr[-2000:]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == "step"]


def went_on(folder: Path) -> bool:
    """Whether a run was resumed at both stops, and not begun again."""
    said = (folder / "run.log").read_text()
    return all(said.count(line) == 1 for line in WENT_ON)


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank up to the first stop, two up to the second, one to the end."""
    folder = tmp_path_factory.mktemp("changing")
    for stage in STAGES:
        run(folder / str(stage), stage, stop_at=FIRST)
    in_two_ranks(folder, "other", *STAGES)
    for stage in STAGES:
        run(folder / str(stage), stage)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder, 0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_to_the_bit(stage: int, tmp_path: Path) -> None:
    in_two_ranks(tmp_path, "same", stage)
    whole, resumed = tmp_path / str(stage) / "whole", tmp_path / str(stage) / "resumed"
    assert went_on(resumed)
    assert differences(resumed, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_ranks_goes_on_with_the_same_rows(stage: int, changing: Path, one_rank: Path) -> None:
    """Losses of other rows, or of weights without their moments, would differ in the first digits."""
    rows, expected = steps_of(changing / str(stage)), steps_of(one_rank)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["lr"] for row in rows] == [row["lr"] for row in expected]
    for row, expected_row in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-3)
    assert went_on(changing / str(stage))
