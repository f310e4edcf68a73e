"""Studies: what is asked for, which cells that makes, how they are run, resumed and ended; and one small study whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from support import REPOSITORY, command, end_here

from lifealign.command import conf_dir, exit_codes
from lifealign.config import resolved
from lifealign.errors import DIVERGED, UserError
from lifealign.evaluation.scores import ScoreBook
from lifealign.runtime.files import read_json, write_json
from lifealign.runtime.lock import locked
from lifealign.study.command import study
from lifealign.study.grid import ANY, Cell, Grid, merged
from lifealign.study.options import load, read_arguments
from lifealign.study.origin import commit, machine
from lifealign.study.record import check_settings, is_finished, read_record
from lifealign.study.runner import BUSY, Runner
from lifealign.study.tuning import best_scale, choose, trials

STUDIES = sorted(path.stem for path in (conf_dir() / "study").glob("*.yaml"))
WITH_BUFFER, EVERY_REGIME = "study.only=[seqft,er]", "study.only_regimes=null"

# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_reads(name: str) -> None:
    options = load(name)
    assert options.compared in options.methods
    assert options.tuning is not None and options.tuning.scales == [0.5, 1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["+study=mian"], "did you mean 'main'"),
        ([], "name one study"),
        (["study=main", "study.sedes=[1]"], "did you mean 'seeds'"),
        (["study=main", "study.seeds=x"], "study.seeds=x"),
        (["study=main", "study.parallel=0"], "study.parallel=0"),
        (["study=main", "study.tuning.scales=[0,1]"], "study.tuning.scales=[0.0, 1.0]"),
        (["study=main", "study.only=[erx]"], "did you mean 'er'"),
        (
            ["study=main", "study.compared=lifealing"],
            "there is no such method; did you mean 'lifealign'",
        ),
        (["study=main", "study.paper=mian"], "study.paper=mian: there is no such table; did you mean 'main'"),
        (["study=main", "study.only=[]"], "study.only is empty; name at least one label (null: all)"),
        (["study=main", "study.only_regimes=[]"], "study.only_regimes is empty; name at least one label (null: all)"),
        (["study=main", "study.only_regimes=[non]"], "did you mean 'none'"),
        (["study=main", "study.methods.er.tuned_as=nobody"], "study.methods.er.tuned_as=nobody"),
        (["study=main", "seed=3"], "study.seeds"),
        (["study=main", "run.dir=x"], "study.dir"),
        (["study=main", "-m"], "'-m'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        read_arguments(arguments)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_the_studys_and_what_is_passed_on() -> None:
    options, passed = read_arguments(["study=main", "+study.seeds=[7]", "data.max_train=8", "model=tiny"])
    assert options.seeds == [7] and passed == ["data.max_train=8", "model=tiny"]


def test_a_sweep_is_a_method_a_value() -> None:
    methods = load("sensitivity").methods
    swept = methods["lambda_0.25"]
    assert swept.overrides == [*methods["lifealign"].overrides, "strategy.projection_scale=0.25"]
    assert (swept.shown, swept.tuned_as) == ("λ = 0.25", "lifealign")
    assert methods["memory_rank_null"].overrides[-1] == "strategy.memory_rank=null"


# -- grid --------------------------------------------------------------------------------------------------------------


def grid(*arguments: str) -> Grid:
    return Grid(*read_arguments(["study=main", *arguments]))


def test_of_two_overrides_of_a_key_the_later_counts() -> None:
    assert merged(["+sequence=a", "x=1"], ["y=2"], ["x=3", "sequence=b"]) == ("sequence=b", "x=3", "y=2")


def test_a_method_without_buffer_runs_once_and_one_with_it_in_every_regime() -> None:
    cells = grid(WITH_BUFFER, EVERY_REGIME, "study.seeds=[0,1]", "study.tuning=null").cells({})
    assert [(c.method, c.regime) for c in cells if c.seed == 1] == [
        ("seqft", ANY), ("er", "none"), ("er", "twenty"), ("er", "fifth"),
    ]  # fmt: skip
    assert len({cell.folder for cell in cells}) == 8
    last = cells[-1].overrides
    assert {"strategy=er", "objective=dpo", "strategy.buffer_size=3000", "seed=1"} <= {*last}
    assert not any(override.startswith(("data.tuning", "sft.lr")) for override in last)


def test_what_is_passed_on_beats_what_is_common_and_not_what_makes_the_method() -> None:
    cells = grid("study.only=[er]", "study.only_regimes=[twenty]", "study.tuning=null", "checkpoint.keep=2").cells({})
    assert "checkpoint.keep=2" in cells[0].overrides and "checkpoint.keep=1" not in cells[0].overrides
    cells = grid("study.only=[er]", "study.only_regimes=[twenty]", "study.tuning=null", "strategy.buffer_size=5").cells({})
    assert "strategy.buffer_size=20" in cells[0].overrides


def test_cells_with_the_same_settings_share_a_folder(tmp_path: Path) -> None:
    """Of five values of lambda one is that of the method itself, 0.5: four folders more, not five."""
    options = load("sensitivity", ["seeds=[0]", "tuning=null", f"dir={tmp_path}"])
    options.only = ["lifealign", *(name for name in options.methods if name.startswith("lambda_"))]
    cells = Grid(options, []).cells({})
    assert len(cells) == 6 and len({cell.folder for cell in cells}) == 5
    (shared,) = {c.folder for c in cells if c.method == "lambda_0.5"} | {c.folder for c in cells if c.method == "lifealign"}
    write_json(shared / "cell.json", {"overrides": list(cells[0].overrides), "exit_code": 0})
    check_settings(cells)  # although their overrides do not read the same


def test_cells_that_differ_in_their_learning_rate_alone_are_counted_apart_unless_it_is_the_same() -> None:
    """ER at the rate that another method chose is another run than ER at its own, or the same one."""
    options = load("main", ["seeds=[0,1]", "only_regimes=[twenty]"])
    options.methods["er_rate"] = replace(options.methods["er"], tuned_as="lifealign")
    options.only = ["er", "er_rate", "lifealign"]
    small = Grid(options, [])
    places = {method: (method, "twenty") for method in options.only}
    assert small.planned(dict.fromkeys(places.values(), None)) == 6
    assert small.planned({places["er"]: 0.5, places["er_rate"]: None, places["lifealign"]: None}) == 6
    assert small.planned({places["er"]: 0.5, places["er_rate"]: 1.0, places["lifealign"]: 1.0}) == 6
    assert small.planned(dict.fromkeys(places.values(), 1.0)) == 4


def test_a_slice_is_of_a_task_of_the_first_sequence() -> None:
    with pytest.raises(UserError, match=r"study\.tuning\.task=instrct: no task of the first sequence; did you mean 'instruct'"):
        trials(grid("study.tuning.task=instrct"))


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for key in ("study.dir", "study.runs"):
        with pytest.raises(UserError, match=rf"^{re.escape(key)}: .*file/here cannot be written \(Not a directory\)"):
            study(["+study=main", f"study.dir={tmp_path}", f"{key}={tmp_path}/file/here"], tmp_path)


def test_a_typo_in_what_is_passed_on_is_told_before_anything_starts(tmp_path: Path) -> None:
    def main() -> None:
        with exit_codes():
            study(sys.argv[1:], tmp_path / "no script")

    ended = end_here(main, "+study=main", WITH_BUFFER, "data.max_trian=8", f"study.dir={tmp_path / 'study'}")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "did you mean 'data.max_train'" in ended.err
    assert not (tmp_path / "study").exists()


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_short_runs_are_shared_and_see_the_slice_alone(tmp_path: Path) -> None:
    """ER takes SeqFT's rate, whatever its buffer. The bundled rates are 2e-3 and 1e-3; half of them 1e-3 and 5e-4."""
    sizes = "study.tuning.scales=[0.5,1]", "study.tuning.pairs=9"
    small = grid(WITH_BUFFER, EVERY_REGIME, *sizes, f"study.dir={tmp_path}")
    (trial,) = trials(small)
    assert (trial.place, len(trial.variants)) == (("seqft", ANY), 4)
    wanted = {"sequence.tasks=[instruct]", "data.tuning=true", "data.tuning_pairs=9", "data.tuning_task=instruct"}
    for seed, cell in enumerate(trial.cells[0.5]):
        own = {"sft.lr=0.001", "preference.lr=0.0005", "strategy=seqft", f"seed={seed}"}
        assert wanted | own <= {*cell.overrides}
    for cell in small.cells(dict.fromkeys(trial.variants, 0.5)):
        assert {"data.tuning_pairs=9", "data.tuning_task=instruct", "sft.lr=0.001"} <= {*cell.overrides}
        assert "data.tuning=true" not in cell.overrides


