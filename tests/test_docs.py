"""What the documentation says is so: keys, defaults, presets, commands, links and the example all hold."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import support
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from support import REPOSITORY, compose_config

from lifealign.command import all_keys, check_keys, conf_dir, group_names
from lifealign.config import COMPONENTS, build
from lifealign.data.options import Columns, HubSource, SequenceOptions, TaskSource
from lifealign.study.options import MethodOptions, StudyOptions, SweepOptions, TuningOptions

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
PRESETS = sorted(f"{group}={path.stem}" for group in group_names() for path in (conf_dir() / group).glob("*.yaml"))


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Keys


def schema_leaves() -> set[str]:
    """Every key that holds a value, those inside ``sequence`` included, with TASK for a task's name."""
    keys = {key for key in all_keys() if not any(other.startswith(key + ".") for other in all_keys())}
    keys -= {"objective", "strategy", "sequence"}
    keys |= {f"sequence.{f.name}" for f in dataclasses.fields(SequenceOptions)}
    source = "sequence.sources.TASK."
    keys |= {source + f.name for f in dataclasses.fields(TaskSource)}
    keys |= {f"{source}columns.{f.name}" for f in dataclasses.fields(Columns)}
    keys |= {f"{source}hub.{f.name}" for f in dataclasses.fields(HubSource)}
    return keys


def documented() -> list[tuple[list[str], str]]:
    """(keys, default) of every row of a table of keys in configuration.md."""
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| key \| type \| default \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [line.strip().strip("|").split(" | ") for table in tables for line in table.splitlines()]
    assert rows and all(len(row) == 4 for row in rows), [row for row in rows if len(row) != 4]
    return [(re.findall(r"`([^`]+)`", row[0]), row[2].strip()) for row in rows]


def test_every_key_is_documented_once_and_no_other() -> None:
    keys = [key for row, _ in documented() for key in row]
    assert sorted(keys) == sorted(schema_leaves())


def test_every_section_of_the_schema_is_on_the_page() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [key for key in sorted(all_keys()) if key not in text] == []


def first_value(key: str, compositions: list[Any]) -> Any:
    for values in compositions:
        with suppress(KeyError):
            return reduce(getitem, key.split("."), values)
    raise AssertionError(f"no preset has {key}")


def test_defaults_are_those_of_a_run_without_overrides() -> None:
    """Of an option that the default components lack, the default is that of the first preset that has it."""
    presets = [f"{group}={path.stem}" for group in COMPONENTS for path in sorted((conf_dir() / group).glob("*.yaml"))]
    composed = [compose_config("+sequence=six_domains", *overrides) for overrides in ([], *([name] for name in presets))]
    compositions = [OmegaConf.to_container(config, enum_to_str=True) for config in composed]
    wrong = []
    for keys, default in documented():
        if keys[0].startswith("sequence."):  # the chosen sequence gives these
            continue
        written = re.findall(r"`([^`]*)`", default)  # one for all keys of the row, or one for each
        for key, text in zip(keys, written * len(keys) if len(written) == 1 else written, strict=True):
            value = first_value(key, compositions)
            if yaml.safe_load(text) != value:
                wrong.append(f"{key}: the page says {text}, a run gets {value}")
    assert wrong == []


def study_options() -> set[str]:
    """Every option that a study has but its name, which is its file's; of ``tuning`` those inside."""
    keys = {f"study.{f.name}" for f in dataclasses.fields(StudyOptions)} - {"study.name", "study.tuning"}
    return keys | {f"study.tuning.{f.name}" for f in dataclasses.fields(TuningOptions)}


def test_every_option_of_a_study_is_documented_once_and_no_other() -> None:
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| option \| default \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [line.strip("|").split(" | ") for line in table.splitlines()]
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(keys) == sorted(study_options())
    meanings = dict(zip(keys, (row[2] for row in rows for _ in re.findall(r"`[^`]+`", row[0])), strict=True))
    for key, of in (("study.methods", MethodOptions), ("study.sweeps", SweepOptions)):
        assert set(re.findall(r"`([^`]+)`", meanings[key])) == {f.name for f in dataclasses.fields(of)}


