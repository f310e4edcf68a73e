"""The cells of a study: which runs there are, with which overrides, and where each of them lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lifealign.command import check_keys, conf_dir, prepare_arguments
from lifealign.config import build, resolved, settings_hash
from lifealign.errors import UserError, did_you_mean
from lifealign.study.options import StudyOptions, TuningOptions

ANY = "any"
"""The regime of a method that regimes do not concern."""

TUNING_METRICS = ("mean_log_sigmoid", "preference_accuracy", "chosen_nll")

Scales = Mapping[tuple[str, str], float | None]
"""Factor on the learning rates of a (method, regime); None where none could be chosen."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. Cells with the same settings share a folder, and run once."""

    sequence: str
    method: str
    regime: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def kept(self) -> Path:
        """What tables need of it once it has finished; it stands for the cell where the folder is gone."""
        return self.folder.with_name(self.folder.name + ".safetensors")

    @property
    def name(self) -> str:
        parts = (self.method, "" if self.regime == ANY else self.regime, self.sequence, f"seed {self.seed}")
        return ", ".join(part for part in parts if part)


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration as launch/train.py would compose it, checked.

    Raises:
        UserError, HydraException, OmegaConfBaseException: for overrides that it would refuse.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=prepare_arguments(overrides))
    check_keys(config)
    build(config)
    return config


def merged(*groups: Iterable[str]) -> tuple[str, ...]:
    """Overrides of all groups; of two with the same key the later one."""
    by_key: dict[str, str] = {}
    for override in (override for group in groups for override in group):
        by_key[override.lstrip("+").partition("=")[0]] = override
    return tuple(by_key.values())


@dataclass
class Grid:
    """All (sequence, method, regime) of a study, composed, and so checked, before anything runs.

    Args:
        options: the study.
        passed: overrides for every cell.
    """

    options: StudyOptions
    passed: Sequence[str]

    def __post_init__(self) -> None:
        only, only_regimes = self.options.only, self.options.only_regimes
        methods, regimes = self.options.methods, self.options.regimes
        self.methods = {label: m for label, m in methods.items() if only is None or label in only}
        self.regimes = {label: o for label, o in regimes.items() if only_regimes is None or label in only_regimes}
        self.configs = {where: composed(self.overrides(*where)) for where in self._places()}

    def _places(self) -> list[tuple[str, str, str]]:
        return [(s, *variant) for s in self.options.sequences for variant in self.variants()]

    def variants(self) -> list[tuple[str, str]]:
        """(method, regime), with ``ANY`` for a method that regimes do not concern."""
        return [(m, r) for m, method in self.methods.items() for r in (self.regimes if method.replay else [ANY])]

    @property
    def tuning(self) -> TuningOptions | None:
        """Set where learning rates are to be chosen."""
        return self.options.tuning if self.options.tuning and self.options.tuning.wanted else None

    @cached_property
    def tuning_task(self) -> str:
        """The task of whose training rows a slice is set aside."""
        assert self.tuning is not None
        config = composed(merged([f"+sequence={self.options.sequences[0]}"], self.options.common, self.passed))
        tasks = [str(task) for task in config.sequence.tasks]
        if self.tuning.task not in (None, *tasks):
            raise UserError(
                f"study.tuning.task={self.tuning.task}: no task of the first sequence{did_you_mean(self.tuning.task, tasks)}"
            )
        return self.tuning.task or tasks[0]

    def overrides(self, sequence: str, method: str, regime: str) -> tuple[str, ...]:
        """What the cells of a place share, whatever their seed and learning rate."""
        own, of_regime = self.options.methods[method], self.options.regimes.get(regime, [])
        return merged(self._shared(sequence), of_regime, own.overrides)  # so a sweep may vary what a regime sets

    def _shared(self, sequence: str) -> tuple[str, ...]:
        aside = []
        if self.tuning is not None:
            aside = [f"data.tuning_pairs={self.tuning.pairs}", f"data.tuning_task={self.tuning_task}"]
        return merged([f"+sequence={sequence}"], self.options.common, aside, self.passed)

    def tuning_place(self, method: str, regime: str) -> tuple[str, str]:
        """The (method, regime) whose learning rate a variant takes; a regime counts where it changes more than replay."""
        like = self.options.methods[method].tuned_as or method
        return like, (regime if self._of_first_task(regime) else ANY)

    def tuning_overrides(self, method: str, regime: str) -> tuple[str, ...]:
        """A run on the first task alone, scored on the slice; without seed."""
        here = [f"sequence.tasks=[{self.tuning_task}]", "data.tuning=true"]
        here.append(f"evaluation.metrics=[{','.join(TUNING_METRICS)}]")
        own = self.options.methods[method].overrides
        return merged(self._shared(self.options.sequences[0]), self._of_first_task(regime), own, here)

    def _of_first_task(self, regime: str) -> list[str]:
        """A regime's overrides without the strategy's options: they say what becomes of past tasks, and there are none."""
        overrides = self.options.regimes.get(regime, [])
        return [override for override in overrides if not override.lstrip("+").startswith("strategy.")]

    def cells(self, scales: Scales) -> list[Cell]:
        """All cells whose learning rate is known: those whose (method, regime) has no scale are left out.

        An empty ``scales`` leaves learning rates as they are.
        """
        cells, homes = [], dict[tuple[str, int], Path]()
        for place, config in self.configs.items():
            scale = scales.get(place[1:]) if scales else 1.0
            if scale is None:
                continue
            rates = learning_rates(config, scale) if scales else []
            same = settings_hash({**resolved(config), "rates": rates})
            for seed in self.options.seeds:
                folder = homes.setdefault((same, seed), self.options.runs_folder.joinpath("cells", *place, f"seed{seed}"))
                overrides = merged(self.overrides(*place), [f"seed={seed}"], rates)
                cells.append(Cell(*place, seed, folder, overrides))
        return cells

    def planned(self, scales: Scales) -> int:
        """How many cells there are once every learning rate is known; until then those of one rate's choice count as apart."""
        waiting = {
            (settings_hash(resolved(config)), self.tuning_place(*place[1:]))
            for place, config in self.configs.items()
            if scales and scales.get(place[1:]) is None
        }
        return len({cell.folder for cell in self.cells(scales)}) + len(waiting) * len(self.options.seeds)


def learning_rates(config: DictConfig, scale: float) -> list[str]:
    """The overrides that multiply both stages' learning rates."""
    return [f"{stage}.lr={config[stage].lr * scale!r}" for stage in ("sft", "preference")]
