"""One run from its configuration to its closing table: the run directory, logging, tracking, the task loop, the report."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lifealign import sweep
from lifealign.config import Config, build, resolved, run_name
from lifealign.data.tasks import Task, seen_prompts
from lifealign.errors import UserError, storage_failed
from lifealign.evaluation.report import write_report
from lifealign.evaluation.samples import read_changes
from lifealign.evaluation.scores import ScoreBook, closing_table
from lifealign.evaluation.stability import stability
from lifealign.lifelong import Lifelong
from lifealign.memory.bank import read_ledger
from lifealign.memory.contributions import summarise
from lifealign.resuming import changed_settings, write_settings
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.files import read_json_lines, write_json
from lifealign.runtime.lock import locked
from lifealign.runtime.options import Resume
from lifealign.runtime.orphan import ends_with_launcher
from lifealign.runtime.signals import StopSignals
from lifealign.runtime.terminal import console, log_file
from lifealign.runtime.tracking import Tracker
from lifealign.runtime.watchdog import watched

log = logging.getLogger(__name__)


def train(composed: DictConfig) -> float | None:
    """Run, or go on with, the run that a configuration describes; every rank calls this.

    A job of a sweep that has finished already is left as it is.

    Returns:
        Last of the first of ``evaluation.metrics``: what a sweeper that searches goes by. None where there is none.
    """
    config = build(composed)
    config.tracking.check()
    distributed.start()
    settings = resolved(composed)
    with (
        StopSignals() as signals,
        ends_with_launcher(),
        watched(config.runtime),
        run_directory(composed, config, settings) as folder,
    ):
        job, told = sweep.current(), settings
        if job is not None:
            job.run = folder
            config.tracking.group = config.tracking.group or job.group
            told = {**settings, "sweep": job.swept}
            finished = distributed.broadcast_object(sweep.finished_scores(folder) if distributed.is_main() else None)
            if finished is not None and config.resume is not Resume.force:
                console.print(f"{folder}: finished already", markup=False)
                job.stop = signals.anywhere()
                return searched(config, finished)
        with log_file(folder), Tracker(config.tracking, folder, told) as tracker:
            lifelong = Lifelong(config, folder, tracker, settings, signals)
            log_data(lifelong)
            lifelong.run()
            if distributed.is_main():
                try:
                    report(lifelong)
                    tracker.adapter(folder / "adapter")
                except OSError as error:
                    raise storage_failed(folder, error) from error
                console.print(closing_table(lifelong.book))
                console.print(f"{folder}: adapter/, scores.json, report/index.html")
        if job is not None:
            job.stop = signals.anywhere()
    return searched(config, lifelong.book)


def searched(config: Config, book: ScoreBook) -> float | None:
    """Last of the first of ``evaluation.metrics``; None where the run was not scored by it."""
    metrics = config.evaluation.metrics
    return book.figures(metrics[0])["last"] if metrics and metrics[0] in book.metrics else None


@contextmanager
def run_directory(composed: DictConfig, config: Config, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Find or make the run directory, on rank 0 for all ranks, and write ``config.yaml`` into it. Inside, it is this run's.

    Raises:
        UserError: on every rank, where the directory holds a run with other settings, or one that is running.
    """
    outcome: Path | UserError | None = None
    with ExitStack() as held:
        if distributed.is_main():
            try:
                outcome = _chosen_directory(_wanted_directory(composed, config), config)
                held.enter_context(locked(outcome, "a run is going on there; wait for it or end it, or name another run.dir"))
                _prepare_directory(outcome, config, settings)
            except UserError as error:
                outcome = error
            except OSError as error:
                outcome = UserError(f"run.dir: {error}")
        outcome = distributed.broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        assert outcome is not None
        yield outcome


def _wanted_directory(composed: DictConfig, config: Config) -> Path:
    if config.run.dir is not None and HydraConfig.get().mode is not RunMode.MULTIRUN:
        return Path(config.run.dir)
    sweeping = HydraConfig.get().mode is RunMode.MULTIRUN
    parent = Path(HydraConfig.get().sweep.dir) if sweeping else Path("runs")
    return parent / (config.run.name or run_name(composed))