def test_a_regime_that_is_another_base_is_tuned_by_itself() -> None:
    options = load("backbones", ["seeds=[0]", "only=[er]", "regimes.half=[model=tiny,model.lora.r=4]"])
    assert [trial.place for trial in trials(Grid(options, []))] == [("seqft", "tiny"), ("seqft", "half")]


def test_the_best_scale_is_the_nearest_to_one_of_equals() -> None:
    def scored(value: float | None) -> dict[str, float | None]:
        return {"mean_log_sigmoid": value, "chosen_nll": 2.0}

    assert best_scale({0.5: scored(-0.7), 1.0: scored(-0.6), 2.0: scored(-0.65)}) == 1.0
    assert best_scale({0.5: scored(-0.6), 1.0: scored(-0.6), 4.0: scored(-0.6)}) == 1.0
    assert best_scale({0.5: scored(-0.7), 1.0: {}, 2.0: scored(None)}) == 0.5  # a run that diverged has no score
    assert best_scale({1.0: {}}) is None


def test_a_rate_is_not_good_that_sharpens_preferences_at_the_cost_of_likelihood() -> None:
    """-0.6 less an NLL of 1.0 beats -0.4 less 1.3."""
    calm, hot = {"mean_log_sigmoid": -0.6, "chosen_nll": 1.0}, {"mean_log_sigmoid": -0.4, "chosen_nll": 1.3}
    assert best_scale({1.0: calm, 4.0: hot}) == 1.0


