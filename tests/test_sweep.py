"""Sweeps: jobs that know nothing of each other, that fail alone, that are skipped when finished; and the page at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from support import QUICK, REPOSITORY, Ended, command, compose_config, end_here, train_here
from test_report import Tags
from tracked import wandb_records

from lifealign import sweep
from lifealign.command import hydra_command
from lifealign.comparison.command import compare_sweep
from lifealign.errors import UserError
from lifealign.run import log_data, train
from lifealign.runtime.files import read_json
from lifealign.runtime.options import TrackingOptions

KEY = "objective.confidence_threshold"
SMALL = ("sft.epochs=1", "preference.epochs=1", "evaluation.metrics=[mean_log_sigmoid,chosen_nll]", "cache.enabled=false")
ONE = ("sequence.tasks=[instruct]", "data.max_train=8", "data.max_eval=4", *SMALL)
JOB = str(REPOSITORY / "tests" / "sweep_job.py")


def swept(folder: Path, *overrides: str) -> Ended:
    """A sweep as launch/train.py makes it, in this process."""
    return end_here(lambda: hydra_command(train, compare_sweep), "-m", *QUICK, *overrides, f"hydra.sweep.dir={folder}")


def runs_of(folder: Path) -> dict[float, Path]:
    """Run directories by their confidence threshold."""
    configs = {path.parent: yaml.safe_load(path.read_text()) for path in folder.glob("*/config.yaml")}
    return {values["objective"]["confidence_threshold"]: run for run, values in configs.items()}


def same_adapter(left: Path, right: Path) -> bool:
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (left, right))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def ended_of(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((folder / "jobs").glob("*.json"))]


# -- three thresholds --------------------------------------------------------------------------------------------------

THRESHOLDS = (*SMALL, "tracking.mode=offline", f"{KEY}=0.3,0.5,0.95")
"""The lowest is below what the policy gives to any pair, so that it gates all of them."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("three") / "sweep"
    return folder, swept(folder, *THRESHOLDS)


def test_every_job_has_its_run_directory_and_its_value(three: tuple[Path, Ended]) -> None:
    folder, ended = three
    assert (ended.code, ended.err) == (0, "")
    runs = runs_of(folder)
    assert sorted(runs) == [0.3, 0.5, 0.95]
    expected = [
        {"job": n, "swept": {KEY: t}, "run": runs[t].name, "exit_code": 0, "error": None} for n, t in enumerate(sorted(runs))
    ]
    assert ended_of(folder) == expected
    assert {path.name for path in folder.iterdir()} == {
        *(run.name for run in runs.values()),
        "comparison",
        "jobs",
        "multirun.yaml",
    }


def test_a_job_leaves_nothing_for_the_next(three: tuple[Path, Ended], tmp_path: Path) -> None:
    """The third job ends with the adapter, the predictions and the scores of the same run alone, bit for bit."""
    alone, job = train_here(tmp_path / "alone", *SMALL, f"{KEY}=0.95"), runs_of(three[0])[0.95]
    assert same_adapter(alone, job)
    assert (alone / "scores.json").read_text() == (job / "scores.json").read_text()
    left = Path("tasks", "02_hc3", "predictions.jsonl")
    assert (alone / left).read_text() == (job / left).read_text()
    assert not same_adapter(job, runs_of(three[0])[0.3])  # the key that was varied matters


def test_the_sweep_ends_with_the_comparison(three: tuple[Path, Ended]) -> None:
    folder, ended = three
    page = (folder / "comparison" / "index.html").read_text(encoding="utf-8")
    text = " ".join(Tags(page).text.split())
    assert f"Sensitivity to {KEY}" in text
    for value, run in runs_of(folder).items():
        last = read_json(run / "scores.json")["metrics"]["mean_log_sigmoid"]["last"]
        assert f"confidence_threshold={value:g} {last:.4f}" in text
    assert (folder / "comparison" / "sensitivity_mean_log_sigmoid.png").exists()
    assert ended.out.splitlines()[-1] == f"{folder / 'comparison' / 'index.html'}, comparison.md, comparison.csv"


