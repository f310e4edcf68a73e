"""What a user may say about a study: ``conf/study/NAME.yaml`` and ``study.KEY=VALUE`` on top."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lifealign.command import conf_dir
from lifealign.errors import UserError, did_you_mean
from lifealign.study.paper import TABLES

RESERVED = {
    "sequence": "study.sequences",
    "seed": "study.seeds",
    "strategy": "study.methods.LABEL.overrides",
    "objective": "study.methods.LABEL.overrides",
    "run.dir": "study.dir",
    "run.name": "study.dir",
    "resume": "study.dir (a study always goes on where it was)",
    "data.tuning": "study.tuning",
    "data.tuning_pairs": "study.tuning.pairs",
    "data.tuning_task": "study.tuning.task",
}
"""What the grid sets in every cell, and where a user says it instead."""


@dataclass
class MethodOptions:
    """A row of the tables: a strategy with an objective."""

    overrides: list[str] = field(default_factory=list)  # of launch/train.py
    replay: bool = True  # whether the regimes concern it; if not, it runs once and stands in the table of every regime
    shown: str = ""  # name in tables; default: its label
    ranked: bool = True  # False: an upper bound, which is not marked as best
    tuned_as: str | None = None  # the method whose learning rate it takes: one that trains the first task as it does


@dataclass
class SweepOptions:
    """One option of a method varied: a method for each value, labelled ``SWEEP_VALUE``."""

    method: str = MISSING  # label of the method
    key: str = MISSING  # such as strategy.projection_scale
    values: list[Any] = MISSING
    shown: str = ""  # name in tables and figures; default: the sweep's


@dataclass
class TuningOptions:
    """How a method's learning rate is chosen: see docs/studies.md."""

    scales: list[float] | None = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])  # factors on sft.lr and preference.lr
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # a short run each; the best mean is taken
    pairs: int = 50  # training rows of the first task set aside for it, in every cell
    task: str | None = None  # whose rows; null: the first task of the first sequence

    @property
    def wanted(self) -> bool:
        return self.scales is not None and self.scales != [1]


@dataclass
class StudyOptions:
    """``study.*``."""

    name: str = MISSING
    title: str = MISSING
    sequences: list[str] = MISSING
    seeds: list[int] = MISSING
    methods: dict[str, MethodOptions] = MISSING
    regimes: dict[str, list[str]] = field(default_factory=dict)  # label -> overrides; a table each. None: one, "default"
    sweeps: dict[str, SweepOptions] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)  # overrides of all cells
    tuning: TuningOptions | None = field(default_factory=TuningOptions)
    compared: str | None = None  # the method of the intervals "this minus each other"; null: none are made
    paper: str | None = None  # which of the paper's tables stands beside ours: main or ablation
    only: list[str] | None = None  # labels of the methods to run; null: all
    only_regimes: list[str] | None = None
    parallel: int = 2  # cells that run at once; each gets an equal share of the cores
    dir: str | None = None  # null: runs/study/NAME
    runs: str | None = None  # where cells and tuning runs lie; studies that name one folder share them. null: study.dir
    report_only: bool = False  # write the page from what is finished, and run nothing

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"runs/study/{self.name}")

    @property
    def runs_folder(self) -> Path:
        return Path(self.runs) if self.runs else self.folder


def read_arguments(arguments: Iterable[str]) -> tuple[StudyOptions, list[str]]:
    """The study that a command line asks for, and the overrides that it passes on to every cell.

    Raises:
        UserError: for an argument that cannot be read, or an option that does not exist or fit.
    """
    names, own, passed = [], [], []
    for argument in arguments:
        key, is_override, value = argument.lstrip("+").partition("=")
        if not is_override or argument.startswith("-"):
            raise UserError(f"'{argument}': a study takes +study=NAME, study.KEY=VALUE and overrides of launch/train.py")
        if key == "study":
            names.append(value)
        elif key.startswith("study."):
            own.append(f"{key.removeprefix('study.')}={value}")
        elif key in RESERVED or key.startswith("hydra."):
            raise UserError(f"{key}: a study sets it in every cell; give {RESERVED.get(key, 'none of hydra.*')}")
        else:
            passed.append(argument)
    known = sorted(path.stem for path in (conf_dir() / "study").glob("*.yaml"))
    if len(names) != 1:
        raise UserError(f"name one study: +study=NAME; known: {', '.join(known)}")
    if names[0] not in known:
        raise UserError(f"study={names[0]}: there is no such study{did_you_mean(names[0], known)}")
    return load(names[0], own), passed


