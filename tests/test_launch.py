"""One command under every launcher: one run directory, one writer, a quiet terminal, no collisions, and it can be killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig
from safetensors.torch import load_file
from support import QUICK, REPOSITORY, command, end_here, environment, launch, train_here

from lifealign.command import hydra_command
from lifealign.config import build, run_name
from lifealign.memory.bank import read_ledger
from lifealign.run import train

TRAIN = str(REPOSITORY / "launch" / "train.py")
SMALL = ("evaluation.metrics=[preference_accuracy,chosen_nll]",)
SMALLER = (*SMALL, "sequence.tasks=[instruct]", "data.max_train=8", "data.max_eval=4")

CHATTER = re.compile(r"warning|deepspeed|deprecated|loading weights|\[(INFO|ERROR)\]|wandb|gloo", re.IGNORECASE)
PROGRESS = re.compile(r"\w+ (sft|preference) \S+ \d+/\d+ 100% loss \d\.\d+ +\d+\.\d pairs/s \d:\d\d:\d\d")


def only_run(folder: Path) -> Path:
    """The one run directory that a command with the default ``run.dir`` has made in its working directory."""
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run,) = (folder / "runs").iterdir()
    return run


def adapter(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_adapter(left: Path, right: Path) -> bool:
    one, other = adapter(left), adapter(right)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def check_written_once(run: Path) -> None:
    """Every row of ``metrics.jsonl`` and every message of ``run.log`` was written by one rank alone."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    places = Counter((r["kind"], r.get("step"), r.get("task"), r.get("stage"), r.get("factor"), r.get("on")) for r in rows)
    assert places and max(places.values()) == 1
    logged = (run / "run.log").read_text().splitlines()
    ours = Counter(line.split(" lifealign.", 1)[1] for line in logged if " lifealign." in line)
    assert any("task 1 of 1 (instruct): sft" in message for message in ours)
    assert max(ours.values()) == 1


def check_terminal(out: str, run: Path, stages: int) -> None:
    """Progress lines, the closing table, and where things lie: nothing else."""
    lines = [line.rstrip() for line in out.splitlines()]
    assert not [line for line in lines if CHATTER.search(line)]
    assert all(PROGRESS.fullmatch(line) for line in lines[:stages])
    assert lines[stages].startswith("Scores over all ")
    table = "\n".join(lines[stages + 1 :])
    assert re.search(r"Metric +Last +BWT +AP", table)
    assert "Preference accuracy (%)" in table
    assert lines[-1].endswith(f"{run.name}: adapter/, scores.json, report/index.html")
    assert len(lines) < stages + 14


