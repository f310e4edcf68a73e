"""Components chosen by name: one decorator turns a dataclass into a Hydra option that is checked at composition.

``@register("strategy", "er")`` on a dataclass stores its fields as the schema of ``schema/strategy/er``; the preset
``conf/strategy/er.yaml`` names that schema in its defaults list. The composed node becomes an instance of the class
itself, so a component's options and its behaviour stand in one place.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

Component = TypeVar("Component", bound=type)


def register(group: str, name: str) -> Callable[[Component], Component]:
    """Class decorator: makes the class a dataclass and its fields the schema of ``group=name``."""

    def wrap(cls: Component) -> Component:
        cls.__annotations__ = {**inspect.get_annotations(cls), "name": "str"}
        cls.name = name  # a field like the others, so that a resolved configuration says which component it is for
        cls = dataclass(cls)
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=cls)
        return cls

    return wrap


def component(group: str, name: str) -> type:
    """The class registered under a name. Raises KeyError where there is none."""
    entry = ConfigStore.instance().repo["schema"][group][f"{name}.yaml"]
    return OmegaConf.get_type(entry.node)


def import_components(package: ModuleType) -> None:
    """Import every module of a package, so that each registers what it holds; a new file needs no edit elsewhere."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
