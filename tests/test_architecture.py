"""The layers of docs/architecture.md hold: no upward import, no circle, a preset for every component, small launchers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from support import REPOSITORY, compose_config

from lifealign.command import conf_dir
from lifealign.config import COMPONENTS, Config, build
from lifealign.registry import component

LAYERS: list[tuple[str, ...]] = [
    ("launch",),
    (
        "command",
        "run",
        "study",
        "rescore",
        "validate",
        "export",
        "comparison",
        "sweep",
        "composition",
        "cache_command",
        "memory_command",
        "supervise",
    ),
    ("pretrain",),
    ("lifelong",),
    ("assembly", "resuming"),
    ("config",),
    ("trainer",),
    ("strategies",),
    ("stages",),
    ("evaluation",),
    ("objectives",),
    ("memory",),
    ("models",),  # above data: a model is called with the batches that data lays out
    ("data",),
    ("runtime",),
    ("registry", "arguments", "errors", "environment", "assets", "conf"),
    ("kernels",),
]
"""Top to bottom. A module may import from its own layer and from those below it."""


@cache
def sources() -> dict[str, Path]:
    """Every module of the project by the name under which it is imported; launchers as ``launch.NAME``."""
    roots = {"lifealign": "lifealign", "lifealign.conf": "conf", "lifealign.kernels": "kernels", "launch": "launch"}
    found = {}
    for package, folder in roots.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            inner = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join([package, *(part for part in inner if part != "__init__")])] = path
    return found


def imported(module: str) -> Iterator[tuple[str, int]]:
    """Modules that a module names in its import statements, those inside functions too, with the line."""
    path = sources()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            inner = {f"{base}.{alias.name}" for alias in node.names} & sources().keys()
            yield from ((name, node.lineno) for name in (inner or {base}))


def layer(module: str) -> int:
    name = module.split(".")[0 if module.startswith("launch") else 1]
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} belongs to no layer; add its name to LAYERS"
    return found[0]


def own(module: str) -> bool:
    return module.split(".")[0] in ("lifealign", "launch", "kernels", "conf", "tests")


MODULES = sorted(name for name in sources() if name != "lifealign")


def test_the_walk_sees_the_project() -> None:
    """A test of imports that reads no files, or no imports, would pass for ever."""
    assert {"lifealign.lifelong", "lifealign.kernels.logratio.reference", "launch.train"} <= set(MODULES)
    assert "lifealign.runtime.distributed" in dict(imported("lifealign.lifelong"))  # from PACKAGE import MODULE
    assert "lifealign.kernels.logratio" in dict(imported("lifealign.kernels"))  # relative
    assert "wandb" in dict(imported("lifealign.runtime.wandb_sink"))  # inside a function


def test_no_module_imports_from_a_layer_above() -> None:
    upward = [
        f"{module}, line {line}: {name}"
        for module in MODULES
        for name, line in imported(module)
        if own(name) and layer(name) < layer(module)
    ]
    assert not upward


def test_kernels_import_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for module in MODULES:
        if module.startswith("lifealign.kernels"):
            names = {name for name, _ in imported(module) if not name.startswith("lifealign.kernels")}
            assert {name.split(".")[0] for name in names} <= allowed, module


def test_no_import_goes_in_a_circle() -> None:
    below = {module: {name for name, _ in imported(module) if name in sources()} for module in sources()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in below[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in below:
        visit(module, ())


@pytest.mark.parametrize("group", COMPONENTS)
def test_every_component_has_a_preset_of_its_name_and_every_preset_a_component(group: str) -> None:
    registered = {name.removesuffix(".yaml") for name in ConfigStore.instance().repo["schema"][group]}
    presets = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
    # NAME_released: the component NAME with the settings of the paper's released code.
    assert registered == {name.removesuffix("_released") for name in presets}
    for name in presets:
        chosen = build(compose_config("+sequence=six_domains", f"{group}={name}"))
        assert type(getattr(chosen, group)) is component(group, name.removesuffix("_released"))


@pytest.mark.parametrize(
    "preset",
    sorted(
        f"{path.parent.name}={path.stem}"
        for path in conf_dir().glob("*/*.yaml")
        if path.parent.name not in (*COMPONENTS, "sequence", "study")
    ),
)
def test_every_preset_composes_and_is_accepted(preset: str) -> None:
    base = ["model.path=x"] if preset in ("model=custom", "experiment=small_base") else []  # which leave it to the user
    config = build(compose_config("+sequence=six_domains", preset, *base))
    assert isinstance(config, Config)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_a_launcher_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