# Presets


def test_every_group_and_preset_is_documented() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    groups = text.split("## Groups")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", groups, re.MULTILINE)) == group_names()
    tables = "".join(line for line in groups.splitlines() if line.startswith("|"))
    assert sorted(re.findall(r"`(\w+=\w+)`", tables)) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset: str) -> None:
    overrides = [preset] if preset.startswith("sequence=") else ["+sequence=six_domains", preset]
    if preset in ("model=custom", "experiment=small_base"):
        overrides.append("model.path=bundled")
    composed = compose_config(*overrides)
    check_keys(composed)
    build(composed)


# Commands and links


def commands() -> list[list[str]]:
    """The words of every command line in a shell block."""
    return [shlex.split(line) for page in PAGES for block in fenced(page, "sh") for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_exist(page: Path) -> None:
    scripts = set(re.findall(r"\blaunch/[\w./-]+", page.read_text(encoding="utf-8")))
    assert [script for script in scripts if not (REPOSITORY / script).is_file()] == []


def test_commands_compose() -> None:
    """What stands behind train.py and validate.py are overrides that are accepted; of a sweep, its first job."""
    checked = 0
    for words in commands():
        script = next((word for word in words if word in ("launch/train.py", "launch/validate.py")), None)
        if script is None:
            continue
        overrides = [word for word in words[words.index(script) + 1 :] if "=" in word]
        if "-m" in words:
            overrides = [re.sub(r",.*", "", word) for word in overrides]
        if "strategy=anchor" in overrides:  # the example of strategies.md, which is run below
            continue
        composed = compose_config(*overrides)
        check_keys(composed)
        build(composed)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\(([^()#\s]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    assert re.findall(r"/(?:home|root|work|tmp|Users)/\S*", page.read_text(encoding="utf-8")) == []


# The example of strategies.md


@pytest.fixture
def example(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """The example's files by the path that each names in its first line; what it registers is taken back at the end."""
    page = REPOSITORY / "docs" / "strategies.md"
    files = {}
    for block in [*fenced(page, "python"), *fenced(page, "yaml")]:
        name = block.splitlines()[0].removeprefix("# ")
        files[name] = tmp_path / "example" / name
        files[name].parent.mkdir(parents=True)
        files[name].write_text(block, encoding="utf-8")
    schemas = ConfigStore.instance().repo["schema"]["strategy"]
    before, modules = dict(schemas), set(sys.modules)
    yield files
    schemas.clear()
    schemas.update(before)
    for module in set(sys.modules) - modules:
        if "anchor" in module:
            del sys.modules[module]


def load(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where the schema looks for the names in its annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_works_as_written(example: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(example) == {"lifealign/strategies/anchor.py", "conf/strategy/anchor.yaml", "tests/test_anchor.py"}
    load("lifealign.strategies.anchor", example["lifealign/strategies/anchor.py"])
    conf = example["conf/strategy/anchor.yaml"].parents[1]
    compose = partial(compose_config, f"hydra.searchpath=[file://{conf}]")
    monkeypatch.setattr(support, "compose_config", compose)

    written = compose("+sequence=six_domains", "strategy=anchor").strategy
    assert (written.name, written.strength) == ("anchor", 0.1)
    load("test_anchor", example["tests/test_anchor.py"]).test_the_pull_is_part_of_the_loss(tmp_path)  # type: ignore[attr-defined]
    load_resumed(tmp_path / "run")


def load_resumed(folder: Path) -> None:
    """The example's state goes through a checkpoint: a finished run given again takes it up and trains nothing."""
    before = (folder / "metrics.jsonl").read_text()
    support.train_here(folder, "strategy=anchor", "strategy.strength=0.5")
    assert (folder / "metrics.jsonl").read_text() == before