def _chosen_directory(folder: Path, config: Config) -> Path:
    if (folder / "config.yaml").exists() and config.resume is Resume.never:
        if config.run.dir is not None and folder == Path(config.run.dir):  # jobs of a sweep have folders of their own
            raise UserError(f"run.dir={folder} holds a run already; name another run.dir, or leave out resume=never")
        return _next_free(folder)
    return folder


def _prepare_directory(folder: Path, config: Config, settings: Mapping[str, Any]) -> None:
    link = next((path for path in [folder, *folder.iterdir()] if path.is_symlink()), None)
    if link is not None:  # what is written below it would land elsewhere
        raise UserError(f"{link}: is a symbolic link; a run writes to folders of its own, so name the real one")
    if checkpoint.newest_folder(folder / "checkpoints") is not None:
        changed = changed_settings(folder, settings)
        if changed and config.resume is not Resume.force:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{folder} holds a run with another {changed[0]}{more}; resume=force goes on with the new setting, "
                "another run.dir starts anew"
            )
    elif not (folder / "scores.json").exists():  # of a run that has come somewhere they change once it may go on
        write_settings(folder, settings)


def _next_free(folder: Path) -> Path:
    """``folder-2``, ``folder-3``, ...: the first that does not exist."""
    number = 2
    while (candidate := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


def log_data(lifelong: Lifelong) -> None:
    for task, seen in zip(lifelong.tasks, seen_prompts(lifelong.tasks), strict=True):
        log.info("%s: %d training, %d held-out pairs; dropped: %s", task.name, len(task.train), len(task.test), _dropped(task))
        if seen:
            log.warning("%s: prompts of %d held-out pairs stand in training pairs, too", task.name, seen)


def _dropped(task: Task) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in task.dropped.items() if count) or "none"


def report(lifelong: Lifelong) -> None:
    """Write ``report/`` from what the run left on disk, and ``stability.json`` where old tasks were probed."""
    probes = [row for row in read_json_lines(lifelong.folder / "metrics.jsonl") if row["kind"] == "probe"]
    gap = stability(probes)
    if gap is not None:
        write_json(lifelong.folder / "stability.json", gap)
    write_report(
        lifelong.folder / "report",
        lifelong.book,
        data=data_summary(lifelong.tasks),
        config_yaml=(lifelong.folder / "config.yaml").read_text(encoding="utf-8"),
        timing=lifelong.timing.now(),
        changes=read_changes(lifelong.folder / "tasks"),
        consolidation=consolidation_summary(lifelong.folder),
        versions=versions(),
        memory=read_ledger(lifelong.folder / "memory"),
        probes=probes,
    )


def data_summary(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What each task was trained and scored on; the hash is over its pairs in their order."""
    return [
        {
            "task": task.name,
            "about": task.domain,
            "training pairs": len(task.train),
            "held-out pairs": len(task.test),
            "with a prompt of a training pair": seen,
            "dropped": _dropped(task),
            "sha256": task.data_hash,
        }
        for task, seen in zip(tasks, seen_prompts(tasks), strict=True)
    ]


def consolidation_summary(folder: Path) -> list[dict[str, Any]]:
    """Every consolidated entry of the long-term memory, its factors together; empty where the strategy keeps none."""
    rows = []
    for entry in read_ledger(folder / "memory"):
        if entry["consolidated"]:
            summary = summarise(entry["factors"])
            rows.append(
                {
                    "task": entry["task"],
                    "stage": entry["stage"],
                    "factors": len(entry["factors"]),
                    "kept rank": summary.kept_rank,
                    "kept energy": summary.kept_energy,
                    "share in the span of history": summary.history_share,
                    "refined norm / update norm": summary.norm / summary.update_norm if summary.update_norm else 0.0,
                }
            )
    return rows


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    names: Sequence[str] = ("lifealign", "torch", "deepspeed", "transformers", "peft", "datasets")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