def test_wandb_has_one_group_and_the_varied_values(three: tuple[Path, Ended]) -> None:
    folder, _ = three
    ids = set()
    for value, run in runs_of(folder).items():
        (started,) = [record.run for record in wandb_records(run) if record.WhichOneof("record_type") == "run"]
        assert started.run_group == f"{folder.parent.name}-sweep"
        told = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert told["sweep"] == {KEY: value}
        assert told["objective"]["confidence_threshold"] == value
        ids.add(started.run_id)
    assert len(ids) == 3


def test_the_same_command_skips_what_is_finished(three: tuple[Path, Ended], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(three[0], tmp_path / "sweep", copy_function=shutil.copy2))
    before = {path: path.read_bytes() for run in runs_of(folder).values() for path in run.rglob("*.*") if path.is_file()}
    ended = swept(folder, *THRESHOLDS)
    assert (ended.code, ended.err) == (0, "")
    assert [line for line in ended.out.splitlines() if "finished already" in line] == [
        f"{run}: finished already" for _, run in sorted(runs_of(folder).items())
    ]
    assert "100%" not in ended.out
    after = {path: path.read_bytes() for run in runs_of(folder).values() for path in run.rglob("*.*") if path.is_file()}
    assert after == before
    assert (folder / "comparison" / "comparison.csv").read_text() == (three[0] / "comparison" / "comparison.csv").read_text()


def test_a_job_that_was_interrupted_goes_on(three: tuple[Path, Ended], tmp_path: Path) -> None:
    """As if the second run had been killed in its last commit: no report, and no checkpoint after it."""
    folder = Path(shutil.copytree(three[0], tmp_path / "sweep", copy_function=shutil.copy2))
    cut = runs_of(folder)[0.5]
    shutil.rmtree(cut / "report")
    shutil.rmtree(sorted((cut / "checkpoints").glob("0*"))[-1])
    ended = swept(folder, *THRESHOLDS)
    assert ended.code == 0
    assert ended.out.count("finished already") == 2
    assert "resumed at task 2, commit" in (cut / "run.log").read_text()
    assert (cut / "scores.json").read_text() == (runs_of(three[0])[0.5] / "scores.json").read_text()
    assert sweep.finished_scores(cut) is not None


def test_what_is_finished_has_its_report_and_all_its_tasks(three: tuple[Path, Ended], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs_of(three[0])[0.5], tmp_path / "run", copy_function=shutil.copy2))
    assert sweep.finished_scores(run) is not None
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sequence"]["tasks"].append("hh_harmless")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert sweep.finished_scores(run) is None  # it was given another task
    config["sequence"]["tasks"].pop()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    os.utime(run / "report" / "index.html", (0, 0))
    assert sweep.finished_scores(run) is None  # a report from before the newest checkpoint
    os.utime(run / "report" / "index.html")
    assert sweep.finished_scores(run) is not None
    (sorted((run / "checkpoints").glob("0*"))[-1] / "state.json").write_text("{")
    assert sweep.finished_scores(run) is None


def test_a_group_that_is_told_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def untold(options: TrackingOptions, *_: Any) -> None:
        groups.append(options.group)
        raise UserError("enough is known")

    monkeypatch.setattr("lifealign.run.Tracker", untold)
    for told in ((), ("tracking.group=ours",)):
        assert swept(tmp_path / "one" / "two", *ONE, "seed=1", *told).err == "error: enough is known\n"
    assert groups == ["one-two", "ours"]


# -- jobs that fail ----------------------------------------------------------------------------------------------------


def test_a_job_that_fails_unexpectedly_leaves_the_others_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        if sweep.current().swept["seed"] == 1:  # type: ignore[union-attr]
            raise RuntimeError("so it goes")
        log_data(*arguments, **options)

    monkeypatch.setattr("lifealign.run.log_data", failing)
    folder = tmp_path / "sweep"
    ended = swept(folder, *ONE, "seed=0,1,2")
    assert ended.code == 1
    assert "RuntimeError: so it goes" in ended.err and "Traceback" in ended.err
    assert ended.out.count("Scores over all 1 tasks") == 2
    assert [(job["exit_code"], job["error"]) for job in ended_of(folder)] == [
        (0, None),
        (1, "RuntimeError: so it goes"),
        (0, None),
    ]
    text = " ".join(Tags((folder / "comparison" / "index.html").read_text(encoding="utf-8")).text.split())
    assert "Failed Run Why seed=1 RuntimeError: so it goes" in text
    assert ended.out.splitlines()[-1] == f"1 of 3 jobs failed; {folder / 'jobs'} says which and why"

    monkeypatch.setattr("lifealign.run.log_data", log_data)
    again = swept(folder, *ONE, "seed=0,1,2")
    assert again.code == 0 and again.out.count("finished already") == 2 and again.out.count("Scores over all 1 tasks") == 1


