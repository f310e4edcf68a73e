"""Committed pages of studies are what the committed cells say: each is made again from them."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from support import REPOSITORY

from lifealign.study.command import study

RESULTS = REPOSITORY / "docs" / "results"


def command(page: Path) -> list[str]:
    """The words behind ``python launch/study.py`` on a page."""
    block = page.read_text(encoding="utf-8").partition("```sh\n")[2].partition("\n```")[0]
    words = shlex.split(block)
    assert words[:2] == ["python", "launch/study.py"]
    return words[2:]


def named(words: list[str], key: str) -> Path:
    """The folder that these words give to a key."""
    (value,) = (word.partition("=")[2] for word in words if word.startswith(f"{key}="))
    return Path(value)


PAGES = sorted(kept.with_name("study.md") for kept in RESULTS.glob("*/tasks.json"))  # older pages have no cells

SOONER = ("main_bundled", "main_real", "ablation_real")
"""The pages that `make test` makes again; the figures of all take two minutes."""


def test_there_are_such_pages() -> None:
    assert {RESULTS / name / "study.md" for name in SOONER} <= {*PAGES}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.parent.name, marks=() if p.parent.name in SOONER else pytest.mark.slow) for p in PAGES],
)
def test_a_page_is_what_its_cells_say(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(page)
    folder, cells = named(words, "study.dir"), named(words, "study.runs")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RESULTS / cells.name, cells)
    folder.mkdir(parents=True)
    shutil.copy(page.parent / "tasks.json", folder)  # made of rows, which are not here
    assert study([*words, "study.report_only=true"], REPOSITORY / "launch" / "train.py") == 0
    assert (folder / "study.md").read_text().replace(" study.report_only=true", "") == page.read_text()
    assert (folder / "results.csv").read_text() == (page.parent / "results.csv").read_text()
