"""What several test files share: runs in this process, and commands as a user gives them."""

from __future__ import annotations

from lifealign.environment import prepare_process

prepare_process()

import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import redirect_stderr, redirect_stdout  # noqa: E402
from io import StringIO  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig, open_dict, read_write  # noqa: E402

from lifealign.command import conf_dir, prepare_arguments  # noqa: E402
from lifealign.run import train  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402

REPOSITORY = Path(__file__).parents[1]

QUICK = (
    "+sequence=six_domains",
    "sequence.tasks=[instruct,hc3]",
    "data.max_train=16",
    "data.max_eval=8",
    "sft.batch_size=8",
    "sft.micro_batch_size=4",
    "preference.batch_size=8",
    "preference.micro_batch_size=4",
    "evaluation.max_new_tokens=8",
    "tracking.mode=disabled",
)
"""Two tasks, sixteen pairs each, four optimiser steps a task or so."""


def compose_config(*overrides: str) -> DictConfig:
    """The configuration as a command would compose it, with Hydra's own part set for whoever asks for it."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("config", overrides=prepare_arguments(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return composed


def train_here(folder: Path, *overrides: str) -> Path:
    """Run a training in this process; returns its run directory."""
    train(compose_config(*QUICK, f"run.dir={folder}", *overrides))
    return folder


class Ended(NamedTuple):
    """How a command that was run in this process ended."""

    code: int
    out: str
    err: str


def end_here(main: Callable[[], object], *arguments: str) -> Ended:
    """Call what a launcher calls, in this process, with these arguments.

    The process group stays: DeepSpeed holds on to the first one of a process.
    """
    out, err, code = StringIO(), StringIO(), 0
    GlobalHydra.instance().clear()
    argv = mock.patch.object(sys, "argv", ["command.py", *arguments])
    stays = mock.patch.object(distributed, "stop")
    with argv, stays, redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """This environment's executables first on the path, and nothing of the process group of this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command(*words: str, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's executables first on the path; paths of scripts are the repository's."""
    return subprocess.run(
        list(words), cwd=cwd or REPOSITORY, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def launch(launcher: Sequence[str], *overrides: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``launch(["deepspeed", "--num_gpus", "2"], ...)``: a quick training under a launcher."""
    return command(*launcher, str(REPOSITORY / "launch" / "train.py"), *QUICK, *overrides, cwd=cwd)
