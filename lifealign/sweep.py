"""A sweep seen from its jobs: what it varies, which run each job is, how each of them ended.

Hydra calls the jobs, in this process one after another or, with some launchers, in processes of their own, perhaps on other
machines. So what the end of a sweep must know of its jobs goes through files: ``jobs/N.json`` in the folder of the sweep.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lifealign.evaluation.scores import ScoreBook
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.files import read_json, write_json

JOBS = "jobs"


@dataclass
class Job:
    """The job that runs now."""

    number: int
    sweep: Path  # the folder of the whole sweep
    swept: dict[str, Any]  # this job's value of each key that the sweep varies
    run: Path | None = None  # its run directory, once it has one
    stop: int | None = None  # a signal that asked for an end when this job had nothing left to do

    @property
    def group(self) -> str:
        """A name for all jobs of the sweep: the last two parts of its folder's path."""
        return "-".join(part for part in self.sweep.resolve().parts[-2:] if part != "/")


@dataclass(frozen=True)
class Ended:
    """``jobs/N.json``: how a job ended."""

    job: int
    swept: dict[str, Any]
    run: str | None  # name of its run directory; None where it did not come to have one
    exit_code: int
    error: str | None  # in one line


class Beginning(Callback):
    """Called by Hydra, with the whole sweep's configuration, before the first job starts."""

    folder: Path | None = None
    """Of the sweep that this process has begun."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Beginning.folder = Path(config.hydra.sweep.dir)
        shutil.rmtree(Beginning.folder / JOBS, ignore_errors=True)  # how jobs of an earlier call ended


_current: ContextVar[Job | None] = ContextVar("job", default=None)


def current() -> Job | None:
    """The job that runs now; None outside of a sweep."""
    return _current.get()


@contextmanager
def job(keys: Sequence[str]) -> Iterator[Job | None]:
    """Inside, :func:`current` is the job that Hydra has started; None outside of a sweep.

    Args:
        keys: those that the command line of the sweep varies.
    """
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        yield None
        return
    varied = dict.fromkeys([*keys, *(hydra.sweeper.get("params") or {})])
    here = Job(hydra.job.num, Path(hydra.sweep.dir), _values(hydra.overrides.task, varied))
    token = _current.set(here)
    try:
        yield here
    finally:
        _current.reset(token)
        gc.collect()  # a model and its engine refer to each other, and the next job needs their memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _values(overrides: Sequence[str], keys: Iterable[str]) -> dict[str, Any]:
    """This job's value of each key; of a group, the name that was chosen."""
    chosen = {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(list(overrides))}
    return {key: chosen[key] for key in keys if key in chosen}


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """Keys for which a command line gives several values.

    Raises:
        HydraException: for an override that cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def note(here: Job, exit_code: int, error: str | None) -> None:
    """Write down how a job ended. Rank 0 only."""
    if distributed.is_main():
        ended = Ended(here.number, here.swept, here.run.name if here.run else None, exit_code, error)
        write_json(here.sweep / JOBS / f"{here.number}.json", asdict(ended))


def read_ended(folder: Path) -> list[Ended]:
    """What the jobs of a sweep have noted, in their order."""
    noted = sorted((folder / JOBS).glob("*.json"), key=lambda path: int(path.stem))
    return [Ended(**read_json(path)) for path in noted]


def finished_scores(folder: Path) -> ScoreBook | None:
    """The scores of a run that has come to its end, report included; None where something is left to do."""
    newest = checkpoint.newest_folder(folder / "checkpoints")
    report = folder / "report" / "index.html"
    try:
        if newest is None or report.stat().st_mtime < (newest / checkpoint.STATE).stat().st_mtime:
            return None
        saved = ScoreBook.from_json(read_json(newest / checkpoint.STATE)["scores"])
    except (OSError, ValueError, KeyError):
        return None  # missing or damaged: the run itself, when it goes on, says which, and what can be done
    tasks = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["sequence"]["tasks"]
    whole = saved.metrics and all(len(saved.matrix(metric)) == len(tasks) for metric in saved.metrics)
    return saved if whole and saved.tasks == tasks else None
