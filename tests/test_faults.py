"""What ends a run from outside: signals, other runs, a full disk, damage. It ends with a line and a code, and goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from endings import differences
from support import QUICK, REPOSITORY, train_here

from lifealign.errors import StorageFailed, UserError
from lifealign.runtime.checkpoint import NAME
from lifealign.runtime.lock import locked

LONGER = ("sft.epochs=6", "preference.epochs=6", "checkpoint.every=5", "evaluation.metrics=[mean_log_sigmoid]")
"""Enough steps for a signal to arrive within them."""


def start(folder: Path, *launcher: str, overrides: tuple[str, ...] = LONGER) -> subprocess.Popen[str]:
    script = str(REPOSITORY / "launch" / "train.py")
    words = [*(launcher or (sys.executable,)), script, *QUICK, *overrides, f"run.dir={folder}", "cache.enabled=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = folder / "metrics.jsonl"
        if log.exists() and log.read_text().count('"kind": "step"') >= count:
            return
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps within two minutes")


def assert_same(folder: Path, expected: Path) -> None:
    assert differences(folder, expected) == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder).wait(timeout=250) == 0
    return folder


def test_a_second_signal_after_a_while_ends_the_process_at_once() -> None:
    """One that comes at once is the same request: launchers send several."""
    code = "\n".join(
        (
            "import time",
            "from lifealign.runtime import signals",
            "assert signals.AGAIN_SECONDS == 5",
            "signals.AGAIN_SECONDS = 1.0",
            "with signals.StopSignals():",
            "    print('ready', flush=True)",
            "    deadline = time.monotonic() + 60",
            "    while time.monotonic() < deadline:",
            "        time.sleep(0.1)",
        )
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_within_the_stage_and_the_run_goes_on(number: int, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(folder, 8, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert f"stopped by {signal.Signals(number).name} and saved" in said and "the same command goes on" in said
    assert "Traceback" not in said
    assert any("." in path.name for path in (folder / "checkpoints").iterdir())  # saved where it was, not only between stages
    assert start(folder).wait(timeout=250) == 0
    assert_same(folder, uninterrupted)


@pytest.mark.slow
def test_killed_and_gone_on(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for steps in (3, 14):
        process = start(folder)
        wait_for_steps(folder, steps, process)
        process.kill()
        process.wait(timeout=60)
    assert start(folder).wait(timeout=250) == 0
    assert_same(folder, uninterrupted)


def test_the_second_run_on_a_directory_refuses(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "held"), pytest.raises(UserError, match=r"run: a run is going on there; .* another run\.dir"):
        train_here(tmp_path / "run")


@pytest.mark.parametrize("where", ["run", "tasks"])
def test_links_that_lead_out_of_the_run_directory_are_refused(where: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if where == "run":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        (folder / where).symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a symbolic link"):
        train_here(folder)
    assert not [path for path in elsewhere.iterdir() if path.name != "lock"]


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ".hidden", "a/b", "a\nb", ""])
def test_names_that_would_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    quoted = json.dumps(name)
    with pytest.raises(UserError, match=r"sequence\.tasks=.*a name becomes a folder's"):
        train_here(tmp_path / "run", f"sequence.tasks=[{quoted}]")
    with pytest.raises(UserError, match=r"run\.name=.*a name becomes a folder's"):
        train_here(tmp_path / "run", f"run.name={quoted}")


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_it(uninterrupted: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the first checkpoint fits, the one with AdamW's moments does not."""
    folder = tmp_path / "run"
    size = max(p.stat().st_size for p in (uninterrupted / "checkpoints").rglob("tensors.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(StorageFailed, match=r"cannot be written .*the newest checkpoint stands"):
            train_here(folder, *LONGER, "cache.enabled=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in (folder / "checkpoints").iterdir() if NAME.fullmatch(path.name)]
    train_here(folder, *LONGER, "cache.enabled=false")
    assert (folder / "scores.json").exists()


DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2")


def processes_of(folder: Path) -> dict[str, list[psutil.Process]]:
    """``ranks`` of a run, and the ``launcher`` of this node, whose children they are."""
    found: dict[str, list[psutil.Process]] = {"ranks": [], "launcher": []}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"run.dir={folder}" in words and "deepspeed.launcher.launch" in words:
            found["launcher"].append(process)
        elif f"run.dir={folder}" in words and any(word.startswith("--local_rank") for word in words):
            found["ranks"].append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "launcher", "command"])
def test_nothing_is_left_of_two_ranks(victim: str, tmp_path: Path) -> None:
    """SIGKILL of a rank or of the node's launcher, SIGTERM to the command: all end within a minute, and the run goes on."""
    folder = tmp_path / "run"
    command = start(folder, *DEEPSPEED)
    wait_for_steps(folder, 8, command)
    found = processes_of(folder)
    assert (len(found["ranks"]), len(found["launcher"])) == (2, 1)
    if victim == "command":
        command.terminate()
    else:
        (found["ranks"][1] if victim == "rank" else found["launcher"][0]).kill()
    said = command.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs([*found["ranks"], *found["launcher"]], timeout=60)
    assert not alive
    if victim == "rank":
        assert command.returncode != 0
    else:
        assert "the launcher is gone" in said
        assert "and saved" in said
    assert start(folder, *DEEPSPEED).wait(timeout=250) == 0
    assert len(list((folder / "tasks").iterdir())) == 2


@pytest.mark.slow
def test_a_supervised_launch_tells_of_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Stock deepspeed exits 0 at once; supervised, the command ends when the ranks have saved, with their code."""
    folder = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    supervised = sys.executable, str(REPOSITORY / "launch" / "supervised.py"), *DEEPSPEED, "--master_port", str(port)
    command = start(folder, *supervised)
    wait_for_steps(folder, 8, command)
    found = processes_of(folder)
    assert (len(found["ranks"]), len(found["launcher"])) == (2, 1)
    found["launcher"][0].kill()
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 128 + signal.SIGTERM, said
    assert "the launcher is gone" in said and "and saved" in said
    assert not any(process.is_running() for process in found["ranks"])  # the command waited for them
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("script", "code"), [("exit 3", 3), ("(sleep 0.2; exit 5) & exit 0", 5), ("exit 0", 0), ("kill -9 $$", 137)]
)
def test_a_supervised_command_ends_with_the_code_of_all_its_processes(script: str, code: int) -> None:
    words = sys.executable, str(REPOSITORY / "launch" / "supervised.py"), "sh", "-c", script
    assert subprocess.run(words, timeout=60).returncode == code


def test_a_supervised_command_that_is_not_there() -> None:
    words = sys.executable, str(REPOSITORY / "launch" / "supervised.py")
    for more, told in (((), "give the command to start"), (("no-such-command",), "no-such-command: No such file")):
        ended = subprocess.run([*words, *more], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and ended.stderr.startswith(f"error: {told}")