def load(name: str, overrides: Iterable[str] = ()) -> StudyOptions:
    """``conf/study/NAME.yaml`` with ``overrides`` (``key=value``) on top, checked, its sweeps spread out as methods."""
    schema = OmegaConf.structured(StudyOptions(name=name))
    merged = OmegaConf.merge(schema, OmegaConf.load(conf_dir() / "study" / f"{name}.yaml"))
    for override in overrides:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except OmegaConfBaseException as error:
            raise UserError(_mistake(override, error, schema)) from error
    options: StudyOptions = OmegaConf.to_object(merged)  # type: ignore[assignment]
    options.regimes = options.regimes or {"default": []}
    options.methods = {**options.methods, **dict(_spread(options))}
    _check(options)
    return options


def _mistake(override: str, error: OmegaConfBaseException, schema: Any) -> str:
    key = str(error.full_key or override.partition("=")[0])
    message = str(error).strip().splitlines()[0]
    if "not in" in message:
        return f"'study.{key}' is no option of a study{did_you_mean(key.rpartition('.')[2], list(schema))}"
    return f"study.{override}: {message}"


def _spread(options: StudyOptions) -> Iterator[tuple[str, MethodOptions]]:
    """The methods of all sweeps."""
    for name, sweep in options.sweeps.items():
        base = _named(options.methods, sweep.method, f"study.sweeps.{name}.method")
        for value in sweep.values:
            written = "null" if value is None else str(value)
            overrides = [*base.overrides, f"{sweep.key}={written}"]
            shown = f"{sweep.shown or name} = {written}"
            tuned_as = base.tuned_as or sweep.method
            yield f"{name}_{written}", replace(base, overrides=overrides, shown=shown, tuned_as=tuned_as)


def _named(known: dict[str, MethodOptions], label: str, key: str) -> MethodOptions:
    if label not in known:
        raise UserError(f"{key}={label}: there is no such method{did_you_mean(label, known)}")
    return known[label]


def _check(options: StudyOptions) -> None:
    for key in ("sequences", "seeds", "methods"):
        if not getattr(options, key):
            raise UserError(f"study.{key} is empty; a study needs at least one")
    for key in ("only", "only_regimes"):
        if getattr(options, key) == []:
            raise UserError(f"study.{key} is empty; name at least one label (null: all)")
    if options.parallel < 1:
        raise UserError(f"study.parallel={options.parallel}: must be at least 1")
    if options.tuning and (options.tuning.scales == [] or min(options.tuning.scales or [1]) <= 0):
        raise UserError(f"study.tuning.scales={options.tuning.scales}: give factors above 0, or null for no tuning")
    if options.tuning and not options.tuning.seeds:
        raise UserError("study.tuning.seeds is empty; a learning rate is chosen by at least one short run")
    if options.tuning and options.tuning.pairs < 1:
        raise UserError(f"study.tuning.pairs={options.tuning.pairs}: must be at least 1")
    for label in (*options.methods, *options.regimes):
        if not re.fullmatch(r"[\w.-]+", label):
            raise UserError(f"'{label}': labels of methods and regimes name folders; use letters, digits, . _ and -")
    for label, method in options.methods.items():
        if method.tuned_as is not None:
            _named(options.methods, method.tuned_as, f"study.methods.{label}.tuned_as")
    if options.compared is not None:
        _named(options.methods, options.compared, "study.compared")
    if options.paper is not None and options.paper not in TABLES:
        raise UserError(f"study.paper={options.paper}: there is no such table{did_you_mean(options.paper, TABLES)}")
    for label in options.only or ():
        _named(options.methods, label, "study.only")
    for label in options.only_regimes or ():
        if label not in options.regimes:
            raise UserError(f"study.only_regimes: there is no regime '{label}'{did_you_mean(label, options.regimes)}")
