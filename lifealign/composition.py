"""What a composed configuration may name: values, presets and registered components; nothing to be imported or called.

Our own part of it is checked against its schema. Hydra's part names classes and functions, which Hydra calls before any of
our code sees the configuration: callbacks, launchers, sweepers, the handlers of logs. A preset of any group can write to
that part, so all of it is looked through as soon as it is composed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lifealign.errors import UserError, library_line

TARGET = "_target_"

HYDRAS_OWN = re.compile(
    r"hydra\._internal\.core_plugins\.\w+\.[A-Z]\w*|hydra_plugins\.\w+\.\w+\.[A-Z]\w*|optuna\.samplers\.[A-Z]\w*"
    r"|lifealign\.sweep\.Beginning"
)
"""What Hydra's own presets, and ours, have Hydra call."""

LOGGING = ("hydra_logging", "job_logging")
"""Sections that Python's ``logging.config`` takes, which calls what stands under ``class`` and ``()``."""

LOGGERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


@contextmanager
def calls_refused() -> Iterator[None]:
    """Inside, Hydra hands out no configuration that would have it import or call what is not its own.

    Raises:
        UserError: in place of such a configuration.
    """
    usual = ConfigLoaderImpl.load_configuration

    def checked(self: ConfigLoaderImpl, *arguments: Any, **options: Any) -> DictConfig:
        try:
            composed = usual(self, *arguments, **options)
        except (HydraException, OmegaConfBaseException, YAMLError):  # which say where
            raise
        except Exception as error:  # of a file that holds anything: the libraries raise a dozen classes
            raise UserError(f"the presets cannot be composed ({library_line(error)}); check those of your own") from error
        refuse_calls(composed)
        return composed

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = usual  # type: ignore[method-assign]


def refuse_packages(arguments: Sequence[str]) -> None:
    """Raises UserError where presets are looked for in a Python package, which Hydra would import to find them."""
    for argument in arguments:
        if "pkg://" in argument:
            raise UserError(f"{argument}: presets are not looked for in packages; give their folder with --config-dir DIR")


def refuse_calls(composed: DictConfig) -> None:
    """Raises UserError naming the first key whose value Hydra, or Python's logging, would import and call."""
    plain = OmegaConf.to_container(composed, resolve=False)
    for path, value in _leaves(plain, ()):
        in_hydra, key = path[0] == "hydra", path[-1]
        of_hydra = in_hydra and isinstance(value, str) and HYDRAS_OWN.fullmatch(value)
        if TARGET in path and not (of_hydra and path.count(TARGET) == 1):
            raise UserError(f"{'.'.join(path)}={value}: no value is called; components are chosen by name, as in objective=dpo")
        if in_hydra and len(path) > 1 and path[1] in LOGGING and not _harmless(key, value):
            raise UserError(f"{'.'.join(path)}={value}: logs go by {', '.join(LOGGERS)} alone")


def _harmless(key: str, value: Any) -> bool:
    """Whether a value in a section of logging calls nothing but the usual."""
    if key in ("class", "()"):
        return value in LOGGERS
    if not isinstance(value, str):
        return True
    # An interpolation could bring in a whole section from elsewhere; Hydra's own presets have one in a file's name alone.
    return value in STREAMS or ("://" not in value and ("${" not in value or key == "filename"))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no mapping or list, under the keys that lead to it; empty ones too, which may be a ``_target_``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for key, inner in items:
        yield from _leaves(inner, (*path, str(key)))