def test_no_rate_is_chosen_before_all_short_runs_have_ended(tmp_path: Path) -> None:
    small = grid(WITH_BUFFER, "study.tuning.scales=[1,2]", f"study.dir={tmp_path}")
    (trial,) = trials(small)

    def write(cell: Cell, code: int | None, score: float | None) -> None:
        """A short run that ended so, with this mean log σ(r)."""
        cell.kept.unlink(missing_ok=True)
        book = ScoreBook(["instruct"])
        book.record("mean_log_sigmoid", 0, 0, score)
        book.record("chosen_nll", 0, 0, 2.0)
        write_json(cell.folder / "cell.json", {"overrides": list(cell.overrides), "exit_code": code})
        write_json(cell.folder / "scores.json", book.to_json("seqft", "dpo", cell.seed))
        write_json(cell.folder / "checkpoints" / "00003" / "state.json", {"data": {"instruct": "hash"}, "steps": 3})
        write_json(cell.folder / "config.yaml", resolved(next(iter(small.configs.values()))))

    def end(scale: float, code: int | None, score: float | None) -> None:
        """Of the two short runs one is always at its end, with a score 0.2 below."""
        cell, other = trial.cells[scale]
        write(other, 0, (score or 0) - 0.2)
        write(cell, code, score)

    end(1.0, 0, -0.6)
    end(2.0, None, -0.5)  # was interrupted
    assert {*choose(small).values()} == {None} and small.cells(choose(small)) == []
    end(2.0, 0, -0.5)
    assert {*choose(small).values()} == {2.0}
    (row,) = read_json(tmp_path / "tuning.json")
    assert row["scores"]["1"]["mean_log_sigmoid"] == pytest.approx(-0.7)  # the mean of -0.6 and -0.8
    assert row["scores"]["2"]["mean_log_sigmoid"] == pytest.approx(-0.6) and row["chosen"] == 2
    for code in (1, 2, 128 + signal.SIGTERM):  # a full disk, a network that is down, a stop: not so the next time
        end(2.0, code, -0.5)
        assert {*choose(small).values()} == {None}
    end(2.0, DIVERGED, -0.5)
    assert {*choose(small).values()} == {1.0}


