"""Interrupted equals uninterrupted, between two stages and within one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import support
from endings import differences, rows

import lifealign.runtime.timing
from lifealign.assets import TINY_MODEL
from lifealign.command import hydra_command
from lifealign.errors import Interrupted as Stopped
from lifealign.errors import UserError
from lifealign.lifelong import Lifelong
from lifealign.run import train
from lifealign.runtime.checkpoint import newest_folder
from lifealign.runtime.timing import Timing
from lifealign.stages import StageOptions
from lifealign.trainer import Trainer


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def train_here(folder: Path, *overrides: str) -> Path:
    """A run with a cache of its own: what another run left there would be read, and so be logged, otherwise."""
    return support.train_here(folder, f"cache.dir={folder.parent / 'cache'}", *overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("phase", [1, 3, 5, *(pytest.param(phase, marks=pytest.mark.slow) for phase in (2, 4))])
def test_final_state_is_the_same_bit_for_bit(
    phase: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Lifelong._save, []

    def save_and_stop(self: Lifelong) -> None:
        save(self)
        saved.append(None)
        if len(saved) == phase:
            raise Interrupted

    monkeypatch.setattr(Lifelong, "_save", save_and_stop)
    with pytest.raises(Interrupted):
        train_here(tmp_path / "run")
    monkeypatch.undo()
    # What a run wrote after its last checkpoint must not count twice.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 999}\n')
    train_here(tmp_path / "run")

    assert differences(tmp_path / "run", uninterrupted) == []


# Two tasks of two stages; 16 pairs, 8 a step, 2 epochs: four steps a stage, and one more a batch of replayed pairs.
WITHIN = ("checkpoint.every=1", "model.lora.dropout=0.1")


@pytest.fixture(scope="module")
def uninterrupted_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("dropout") / "run", *WITHIN)


@pytest.mark.parametrize("number", [1, 5, 11, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 6, 8))])
def test_within_a_stage_bit_for_bit(
    number: int, uninterrupted_with_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, AdamW's moments, the schedule, dropout's draws, the rows still to come and every logged line."""
    save, saved = Lifelong._save_midway, []

    def save_and_stop(self: Lifelong, *args: object) -> None:
        save(self, *args)
        saved.append(self.position.phase)
        if len(saved) == number:
            raise Interrupted

    monkeypatch.setattr(Lifelong, "_save_midway", save_and_stop)
    with pytest.raises(Interrupted):
        train_here(tmp_path / "run", *WITHIN)
    monkeypatch.undo()
    assert "." in newest_folder(tmp_path / "run" / "checkpoints").name
    train_here(tmp_path / "run", *WITHIN)

    assert differences(tmp_path / "run", uninterrupted_with_dropout) == []


def test_figures_that_wait_for_their_line_put_a_checkpoint_off(tmp_path: Path) -> None:
    """A line every three steps, of steps 1, 4 and so on: of the checkpoints due after each step these remain."""
    folder = train_here(tmp_path / "run", "checkpoint.every=1", "checkpoint.keep=99", "tracking.log_every=3")
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert {name for name in names if name.startswith("00000.")} == {"00000.000001"}
    assert {name for name in names if name.startswith("00003.")} >= {"00003.000001", "00003.000004"}


def test_a_checkpoint_within_a_stage_is_no_part_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 4.0, 5.0, 11.0, 12.0])  # from 1 to 11 the stage, from 2 to 5 a checkpoint, which asks at 4
    monkeypatch.setattr(lifealign.runtime.timing.time, "perf_counter", lambda: next(clock))
    timing = Timing()
    timing.go_on({"saving": 2.0, "total": 3.0})
    with timing.of("sft"), timing.of("saving"):
        assert timing.now() == {"sft": 1.0, "saving": 4.0, "total": 7.0}
    assert timing.now() == {"sft": 7.0, "saving": 5.0, "total": 15.0}


def test_another_batch_size_is_refused_within_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Lifelong) -> None:
        raise Interrupted

    monkeypatch.setattr(Lifelong, "_save", stop)  # the one at the end of the first stage
    with pytest.raises(Interrupted):
        train_here(tmp_path / "run", "checkpoint.every=1")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"8 pairs a step, which would now have 4; run\.dir=.* resume=force sft\.batch_size=8 "):
        train_here(tmp_path / "run", "sft.batch_size=4", "resume=force")


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=r"holds a run without its checkpoints"):
        train_here(folder, "seed=1")
    assert (folder / "config.yaml").read_bytes() == (uninterrupted / "config.yaml").read_bytes()


