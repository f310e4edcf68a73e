"""What a person sees: a progress bar and the closing table. Everything the libraries say goes to ``run.log``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lifealign.runtime import distributed

console = Console(quiet=not distributed.is_main(), soft_wrap=True)


def _take_over_handlers() -> None:
    """Libraries that install a handler of their own write to the terminal through it; let the root handle them."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Inside, log records and warnings of rank 0 go to ``folder/run.log``."""
    _take_over_handlers()
    root = logging.getLogger()
    handler: logging.Handler = logging.NullHandler()
    if distributed.is_main():
        logging.raiseExceptions = False  # a line that a full disk does not take is lost: no traceback for each
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        warnings.simplefilter("default")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        warnings.simplefilter("ignore")


def step_progress(description: str, total: int) -> Progress:
    """A bar for one stage: task and stage, steps, loss, pairs a second, time left. Silent on ranks other than 0.

    Where standard output is no terminal, one line a stage is printed in its place, when the stage is done.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=False,
        disable=not distributed.is_main(),
        auto_refresh=sys.stdout.isatty(),
    )
    progress.add_task(description, total=total, figures="")
    return progress
