"""The root of the configuration, the checks that cross its parts, and what makes two configurations the same run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from lifealign.data.options import DataOptions, SequenceOptions
from lifealign.errors import UserError, library_line
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.options import EvaluationOptions
from lifealign.models.options import CacheOptions, ModelOptions
from lifealign.objectives import Objective  # noqa: F401  registers the objectives
from lifealign.registry import component
from lifealign.runtime.engine import ZeroOptions
from lifealign.runtime.files import read_yaml
from lifealign.runtime.options import CheckpointOptions, Resume, RunOptions, RuntimeOptions, TrackingOptions
from lifealign.stages import StageOptions
from lifealign.strategies import Strategy  # noqa: F401  registers the strategies

INCIDENTAL = ("run", "resume", "tracking", "checkpoint", "cache", "runtime")
"""Sections that say how a run is kept and watched, and nothing, beyond rounding, about what it computes."""

ASKING = ("base_url", "api_key_env", "concurrency", "timeout", "attempts", "backoff", "max_requests")
"""Of ``evaluation.judge``: how a judge is reached, likewise. The others say which judge it is and what it is asked."""

COMPONENTS = ("objective", "strategy")
"""Sections whose schema is that of a registered component."""


@dataclass
class Config:
    """Everything a run depends on. ``objective`` and ``strategy`` are registered components, chosen by name."""

    seed: int = 0
    resume: Resume = Resume.auto
    run: RunOptions = field(default_factory=RunOptions)
    sequence: SequenceOptions = MISSING
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sft: StageOptions = field(default_factory=StageOptions)
    preference: StageOptions = field(default_factory=StageOptions)
    objective: Any = MISSING
    strategy: Any = MISSING
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def check_batches(self, pairs: Mapping[str, int], ranks: int) -> None:
        """Raises UserError where batch sizes do not divide, or a task has fewer training pairs than there are ranks."""
        self.sft.accumulation("sft", ranks)
        self.preference.accumulation("preference", ranks)
        task, fewest = min(pairs.items(), key=lambda item: item[1])
        if fewest < ranks:
            raise UserError(f"task '{task}' has {fewest} training pairs for {ranks} ranks; use fewer ranks or more data")


ConfigStore.instance().store(name="schema", node=Config)


def build(composed: DictConfig) -> Config:
    """The composed configuration as objects; ``objective`` and ``strategy`` become the components themselves.

    Raises:
        UserError: for a value out of range, or values that do not go together.
    """
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    for group in COMPONENTS:
        chosen = getattr(config, group)
        if chosen.name != type(chosen).name:
            raise UserError(f"{group}.name={chosen.name}: components are chosen with {group}={chosen.name}")
    config.strategy.check(config.zero)
    config.sft.check("sft")
    config.preference.check("preference")
    if config.sft.epochs == 0 and config.preference.epochs == 0:
        raise UserError("sft.epochs=0 and preference.epochs=0: nothing would be trained; give one of them an epoch")
    return config


def load_run(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of an earlier run, from its ``config.yaml``, with ``overrides`` (``key=value``) on top.

    Raises:
        UserError: where the folder holds no run.
    """
    held = folder / "config.yaml"
    if not held.exists():
        raise UserError(f"{folder} holds no run: there is no config.yaml in it")
    for override in overrides:
        key = override.split("=")[0]
        if "=" not in override or (key in Config.__dataclass_fields__ and key not in ("seed", "resume")):
            raise UserError(f"'{override}': give single keys of the run's configuration, such as evaluation.batch_size=8")
    merged = _read_run(held)
    for override in overrides:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except ValidationError as error:
            raise UserError(f"'{override}': {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _read_run(held: Path) -> DictConfig | ListConfig:
    """What a run's ``config.yaml`` says, under the schema of the components that it names."""
    read_yaml(held)  # refuses tags, with the line
    try:
        values = OmegaConf.load(held)
        composed = OmegaConf.structured(Config)
        for group in COMPONENTS:
            composed[group] = OmegaConf.structured(component(group, values[group].name))
        composed.sequence = OmegaConf.structured(SequenceOptions)
        return OmegaConf.merge(composed, values)
    except (OmegaConfBaseException, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{held}: not what a run of this version writes ({library_line(error)})") from error


def resolved(composed: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, secrets masked; what ``config.yaml`` holds."""
    return _masked(OmegaConf.to_container(composed, resolve=True, enum_to_str=True))


def _masked(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _masked(v, str(k)) for k, v in value.items()}
    secret = re.search(r"(api_?key|token|secret|password)$", key, re.IGNORECASE) and isinstance(value, str)
    return "***" if secret else value


def settings_hash(settings: Mapping[str, Any]) -> str:
    """sha256 over the settings that matter, of what ``config.yaml`` holds; the same however a run is kept and watched."""
    return hashlib.sha256(json.dumps(that_matter(settings), sort_keys=True).encode()).hexdigest()


def run_name(composed: DictConfig) -> str:
    """Name of a run that is told no other: a function of its settings, so that the same command finds it again."""
    digest = settings_hash(resolved(composed))[:8]
    return f"{composed.sequence.name}-{composed.strategy.name}-{composed.objective.name}-seed{composed.seed}-{digest}"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``key: before -> now`` for every setting that matters and is not the same."""
    then, those = _flat(that_matter(before)), _flat(that_matter(now))
    gone = object()
    return [
        f"{key}: {then.get(key)} -> {those.get(key)}"
        for key in sorted({*then, *those})
        if then.get(key, gone) != those.get(key, gone)
    ]


def that_matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are incidental; how a judge is reached is as it would be where nothing were said."""
    kept = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    if "judge" in kept.get("evaluation", {}):
        usual = {key: getattr(JudgeOptions(), key) for key in ASKING}
        kept["evaluation"] = {**kept["evaluation"], "judge": {**kept["evaluation"]["judge"], **usual}}
    return kept


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