def test_settings_with_which_a_run_cannot_go_on_leave_no_trace(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    for refused, said in (
        ("model.lora.r=16", "its adapter is of another shape"),
        ("sequence.tasks=[hc3]", "begin with"),
        ("strategy=kl", "was trained with strategy=lifealign, whose state says nothing to strategy=kl; give it"),
    ):
        with pytest.raises(UserError, match=said):
            train_here(folder, refused, "resume=force")
        assert (folder / "config.yaml").read_bytes() == (uninterrupted / "config.yaml").read_bytes()
        assert not (folder / "forced.jsonl").exists()


def interrupted_after_a_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends, as if it were killed, right behind its first checkpoint between stages."""
    save = Lifelong._save

    def save_and_stop(self: Lifelong) -> None:
        save(self)
        raise Interrupted

    monkeypatch.setattr(Lifelong, "_save", save_and_stop)
    with pytest.raises(Interrupted):
        train_here(folder)
    monkeypatch.undo()


def test_other_batches_are_refused_between_stages_and_force_accepts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with half of the ranks, where no batch size is set."""
    interrupted_after_a_stage(tmp_path / "run", monkeypatch)
    monkeypatch.setattr(StageOptions, "global_batch", lambda *_: 4)
    with pytest.raises(
        UserError,
        match=r"8 pairs a step in its sft stages, which would now have 4; run\.dir=.* resume=force sft\.batch_size=8 ",
    ):
        train_here(tmp_path / "run")
    train_here(tmp_path / "run", "resume=force")
    (forced,) = map(json.loads, (tmp_path / "run" / "forced.jsonl").read_text().splitlines())
    assert forced["changed"] == ["pairs a step, sft: 8 -> 4", "pairs a step, preference: 8 -> 4"]


def test_a_finished_run_is_not_run_again(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_text()
    train_here(uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_force_changes_nothing_of_a_run_that_is_finished(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing would be trained with the new settings, so none of its files may say that it was."""
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    before = (folder / "config.yaml").read_text()
    train_here(folder, "sft.lr=0.003", "resume=force")
    assert "nothing is left to do, so its settings stay what it was trained with" in capsys.readouterr().out
    assert (folder / "config.yaml").read_text() == before and "lr: 0.003" not in before
    assert "lr: 0.003" not in (folder / "report" / "index.html").read_text()
    assert not (folder / "forced.jsonl").exists()


def test_other_settings_are_refused_and_force_accepts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    interrupted_after_a_stage(folder, monkeypatch)
    with pytest.raises(UserError, match=r"sft\.lr: 0\.002 -> 0\.003.*resume=force"):
        train_here(folder, "sft.lr=0.003")
    assert not (folder / "forced.jsonl").exists()
    came_from = newest_folder(folder / "checkpoints").name
    train_here(folder, "sft.lr=0.003", "resume=force")
    train_here(folder, "sft.lr=0.003", "resume=force")  # nothing has changed since
    (forced,) = map(json.loads, (folder / "forced.jsonl").read_text().splitlines())
    assert forced["changed"] == ["sft.lr: 0.002 -> 0.003"]
    assert forced["from"] == came_from


def test_a_metric_that_a_finished_run_was_not_scored_by_is_no_reason_to_fail(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    config = support.compose_config(*support.QUICK, f"run.dir={folder}", "evaluation.metrics=[judge]", "resume=force")
    config.evaluation.judge.local = str(TINY_MODEL)
    assert train(config) is None


def test_never_refuses_a_directory_that_holds_a_run(uninterrupted: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run already"):
        train_here(uninterrupted, "resume=never")


def test_never_starts_over_beside_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("sequence.tasks=[instruct]", "data.max_train=8", "data.max_eval=4", "sft.epochs=0")
    words = (*support.QUICK, *words, "evaluation.metrics=[chosen_nll]", "run.name=one", "resume=never")
    for _ in range(3):
        assert support.end_here(lambda: hydra_command(train), *words).code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "one-2", "one-3"]
    steps = [[row["step"] for row in rows(folder) if row["kind"] == "step"] for folder in (tmp_path / "runs").iterdir()]
    assert steps[0] and steps[0] == steps[1] == steps[2]


def test_a_run_that_never_came_to_a_checkpoint_starts_over(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Lifelong) -> None:
        raise Interrupted

    monkeypatch.setattr(Lifelong, "_save", stop)
    with pytest.raises(Interrupted):
        train_here(tmp_path / "run")
    monkeypatch.undo()
    assert rows(tmp_path / "run")
    train_here(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(uninterrupted)


def test_a_finished_run_goes_on_with_a_task_added(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    before = json.loads((folder / "scores.json").read_text())["metrics"]["chosen_nll"]["matrix"]
    train_here(folder, "sequence.tasks=[instruct,hc3,truthfulqa]", "resume=force")
    scores = json.loads((folder / "scores.json").read_text())
    after = scores["metrics"]["chosen_nll"]["matrix"]
    assert scores["tasks"] == ["instruct", "hc3", "truthfulqa"]
    assert [row[:2] for row in after[:2]] == before
    assert all(isinstance(value, float) for value in after[2])
    with pytest.raises(UserError, match=r"sequence\.tasks: .* does not begin with"):
        train_here(folder, "sequence.tasks=[hc3,instruct,truthfulqa]", "resume=force")


def stopped_within_sft(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """A run that ended after the third step of its first stage, which has four."""
    save, saved = Lifelong._save_midway, []

    def save_and_stop(self: Lifelong, *args: object) -> None:
        save(self, *args)
        saved.append(None)
        if len(saved) == 3:
            raise Interrupted

    monkeypatch.setattr(Lifelong, "_save_midway", save_and_stop)
    with pytest.raises(Interrupted):
        train_here(folder, "checkpoint.every=1", *overrides)
    monkeypatch.undo()


def test_what_an_interrupted_stage_left_is_not_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to leave out the stage that it was in, a run goes on as one that never had it."""
    stopped_within_sft(tmp_path / "run", monkeypatch)
    train_here(tmp_path / "run", "checkpoint.every=1", "sft.epochs=0", "resume=force")
    train_here(tmp_path / "whole", "checkpoint.every=1", "sft.epochs=0")
    found, wanted = (
        [(row["task"], row["stage_step"], row["loss"]) for row in rows(tmp_path / name) if "accuracy" in row]
        for name in ("run", "whole")
    )
    assert len(found) == 10 and found == wanted


def test_a_stage_that_has_come_further_than_it_now_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_within_sft(tmp_path / "run", monkeypatch)
    with pytest.raises(UserError, match=r"interrupted at step 3 of a stage that would now have 2; give it the sft\.epochs"):
        train_here(tmp_path / "run", "checkpoint.every=1", "sft.epochs=1", "resume=force")


@pytest.mark.parametrize(("strategy", "phases"), [("lifealign", 3), ("gem", 3), ("ewc", 2)])
def test_another_base_under_the_same_path_is_refused(
    strategy: str, phases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of a base that is made again, or a name on the hub that comes to mean other weights. Forced, what the old one
    said of pairs is asked anew, of those that a strategy keeps, too, and of a task's own where nothing but its end is left."""
    save, saved = Lifelong._save, []

    def save_and_stop(self: Lifelong) -> None:
        save(self)
        saved.append(None)
        if len(saved) == phases:
            raise Interrupted

    chosen, folder = f"strategy={strategy}", tmp_path / "run"
    monkeypatch.setattr(Lifelong, "_save", save_and_stop)
    with pytest.raises(Interrupted):
        train_here(folder, chosen)  # after the first of two tasks, or before its end
    monkeypatch.setattr(Lifelong, "_save", save)
    monkeypatch.setattr("lifealign.models.scoring.base_hash", lambda _: "another")
    with pytest.raises(UserError, match="its base was another: other weights stand at model"):
        train_here(folder, chosen)
    assert not (folder / "forced.jsonl").exists()
    train_here(folder, chosen, "resume=force")
    (forced,) = map(json.loads, (folder / "forced.jsonl").read_text().splitlines())
    assert forced["changed"] == ["the base"]


def test_a_run_that_is_to_stop_does_not_wait_for_its_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to in the second of twelve steps, with a line every ten: it takes one more, and saves."""
    usual, steps = Trainer.step, []

    def step(self: Trainer, *args: object, **options: object) -> float:
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, *args, **options)

    monkeypatch.setattr(Trainer, "step", step)
    words = "sequence.tasks=[instruct]", "tracking.log_every=10", "sft.epochs=6", "checkpoint.every=100"
    with pytest.raises(Stopped, match="stopped by SIGTERM and saved"):
        train_here(tmp_path / "run", *words)
    assert len(steps) == 3 and newest_folder(tmp_path / "run" / "checkpoints").name == "00000.000003"
    monkeypatch.undo()
    adapters = [train_here(tmp_path / name, *words) / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_folders_of_tasks_that_are_done_again_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint, after the second task, is damaged: its adapter is none that the memory of the run speaks of."""
    folder = train_here(tmp_path / "run", "checkpoint.keep=9")
    for checkpoint in sorted((folder / "checkpoints").iterdir())[-3:]:
        (checkpoint / "state.json").write_text("{")
    monkeypatch.setattr(Lifelong, "_train", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        train_here(folder, "checkpoint.keep=9")
    assert [path.name for path in (folder / "tasks").iterdir()] == ["01_instruct"]