# -- runner ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(next(w for w in sys.argv if w.startswith("run.dir="))[9:-1].replace("\\\\'", "'"))
words = dict(w.split("=", 1) for w in sys.argv[1:])
if words["saves"]:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
if words["deaf"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
assert words["resume"] == "auto"
log = open(pathlib.Path(words["log"]), "a")
print("start", time.monotonic(), os.environ["OMP_NUM_THREADS"], file=log, flush=True)
time.sleep(float(words["sleep"]))
print("end", time.monotonic(), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), file=log, flush=True)
if words["code"] != "0" and not (folder / "second").exists():
    (folder / "second").touch()
    print("error: so it goes")
    sys.exit(int(words["code"]))
"""
"""Stands for launch/train.py: notes when it ran, sleeps, and fails the first time where it is told to."""


class Bench:
    """A place to run cells of the script above."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.script = folder, folder / "log", folder / "script.py"
        self.kept: list[Cell] = []
        self.finished: Callable[[Cell], object] = self.kept.append
        self.script.write_text(SCRIPT)

    def cell(self, number: int, sleep: float = 0.0, code: int = 0, saves: bool = False, deaf: bool = False) -> Cell:
        flags = (f"saves={'yes' if saves else ''}", f"deaf={'yes' if deaf else ''}")
        overrides = (f"log={self.log}", f"sleep={sleep}", f"code={code}", *flags)
        return Cell("s", "m", ANY, number, self.folder / "cells, it's" / str(number), overrides)

    def run(self, cells: list[Cell], parallel: int = 2) -> Runner:
        with locked(self.folder, BUSY) as lock:
            runner = Runner(self.script, parallel, lock, self.finished)
            runner.run(cells, "title")
        return runner

    def events(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_failed_cell_stops_no_other_and_is_tried_again(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    cells = [bench.cell(0, code=1), bench.cell(1), bench.cell(2)]
    bench.run(cells, parallel=1)
    assert [read_record(cell).exit_code for cell in cells] == [1, 0, 0]
    assert "exit code 1: error: so it goes" in capfd.readouterr().out
    assert bench.kept == cells[1:]
    bench.run(cells, parallel=1)
    assert [read_record(cell).exit_code for cell in cells] == [0, 0, 0]
    assert [read_record(cell).attempts for cell in cells] == [2, 1, 1]
    assert len(bench.events()) == 2 * 4  # what was finished did not run again


def test_a_cell_that_diverged_is_not_tried_again(bench: Bench) -> None:
    cells = [bench.cell(0, code=DIVERGED), bench.cell(1)]
    for _ in range(2):
        bench.run(cells, parallel=1)
    assert [read_record(cell).attempts for cell in cells] == [1, 1] and bench.kept == cells[1:]


def test_results_that_cannot_be_written_end_no_other_cell(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    def full(cell: Cell) -> None:
        raise OSError(28, "No space left on device")

    cells = [bench.cell(0), bench.cell(1)]
    bench.finished = full
    bench.run(cells, parallel=1)
    assert all(is_finished(cell) for cell in cells)
    assert capfd.readouterr().out.count("No space left on device") == 2


def test_a_cell_whose_record_cannot_be_written_ends_no_other(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    full = "(folder / 'cell.json.partial').symlink_to('/dev/full')"  # what is written there finds no room
    bench.script.write_text(f"{SCRIPT}if folder.name == '0': {full}\n")
    cells = [bench.cell(0), bench.cell(1)]
    bench.run(cells, parallel=1)
    said = capfd.readouterr().out
    assert "No space left on device" in said and "seed 0: not finished, " in said
    assert [is_finished(cell) for cell in cells] == [False, True] and bench.kept == cells[1:]


@pytest.mark.parametrize("code", [0, 2])
def test_a_cell_with_a_damaged_checkpoint_ends_no_other_and_has_not_finished(
    bench: Bench, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one that refused its checkpoints; or that says it ended well."""
    cells = [bench.cell(0, code=code), bench.cell(1)]
    _damage(cells[0], "{")
    bench.run(cells, parallel=1)
    assert f"{cells[0].folder} cannot be read or written: Expecting property name" in capfd.readouterr().out
    assert [read_record(cell).exit_code for cell in cells] == [code or None, 0] and bench.kept == cells[1:]


def _damage(cell: Cell, content: str) -> None:
    path = cell.folder / "checkpoints" / "00003" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)


def test_an_error_while_cells_are_ended_leaves_none_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cells the first to end left a list in the place of a state, and the second does not hear SIGTERM."""
    monkeypatch.setattr("lifealign.study.runner.GRACE_SECONDS", 1.0)
    cells = [bench.cell(0, sleep=60), bench.cell(1, sleep=60, deaf=True)]
    _damage(cells[0], "[]")

    def interrupt() -> None:
        while len(bench.events()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(AttributeError, match="'list' object has no attribute 'get'"):
        bench.run(cells)
    thread.join()
    with locked(bench.folder, BUSY):  # which a living cell would hold
        assert read_record(cells[1]).exit_code is None and read_record(cells[1]).wall_seconds > 1


def test_no_more_cells_at_once_than_asked_for_and_each_has_its_share_of_cores(bench: Bench) -> None:
    bench.run([bench.cell(number, sleep=0.3) for number in range(4)])
    events = sorted(bench.events(), key=lambda event: float(event[1]))
    running, most = 0, 0
    for what, _, threads in events:
        running += 1 if what == "start" else -1
        most = max(most, running)
        assert what == "end" or int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (most, running, len(events)) == (2, 0, 8)


def test_cells_that_run_at_once_have_a_gpu_each(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bench.run([bench.cell(number, sleep=0.5) for number in range(2)])
    assert sorted(event[2] for event in bench.events() if event[0] == "end") == ["0", "1"]
    bench.log.unlink()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    bench.run([bench.cell(number, sleep=0.5) for number in range(2, 5)], parallel=3)
    cards = [event[2] for event in bench.events() if event[0] == "end"]
    assert sorted(cards) in (["3", "5", "5"], ["3", "3", "5"])


def test_the_record_holds_time_over_attempts_and_memory(bench: Bench) -> None:
    cell = bench.cell(0, sleep=0.4, code=1)
    bench.run([cell])
    first = read_record(cell).wall_seconds
    bench.run([cell])
    record = read_record(cell)
    assert first >= 0.4 and record.wall_seconds >= first + 0.4
    assert 5 < record.peak_memory_mib < 20_000
    assert record.overrides == list(cell.overrides) and record.steps is None
    assert record.commit == commit(bench.folder) and record.machine == machine() and re.fullmatch(r"[\d-]{10}", record.date)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_cells_and_leaves_the_rest_to_the_next_call(
    bench: Bench, number: signal.Signals, saves: bool
) -> None:
    """Cells that die of it, and such as save and say so with their exit code, as runs do."""
    cells = [bench.cell(0), bench.cell(1, sleep=60, saves=saves), bench.cell(2)]

    def interrupt() -> None:
        while len(bench.events()) < 3:  # the first has ended, the second has begun
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    runner = bench.run(cells, parallel=1)
    thread.join()
    assert runner.signal == number and time.monotonic() - started < 20
    assert signal.getsignal(number) is handler
    assert [is_finished(cell) for cell in cells] == [True, False, False]
    assert read_record(cells[1]).exit_code is None and read_record(cells[2]) is None


def test_a_folder_with_other_settings_is_refused(bench: Bench) -> None:
    """What has failed before it left a checkpoint may be run with other settings: that is how a mistake is mended."""
    finished, failed = bench.cell(0), bench.cell(1, code=2)
    bench.run([finished, failed])
    other = Cell("s", "m", ANY, 0, finished.folder, (*finished.overrides, "more=1"))
    with pytest.raises(UserError, match=r"other settings \(more=1\)"):
        bench.run([other])
    mended = Cell("s", "m", ANY, 1, failed.folder, (*failed.overrides, "more=1"))
    bench.run([mended])
    assert is_finished(mended)


def test_one_study_at_a_time_in_a_folder(bench: Bench) -> None:
    with locked(bench.folder, BUSY), pytest.raises(UserError, match="is running there"), locked(bench.folder, BUSY):
        pass


# -- whole -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_study_from_its_command_to_its_page(tmp_path: Path) -> None:
    """Two methods, one seed, two tasks. The page alone can be had again."""
    words = [
        sys.executable, str(REPOSITORY / "launch" / "study.py"), "+study=main", WITH_BUFFER, "study.only_regimes=[twenty]",
        "study.seeds=[0]", "study.tuning=null", "study.compared=er", f"study.dir={tmp_path / 'study'}",
        "sequence.tasks=[instruct,hc3]", "data.max_train=8", "data.max_eval=8", "sft.epochs=1", "preference.epochs=1",
        "evaluation.metrics=[preference_accuracy]",
    ]  # fmt: skip
    ended = command(*words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 of 2 cells finished" in ended.stdout
    folder = tmp_path / "study"
    frame = pd.read_csv(folder / "results.csv")
    scores = read_json(folder / "cells" / "six_domains" / "er" / "twenty" / "seed0" / "scores.json")
    own = frame[(frame.method == "er") & (frame.metric == "preference_accuracy")].set_index("figure").value
    assert own["last"] == scores["metrics"]["preference_accuracy"]["last"]
    assert own["last:hc3"] == scores["metrics"]["preference_accuracy"]["matrix"][1][1]
    record = read_json(folder / "cells" / "six_domains" / "seqft" / ANY / "seed0" / "cell.json")
    assert record["exit_code"] == 0 and record["steps"] == 4  # two tasks, two stages, one batch of eight each

    page = (folder / "study.md").read_text()
    assert "**2 of 2 cells finished**" in page and "| ER minus |" in page and "| instruct | 8 | 8 |" in page
    assert (folder / "methods_six_domains_preference_accuracy.png").read_bytes().startswith(b"\x89PNG")
    (folder / "study.md").unlink()
    assert study([*words[2:], "study.report_only=true"], Path(words[1])) == 0
    assert "**2 of 2 cells finished**" in (folder / "study.md").read_text()
    assert read_json(folder / "cells" / "six_domains" / "seqft" / ANY / "seed0" / "cell.json") == record
    for method in ("seqft", "er"):
        (kept,) = (folder / "cells" / "six_domains" / method).glob("*/seed0.safetensors")
        with safe_open(kept, "numpy") as file:
            budget = json.loads(file.metadata()["result"])["budget"]
        assert re.fullmatch("[0-9a-f]{64}", budget["model"]["hash"]) and {*budget["data"]} == {"instruct", "hc3"}
    shutil.rmtree(folder / "cells" / "six_domains" / "seqft" / ANY / "seed0")
    before = (folder / "study.md").read_text()
    assert study(words[2:], Path(words[1])) == 0  # nothing is left to run
    assert (folder / "study.md").read_text().replace(" study.report_only=true", "") == before.replace(
        " study.report_only=true", ""
    )