# -- launchers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, subprocess.CompletedProcess[str]]]:
    """Two ``deepspeed`` launches of two ranks each, running at the same time."""
    folders = [tmp_path_factory.mktemp(name) for name in ("left", "right")]
    words = ["deepspeed", "--num_gpus", "2", TRAIN, *QUICK, *SMALLER]
    running = [
        subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    ended = []
    for folder, process in zip(folders, running, strict=True):
        out, err = process.communicate(timeout=240)
        ended.append((folder, subprocess.CompletedProcess(words, process.returncode, out, err)))
    return ended


@pytest.mark.slow
def test_two_launches_beside_each_other_both_succeed(side_by_side) -> None:
    """The launcher hands port 29500 to both."""
    for _, ended in side_by_side:
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert "--master_port=29500" in ended.stdout + ended.stderr
    assert same_adapter(*(only_run(folder) for folder, _ in side_by_side))


@pytest.mark.slow
def test_ranks_agree_on_one_run_directory_and_rank_0_alone_writes(side_by_side) -> None:
    for folder, ended in side_by_side:
        run = only_run(folder)
        check_written_once(run)
        assert run.name.startswith("six_domains-lifealign-fpo-seed0-")
        assert yaml.safe_load((run / "config.yaml").read_text())["sequence"]["tasks"] == ["instruct"]
        assert len(shards(run, "000_instruct_sft")) == 2  # both ranks were of one group
        assert ended.stdout.count("Scores over all 1 tasks") == 1


def shards(run: Path, entry: str) -> list[Path]:
    return list((run / "memory" / entry).glob("shard-*.safetensors"))


@pytest.mark.slow
def test_memory_is_shared_out_anew_when_a_run_goes_on_with_another_number_of_ranks(side_by_side, tmp_path: Path) -> None:
    """From two to one, and from one to two: the next task's ledger is that of a run that never changed."""
    longer = (*SMALLER, "sequence.tasks=[instruct,hc3]", "resume=force", "cache.enabled=false")
    straight = train_here(tmp_path / "straight", *longer)
    from_two = Path(shutil.copytree(only_run(side_by_side[0][0]), tmp_path / "from_two"))
    train_here(from_two, *longer)
    from_one = train_here(tmp_path / "from_one", *SMALLER)
    ended = launch(["deepspeed", "--num_gpus", "2"], *longer, f"run.dir={from_one}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for run, before, after in ((from_two, 2, 1), (from_one, 1, 2)):
        assert [len(shards(run, entry["name"])) for entry in read_ledger(run / "memory")] == [before, before, after, after]
        for entry, expected in zip(read_ledger(run / "memory"), read_ledger(straight / "memory"), strict=True):
            for record, wanted in zip(entry["factors"], expected["factors"], strict=True):
                assert record["factor"] == wanted["factor"]
                assert record["refined_norm"] == pytest.approx(wanted["refined_norm"], rel=1e-3)
                assert record["history_share"] == pytest.approx(wanted["history_share"], abs=1e-3)
    assert max(record["history_share"] for record in expected["factors"]) > 0.01  # history took part


@pytest.mark.slow
def test_torchrun(side_by_side, tmp_path: Path) -> None:
    # --standalone: torchrun's own meeting point is at a fixed port, and other tests may run on this machine.
    ended = launch(["torchrun", "--standalone", "--nproc_per_node", "2"], *SMALLER, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    run = only_run(tmp_path)
    check_written_once(run)
    check_terminal(ended.stdout, run, stages=2)
    assert run.name == only_run(side_by_side[0][0]).name
    assert same_adapter(run, only_run(side_by_side[0][0]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, launch([sys.executable], *SMALL, "--local-rank", "0", cwd=folder)


def test_plain_python_says_what_a_person_wants_to_see_and_no_more(plain) -> None:
    folder, ended = plain
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stderr == ""
    check_terminal(ended.stdout, only_run(folder), stages=4)


# -- arguments ---------------------------------------------------------------------------------------------------------


def composed_by(*arguments: str) -> DictConfig:
    """What a command would hand to its task for these arguments."""
    seen: list[DictConfig] = []
    ended = end_here(lambda: hydra_command(seen.append), *arguments)
    assert (ended.code, ended.err) == (0, "")
    return seen[0]


@pytest.mark.parametrize("spelling", [["--local_rank=0"], ["--local-rank=0"], ["--local_rank", "0"], ["--local-rank", "0"]])
@pytest.mark.parametrize("first", [True, False])
def test_what_a_launcher_adds_is_taken_out(spelling: list[str], first: bool) -> None:
    overrides = ["+sequence=six_domains", "seed=7"]
    assert composed_by(*(spelling + overrides if first else overrides + spelling)).seed == 7


@pytest.mark.parametrize("spelling", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]])
def test_the_rank_that_a_launcher_names_is_heeded(spelling: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that it is put back afterwards
    monkeypatch.delenv("LOCAL_RANK")
    end_here(lambda: hydra_command(lambda _: seen.append(os.environ["LOCAL_RANK"])), "+sequence=six_domains", *spelling)
    assert seen == ["3"]


@pytest.mark.parametrize("zero", ["zero=2", "zero='2'", 'zero="2"'])
def test_a_preset_whose_name_is_a_number(zero: str) -> None:
    assert composed_by("+sequence=six_domains", zero).zero.stage == 2


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_key_that_is_new_to_an_open_mapping_needs_no_plus(plus: str) -> None:
    words = "zero.settings.overlap_comm=true", "evaluation.judge.rubrics.jokes=helpfulness"
    config = build(composed_by("+sequence=six_domains", *(f"{plus}{word}" for word in words)))
    assert config.zero.settings == {"overlap_comm": True} and config.evaluation.judge.rubrics == {"jokes": "helpfulness"}


def test_a_sequence_is_chosen_with_and_without_plus() -> None:
    with_plus, without = composed_by("+sequence=six_domains"), composed_by("sequence=six_domains")
    assert with_plus == without
    assert run_name(with_plus) == run_name(without)


ASKED_LESS = ["evaluation.judge.max_requests=5", "evaluation.judge.concurrency=1"]


def test_how_a_run_is_kept_and_watched_does_not_change_its_name() -> None:
    names = {
        run_name(composed_by("+sequence=six_domains", *overrides))
        for overrides in (["tracking.mode=disabled"], ["resume=force"], ["checkpoint.keep=1"], ASKED_LESS, [])
    }
    assert len(names) == 1
    judge = ["evaluation.judge.base_url=http://localhost/v1", "evaluation.judge.model=one"]
    other = ["evaluation.judge.base_url=http://localhost:9/v1", "evaluation.judge.model=one"]
    found = [run_name(composed_by("+sequence=six_domains", *words)) for words in (judge, other)]
    assert found[0] == found[1] not in names, "another judge is another run, and one at another address is not"
    assert run_name(composed_by("+sequence=six_domains", "seed=1")) not in names


# -- killed ------------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_the_same_command_to_the_same_end(plain, tmp_path: Path) -> None:
    words = [sys.executable, TRAIN, *QUICK, *SMALL]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/[0-9][0-9][0-9][0-9][0-9]/state.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = only_run(tmp_path)
    assert not (run / "tasks" / "02_hc3" / "scores.json").exists(), "it was killed too late to show anything"

    ended = launch([sys.executable], *SMALL, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert only_run(tmp_path) == run
    assert "resumed at task" in (run / "run.log").read_text()
    assert same_adapter(run, only_run(plain[0]))
    assert (run / "scores.json").read_text() == (only_run(plain[0]) / "scores.json").read_text()


# -- sweeps ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_makes_a_run_directory_a_job(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    thresholds = "objective.confidence_threshold=0.6,0.95"
    ended = command(sys.executable, TRAIN, "-m", *QUICK, *SMALLER, thresholds, f"hydra.sweep.dir={sweep}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stderr == ""
    runs = [path.parent for path in sweep.glob("*/config.yaml")]
    settings = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert sorted(values["objective"]["confidence_threshold"] for values in settings) == [0.6, 0.95]
    for run in runs:
        check_written_once(run)
        assert (run / "report" / "index.html").exists()
        assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {*(run.name for run in runs), "comparison", "jobs"}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.parametrize("energies", ["2,0.9", pytest.param("0.9,2", marks=pytest.mark.slow)])
def test_a_job_with_a_mistake_leaves_the_others_to_finish(
    energies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = end_here(
        lambda: hydra_command(train),
        "-m",
        *QUICK,
        *SMALLER,
        f"strategy.denoise_energy={energies}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: strategy.denoise_energy=2")
    (run,) = (path.parent for path in (tmp_path / "sweep").glob("*/scores.json"))
    assert yaml.safe_load((run / "config.yaml").read_text())["strategy"]["denoise_energy"] == 0.9
    assert ended.out.count("Scores over all 1 tasks") == 1