def test_a_signal_when_a_job_has_nothing_left_to_do_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job is whole, the second is not begun; given again, the sweep skips the one and does the other."""
    from lifealign import run

    write = run.report

    def slow(lifelong: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(lifelong)

    monkeypatch.setattr(run, "report", slow)
    folder = tmp_path / "sweep"
    ended = swept(folder, *ONE, "seed=0,1")
    assert ended.code == 143
    assert ended.err == "error: stopped by SIGTERM after job 0; the same command goes on\n"
    assert [job["exit_code"] for job in ended_of(folder)] == [0]
    monkeypatch.setattr(run, "report", write)
    again = swept(folder, *ONE, "seed=0,1")
    assert again.code == 0 and again.out.count("finished already") == 1 and again.out.count("Scores over all 1 tasks") == 1


def test_a_sweep_that_the_configuration_asks_for_ends_like_any_other(tmp_path: Path) -> None:
    words = (*QUICK, *ONE, "strategy.denoise_energy=2,3", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    ended = end_here(lambda: hydra_command(train, compare_sweep), "hydra.mode=MULTIRUN", *words)
    assert ended.code == 2
    assert [job["swept"] for job in ended_of(tmp_path / "sweep")] == [
        {"strategy.denoise_energy": 2},
        {"strategy.denoise_energy": 3},
    ]


def test_jobs_do_not_take_the_name_of_a_run(tmp_path: Path) -> None:
    words = (*ONE, f"run.dir={tmp_path / 'run'}", "resume=never", "seed=0,1")
    for _ in range(2):
        assert swept(tmp_path / "sweep", *words).code == 0
    assert len(list((tmp_path / "sweep").glob("*/config.yaml"))) == 4


def test_where_no_job_finished_there_is_no_page(tmp_path: Path) -> None:
    ended = swept(tmp_path / "sweep", *ONE, "strategy.denoise_energy=2,3")
    assert ended.code == 2
    assert ended.err.count("error: ") == 2
    assert "no comparison: no job has finished" in ended.out
    assert not (tmp_path / "sweep" / "comparison").exists()


@pytest.mark.slow
def test_on_two_ranks_a_mistake_of_one_is_told_by_it_outside_of_a_sweep_too(tmp_path: Path) -> None:
    """The other waits for it in a barrier; it must not wait, in its turn, for the other to leave the group."""
    ended = command("deepspeed", "--num_gpus", "2", JOB, "+sequence=six_domains", "data.max_train=6", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("error: rank 1: data.max_train=6: so it goes") == 1


def two_ranks(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = ["deepspeed", "--num_gpus", "2", JOB, "-m", "+sequence=six_domains", *overrides, f"hydra.sweep.dir={folder}"]
    return command(*words, cwd=folder.parent)


@pytest.mark.slow
def test_on_two_ranks_a_failure_of_both_leaves_the_others_to_run(tmp_path: Path) -> None:
    """A mistake, an error of no known kind, and a job after each."""
    ended = two_ranks(tmp_path / "sweep", "data.max_train=1,4,2,5")
    assert ended.returncode == 1
    assert ended.stdout.count("done: seed 0") == 2
    assert ended.stderr.count("error: data.max_train=1: so it goes") == 1
    assert ended.stderr.count("RuntimeError: lost with seed 0") == 1
    assert [job["exit_code"] for job in ended_of(tmp_path / "sweep")] == [2, 0, 1, 0]


@pytest.mark.slow
def test_on_two_ranks_a_failure_of_one_ends_the_sweep(tmp_path: Path) -> None:
    """The other rank waits for it in a barrier, for half an hour if nobody ended it."""
    ended = two_ranks(tmp_path / "sweep", "data.max_train=4,3,5")
    assert ended.returncode == 1
    assert ended.stdout.count("done: seed 0") == 1
    assert "RuntimeError: lost with seed 0" in ended.stderr
    assert "error: rank 1 failed alone, and the others wait for it: the sweep ends here" in ended.stderr


@pytest.mark.slow
def test_a_sweep_on_two_ranks(tmp_path: Path) -> None:
    words = ["deepspeed", "--num_gpus", "2", str(REPOSITORY / "launch" / "train.py"), "-m", *QUICK, *ONE, "seed=0,1"]
    ended = command(*words, f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [job["exit_code"] for job in ended_of(tmp_path / "sweep")] == [0, 0]
    assert (tmp_path / "sweep" / "comparison" / "index.html").exists()
    again = command(*words, f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2


# -- launchers and sweepers that are installed apart -------------------------------------------------------------------


def needs(package: str) -> pytest.MarkDecorator:
    module = f"hydra_plugins.{package.replace('-', '_')}"
    missing = find_spec("hydra_plugins") is None or find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; pip install -e '.[sweep]' brings it")


@needs("hydra-joblib-launcher")
def test_jobs_in_processes_of_their_own(tmp_path: Path) -> None:
    """Beside each other, one with a mistake: what they say of their end comes through, and the page is made."""
    train_py, folder = str(REPOSITORY / "launch" / "train.py"), tmp_path / "sweep"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    words = [sys.executable, train_py, "-m", *QUICK, *ONE, *launcher, "strategy.denoise_energy=0.9,2,0.8"]
    ended = command(*words, f"hydra.sweep.dir={folder}", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "error: strategy.denoise_energy=2.0: must lie in [0, 1]\n"
    assert [(job["exit_code"], job["swept"]) for job in ended_of(folder)] == [
        (0, {"strategy.denoise_energy": 0.9}),
        (2, {"strategy.denoise_energy": 2}),
        (0, {"strategy.denoise_energy": 0.8}),
    ]
    text = (folder / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert r"Sensitivity to strategy.denoise\_energy" in text


@needs("hydra-submitit-launcher")
def test_the_slurm_preset_composes() -> None:
    launcher = composed_hydra("hydra/launcher=slurm", "hydra.launcher.partition=gpu").launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.tasks_per_node) == ("gpu", 1, 1)


@needs("hydra-optuna-sweeper")
def test_the_search_preset_composes() -> None:
    sweeper = composed_hydra("hydra/sweeper=search", "hydra.sweeper.n_trials=3").sweeper
    assert sweeper._target_.endswith(".OptunaSweeper")
    assert (sweeper.n_trials, sweeper.direction) == (3, "maximize")
    run = compose_config("+sequence=six_domains")
    assert all(OmegaConf.select(run, key) is not None for key in sweeper.params)  # keys that there are


def composed_hydra(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    from lifealign.command import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["+sequence=six_domains", *overrides], return_hydra_config=True).hydra


def test_a_search_is_told_last_of_the_first_metric(tmp_path: Path) -> None:
    told = train(compose_config(*QUICK, *ONE, f"run.dir={tmp_path / 'run'}"))
    assert told == read_json(tmp_path / "run" / "scores.json")["metrics"]["mean_log_sigmoid"]["last"]


@pytest.mark.parametrize("apart", ["hydra/launcher=joblib", "hydra/sweeper=optuna"])
def test_processes_apart_do_not_go_with_several_ranks(apart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = swept(tmp_path, *ONE, apart, "seed=0,1")
    assert ended.code == 2
    assert ended.err == f"error: {apart} does not go with several ranks: start the sweep with plain python\n"


def test_a_launcher_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    ended = swept(tmp_path, *ONE, "hydra/launcher=nowhere", "seed=0,1")
    assert ended.code == 2
    said = "there is no such preset; pip install 'lifealign[sweep]' brings those for joblib, Slurm and optuna"
    assert ended.err == f"error: hydra/launcher=nowhere: {said}\n"


def test_a_folder_of_presets_of_ones_own_goes_with_a_sweep(tmp_path: Path) -> None:
    ended = end_here(lambda: hydra_command(lambda _: None), "--config-dir", str(tmp_path), "-m", *QUICK, "seed=0,1")
    assert (ended.code, ended.err) == (0, "")


def test_varied_keys_are_those_with_several_values() -> None:
    words = [
        "+sequence=six_domains",
        "sequence.tasks=[a,b]",
        "seed=0,1",
        "strategy=er,seqft",
        "sft.lr=range(1,3)",
        "x='a,b'",
    ]
    assert sweep.swept_keys(words) == ["seed", "strategy", "sft.lr"]
