"""Starting a run in ranks that may be killed: by commands, as a user does, or by forking this process, which is ten times
quicker to start since it has loaded all libraries already."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch
from support import environment

import lifealign.run  # noqa: F401  what a forked rank need not load again
from lifealign.runtime.terminal import console

Names = Mapping[str, str]
"""Of an environment."""


class Launch(Protocol):
    """Ranks that have been started."""

    def wait(self, seconds: float) -> int:
        """The exit code; TimeoutError where there is none in time."""

    def is_over(self) -> bool:
        """Whether it has ended."""

    def kill(self, rank: int) -> None:
        """SIGKILL for the process of a rank; where it has none yet, for what starts them."""

    def left(self, seconds: float) -> int:
        """How many processes are there still, so long after the end."""

    def end(self) -> None:
        """SIGKILL for all that is left."""


TICK = 0.01


def until_over(launch: Launch, seconds: float) -> None:
    """Wait for the end; TimeoutError after so many seconds, of which those do not count in which this process was stopped."""
    for _ in range(round(seconds / TICK)):
        if launch.is_over():
            return
        time.sleep(TICK)
    raise TimeoutError


class Command:
    """``python SCRIPT``, or ``deepspeed --num_gpus N SCRIPT`` for more than one rank.

    Args:
        mark: an argument that no other launch has.
    """

    def __init__(self, script: Path, words: Sequence[str], mark: str, ranks: int, names: Names, output: Path) -> None:
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
        self.words = [sys.executable, *(launcher if ranks > 1 else ()), str(script), *words, mark]
        self.script, self.mark = str(script), mark
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                self.words, stdout=file, stderr=file, env={**environment(), **names}, start_new_session=True
            )

    def wait(self, seconds: float) -> int:
        until_over(self, seconds)
        return self.process.returncode

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def kill(self, rank: int) -> None:
        ranks = [p for p in self._processes() if not any("deepspeed.launcher" in word for word in p.info["cmdline"])]
        numbers = sorted(process.pid for process in ranks)  # in the order of ranks, as they are started
        os.kill(numbers[rank] if len(numbers) > rank else self.process.pid, signal.SIGKILL)

    def left(self, seconds: float) -> int:
        return len(psutil.wait_procs(self._processes(), timeout=seconds)[1])

    def end(self) -> None:
        for process in self._processes():
            process.kill()

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if self.mark in (process.info["cmdline"] or ())]


class Forked:
    """Ranks that are copies of this process; as the launcher of deepspeed, it ends all where one has failed."""

    def __init__(self, script: Path, words: Sequence[str], mark: str, ranks: int, names: Names, output: Path) -> None:
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.codes: dict[int, int | None] = {}
        for rank in range(ranks):
            own = {**environment(), **names, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.codes[_fork(script, [*words, mark], own, output)] = None

    def wait(self, seconds: float) -> int:
        until_over(self, seconds)
        return next((code for code in self.codes.values() if code), 0)

    def is_over(self) -> bool:
        for pid in self._running():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.end()
        return not self._running()

    def kill(self, rank: int) -> None:
        os.kill(list(self.codes)[rank], signal.SIGKILL)

    def left(self, seconds: float) -> int:
        return len(self._running())

    def end(self) -> None:
        for pid in self._running():
            os.kill(pid, signal.SIGKILL)
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _running(self) -> list[int]:
        return [pid for pid, code in self.codes.items() if code is None]


def _fork(script: Path, words: Sequence[str], names: Names, output: Path) -> int:
    """Run a script as ``python SCRIPT`` would, in a copy of this process; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ.clear()
        os.environ.update(names)
        torch.set_num_threads(int(names["OMP_NUM_THREADS"]))  # what else is read when libraries are loaded
        console.quiet = names["RANK"] != "0"
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
