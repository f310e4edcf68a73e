"""Two ranks of which one meets something that the other does not: both end, soon, and say what it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import QUICK, REPOSITORY, environment, train_here

from lifealign.errors import Interrupted, TrainingDiverged
from lifealign.stages import Outcome, PreferenceStage

pytestmark = pytest.mark.timeout(900)  # several launches each, on cores that may be shared

SMALL = (
    "sequence.tasks=[instruct]",
    "data.max_train=32",
    "sft.epochs=0",
    "preference.epochs=1",
    "evaluation.metrics=[preference_accuracy,rouge_l]",
    "evaluation.batch_size=1",
    "evaluation.max_new_tokens=2",
    "checkpoint.every=1",
    "cache.enabled=false",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_process(
    number: int, words: Sequence[str], port: int, address: str = "127.0.0.1", before: Sequence[str] = (), **more: str
) -> subprocess.Popen[str]:
    """One of two ranks of ``mishaps.py``; ``before`` stands before its command, ``more`` is added to its environment."""
    where = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [*before, sys.executable, str(REPOSITORY / "tests" / "mishaps.py"), *words],
        env={**environment(), "OMP_NUM_THREADS": "1", **where, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(what: str, folder: Path, *overrides: str, rank: int = 1) -> list[subprocess.Popen[str]]:
    """The ranks of a training in which ``what`` happens on one."""
    port, words = free_port(), [what, str(rank), *QUICK, *SMALL, f"run.dir={folder}", *overrides]
    return [rank_process(number, words, port) for number in range(2)]


def ended(processes: list[subprocess.Popen[str]], timeout: float = 280) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        found.append((process.returncode, out, err))
    return found


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for line in (folder / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_stops_both(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (code, _, told), (other_code, _, other) = ended(ranks("nan", folder))
    assert (code, other_code) == (3, 3)
    (line,) = told.splitlines()
    assert line.startswith("error: loss is nan at step 2 of the preference stage of task instruct (rank 1: instruct/train/")
    assert "rank 0" not in line and "," not in line.split("rank 1: ")[1]  # the one row, of the one rank
    assert line.endswith("the optimiser has not taken this step")
    assert other == ""
    assert [row["stage_step"] for row in rows(folder, "step")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_such_a_step_may_be_skipped_as_often_as_is_said(zero: int, tmp_path: Path) -> None:
    """Weights and moments are those of the step before, and the schedule goes on. Deterministic."""
    skip = "preference.max_skipped_steps=1", f"zero={zero}"
    for name in ("first", "second"):
        (code, out, told), _ = ended(ranks("nan", tmp_path / name, *skip))
        assert code == 0, told
        assert "step 2 of the preference stage of task instruct is skipped: loss nan (rank 1: instruct/train/" in out
    (row,) = rows(tmp_path / "first", "skipped")
    assert (row["stage_step"], row["loss"], row["skipped"]) == (2, None, 1) and "rank 1: instruct/train/" in row["rows"]
    steps = rows(tmp_path / "first", "step")
    assert [step["stage_step"] for step in steps] == [1, 3, 4]
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert all(torch.isfinite(value).all() and value.equal(second[name]) for name, value in first.items())
    (code, _, told), _ = ended(ranks("nothing", tmp_path / "whole", f"zero={zero}"))
    assert code == 0, told
    whole = rows(tmp_path / "whole", "step")
    assert [step["lr"] for step in steps] == [whole[i]["lr"] for i in (0, 2, 3)]
    assert steps[0]["loss"] == whole[0]["loss"] and steps[1]["loss"] != whole[2]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("stopped_at", "zero"), [(5, 0), (1, 0), (1, 1), (1, 2), (1, 3)])
def test_what_was_skipped_before_a_run_was_stopped_counts(
    stopped_at: int, zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is for a stage, not for a process: the second bad step, after a stop, is one too many.

    Stopped at the first micro-batch, the run is saved before a step was taken, when the optimiser has no state.
    """
    usual, calls = PreferenceStage.outcome, []

    def outcome(self: PreferenceStage, *arguments: Any) -> Outcome:
        calls.append(None)
        if len(calls) == stopped_at:  # each step has two micro-batches: the fifth is of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        result = usual(self, *arguments)
        return result._replace(losses=result.losses * float("nan")) if len(calls) == 1 else result

    monkeypatch.setattr(PreferenceStage, "outcome", outcome)
    words = *SMALL, f"zero={zero}", "preference.max_skipped_steps=1"
    with pytest.raises(Interrupted):
        train_here(tmp_path / "run", *words)
    assert [row["stage_step"] for row in rows(tmp_path / "run", "skipped")] == [1]
    calls.clear()
    with pytest.raises(TrainingDiverged, match=f"loss is nan at step {4 if stopped_at == 5 else 2} "):
        train_here(tmp_path / "run", *words)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_between_batches_of_an_evaluation(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    (code, _, told), (other_code, *_) = ended(ranks("signal", folder))
    assert (code, other_code) == (128 + signal.SIGTERM,) * 2, told
    (line,) = told.splitlines()
    assert "stopped by SIGTERM and saved (task 1, commit)" in line
    assert not (folder / "tasks").exists()  # it did not come to the end of the evaluation
    for run in (folder, whole):
        codes = [code for code, *_ in ended(ranks("nothing", run))]
        assert codes == [0, 0]
    assert (folder / "scores.json").read_text() == (whole / "scores.json").read_text()
    assert adapter(folder).keys() == adapter(whole).keys()
    assert all(value.equal(adapter(whole)[name]) for name, value in adapter(folder).items())


@pytest.mark.slow
def test_a_line_that_rank_0_cannot_write_stops_both(tmp_path: Path) -> None:
    """With no checkpoint in between: the other does not wait for it."""
    folder = tmp_path / "run"
    (code, _, told), (other_code, _, other) = ended(ranks("full", folder, "checkpoint.every=null", rank=0))
    assert (code, other_code) == (1, 1)
    (line,) = told.splitlines()
    assert line.startswith(f"error: {folder}: cannot be written ([Errno 28] No space left on device)")
    assert other == ""
    assert len(rows(folder, "step")) <= 1


def wait_for_step(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or not rows(folder, "step"):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named(stopped: int, tmp_path: Path) -> None:
    """SIGSTOP: it is there and says nothing."""
    folder = tmp_path / "run"
    processes = ranks("nothing", folder, "preference.epochs=200", "runtime.silence_timeout=10")
    wait_for_step(folder, processes)
    processes[stopped].send_signal(signal.SIGSTOP)
    try:
        _, told = processes[1 - stopped].communicate(timeout=120)
    finally:
        processes[stopped].kill()
    assert processes[1 - stopped].returncode == 1
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert (
        line.startswith(f"error: rank {stopped} is silent for 1")
        and f"(last seen on {socket.gethostname()}, task instruct, " in line
    )
    processes[stopped].wait(timeout=60)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_place(tmp_path: Path) -> None:
    """Its threads live, its main thread does not get on; the other waits in a collective."""
    (code, _, told), (other_code, out, _) = ended(ranks("hang", tmp_path / "run", "runtime.hang_timeout=10"))
    assert (code, other_code) == (1, 1)
    assert "rank 1 hangs now" in out
    (line,) = told.splitlines()
    assert (
        line.startswith("error: rank 1 hangs (on ") and "task instruct, preference, step 2, in hang (mishaps.py, line " in line
    )


# -- two hosts ---------------------------------------------------------------------------------------------------------


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, each with an end of one link: as far apart as two machines. The first's address is 10.77.0.1."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need the command ip, of the package iproute2")
    names = [f"lifealign-{os.getpid()}-{number}" for number in (1, 2)]
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"two hosts need network namespaces, which are not allowed here: {made.stderr.strip()}")
    ip("netns", "add", names[1])
    try:
        joined = ip("link", "add", "end1", "netns", names[0], "type", "veth", "peer", "name", "end2", "netns", names[1])
        if joined.returncode:
            pytest.skip(f"two hosts need a link between namespaces, which is not allowed here: {joined.stderr.strip()}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", f"end{number}")
            ip("-n", name, "link", "set", f"end{number}", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_whose_link_is_cut_within_a_step(hosts: list[str], tmp_path: Path) -> None:
    """Both sides end within two minutes and name the other; once the link is back the same commands go on."""
    folder = tmp_path / "run"
    words = "nothing", "1", *QUICK, *SMALL, f"run.dir={folder}", "preference.epochs=8"

    def start() -> list[subprocess.Popen[str]]:
        return [
            rank_process(n, words, 29500, "10.77.0.1", ("ip", "netns", "exec", host), GLOO_SOCKET_IFNAME=f"end{n + 1}")
            for n, host in enumerate(hosts)
        ]

    processes = start()
    wait_for_step(folder, processes)
    ip("-n", hosts[0], "link", "set", "end1", "down")
    cut = time.monotonic()
    found = ended(processes, timeout=150)
    assert time.monotonic() - cut < 120
    for number, (code, _, told) in enumerate(found):
        assert code == 1
        assert told.splitlines()[-1].startswith(f"error: rank {1 - number} is silent for 6"), told
        assert "the network is cut" in told and "Traceback" not in told
    before = [row["step"] for row in rows(folder, "step")]
    assert 0 < len(before) < 32

    ip("-n", hosts[0], "link", "set", "end1", "up")
    assert [code for code, *_ in ended(start())] == [0, 0]
    assert [row["step"] for row in rows(folder, "step")] == list(range(1, 33))
