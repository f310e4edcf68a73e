"""What a user may say about running: where a run lives, how it is tracked and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec

from lifealign.errors import UserError, check_name


class Resume(Enum):
    """What to do with a run directory that holds an interrupted run."""

    auto = "auto"  # continue it
    never = "never"  # start over in a directory of its own
    force = "force"  # continue it even though settings that matter have changed


class TrackingMode(Enum):
    """wandb's modes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class RunOptions:
    """``run.*``."""

    name: str | None = None  # None: made of sequence, strategy, objective, seed and a hash of the settings
    dir: str | None = None  # None: runs/NAME, or NAME under hydra.sweep.dir in a sweep

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name("run.name", self.name)


GIVEN_UP = 1800
"""Seconds after which a process group gives up by itself, and names nobody."""


@dataclass
class RuntimeOptions:
    """``runtime.*``: when several ranks give up on one of them. In seconds; None: never."""

    silence_timeout: float | None = 60.0  # without a sign of life: stopped, gone, or behind a cut link
    hang_timeout: float | None = 1200.0  # in which a rank that is alive has held the others up

    def __post_init__(self) -> None:
        for key in ("silence_timeout", "hang_timeout"):
            value = getattr(self, key)
            if value is not None and not 5 <= value < GIVEN_UP:
                raise UserError(f"runtime.{key}={value}: must be from 5 to below {GIVEN_UP} seconds; null switches it off")


@dataclass
class CheckpointOptions:
    """``checkpoint.*``. There is one at the end of every stage and task in any case."""

    every: int | None = 50  # optimiser steps from one checkpoint within a stage to the next; null: none within a stage
    keep: int = 2  # how many of the newest checkpoints stay on disk

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{key}={value}: must be at least 1")


class SinkName(Enum):
    """Where numbers go besides ``metrics.jsonl``."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    csv = "csv"


@dataclass
class TrackingOptions:
    """``tracking.*``: who is told of a run's numbers, and how often a step is logged."""

    sinks: list[SinkName] = field(default_factory=lambda: [SinkName.wandb])
    mode: TrackingMode = TrackingMode.offline
    project: str = "lifealign"
    group: str | None = None
    log_every: int = 1  # steps from one logged line to the next; a line holds means over them
    log_adapter: bool = False  # keep the adapter of the finished run as a wandb artifact

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise UserError(f"tracking.log_every={self.log_every}: must be at least 1")

    def check(self) -> None:
        """Raises UserError where a sink's package is not there; for whoever is about to track a run, and not to read one."""
        if SinkName.tensorboard in self.sinks and find_spec("tensorboard") is None:
            raise UserError("tracking.sinks: tensorboard is not installed; install lifealign[tensorboard], or leave it out")
