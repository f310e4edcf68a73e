"""The report: which files, nothing from outside, nothing hostile, readable pictures."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifealign.evaluation.figures import _array, _colours, draw_forgetting, draw_heatmap
from lifealign.evaluation.report import Sample, write_report
from lifealign.evaluation.scores import ScoreBook, metric_info

HOSTILE = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)> & \"'{{ 7 * 7 }} \ud800"


def small_book(tasks: tuple[str, ...] = ("hc3", "truthfulqa")) -> ScoreBook:
    book = ScoreBook(list(tasks))
    for metric, shift in (("rouge_l", 30.0), ("chosen_nll", 3.0)):
        for after in range(len(tasks)):
            for on in range(after + 1):
                book.record(metric, after, on, shift - 0.5 * (after - on))
    return book


def write(folder: Path, book: ScoreBook, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "domains": {"hc3": "questions of all kinds"},
        "config_yaml": "seed: 1\n",
        "timing": {"train": 3725.0, "evaluate": 1.25},
        "samples": [Sample("hc3", "truthfulqa", "Why?", "Because.", "Since.")],
        "consolidation": [{"task": "hc3", "kept": 0.91234567}, {"task": "truthfulqa", "overlap": 0.25}],
        "versions": {"torch": "2.13"},
    }
    write_report(folder, book, **{**arguments, **changes})
    return (folder / "index.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Start tags with their attributes, and the text, a blank between its pieces, with the entities resolved."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_files_and_content(tmp_path: Path) -> None:
    page = write(tmp_path / "report", small_book())
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {f"{kind}_{metric}.png" for kind in ("heatmap", "forgetting") for metric in ("rouge_l", "chosen_nll")}
    assert names == pictures | {"index.html"}  # and no temporary file
    text = " ".join(Tags(page).text.split())
    assert "Over all 2 tasks." in text
    assert "ROUGE-L (0–100) 29.75 -0.50 29.88" in text
    for expected in ("questions of all kinds", "1:02:05", "1.2 s", "0.9123", "0.25", "torch 2.13", "Because."):
        assert expected in text
    for name in pictures:
        width, height = struct.unpack(">II", (tmp_path / "report" / name).read_bytes()[16:24])
        assert 200 < width < 1600 and 150 < height < 1200


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = write(tmp_path, small_book())
    assert "://" not in page and "<script" not in page and "@import" not in page and "url(" not in page
    for tag, attributes in Tags(page).found:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert "href" not in attributes
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert re.search(r'<meta name="viewport" content="width=device-width', page)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    tags = Tags(
        write(
            tmp_path,
            small_book(("<script>", "$\\frac{_<b>$")),
            domains={"<script>": HOSTILE},
            config_yaml=HOSTILE,
            timing={HOSTILE: 1.0},
            samples=[Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
            consolidation=[{HOSTILE: HOSTILE}],
            versions={HOSTILE: HOSTILE},
        )
    )
    assert not {"script", "b"} & {tag for tag, _ in tags.found}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert sum(tag == "img" for tag, _ in tags.found) == 4
    assert tags.text.count("<script>alert(1)</script>") == tags.text.count("{{ 7 * 7 }}") == 12


def test_a_run_without_scores_has_a_page(tmp_path: Path) -> None:
    page = write(tmp_path, ScoreBook(["hc3"]), samples=[], consolidation=[], timing={}, versions={})
    assert "No scores were recorded." in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    first = write(tmp_path, small_book())
    assert write(tmp_path, small_book()) == first
    assert "Second." in write(tmp_path, small_book(), samples=[Sample("hc3", "hc3", "", "Second.", "")])


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write(tmp_path, small_book())

    def no_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lifealign.runtime.files.os.replace", no_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, small_book(), config_yaml="seed: 2\n")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page
    assert not list(tmp_path.glob(".*"))


def test_heatmap_cells() -> None:
    """One number a known cell (three of a 2 × 2 matrix); small scores get more decimals."""
    book = small_book()
    assert [text.get_text() for text in draw_heatmap(book, "rouge_l").axes[0].texts] == ["30.00", "29.50", "30.00"]
    book.record("reward_margin", 0, 0, 0.00123)
    assert [text.get_text() for text in draw_heatmap(book, "reward_margin").axes[0].texts] == ["0.0012"]


def test_forgetting_curves_start_where_a_task_was_trained() -> None:
    lines = draw_forgetting(small_book(), "rouge_l").axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[0, 1], [1]]
    assert [list(line.get_ydata()) for line in lines] == [[30.0, 29.5], [30.0]]


def test_darker_is_better_and_zero_is_the_middle() -> None:
    def brightness(metric: str, values: list[float]) -> list[float]:
        colours, norm = _colours(np.array([values]), metric_info(metric))
        return [sum(colours(norm(value))[:3]) for value in values]

    low, high = brightness("rouge_l", [10.0, 20.0])
    assert high < low
    low, high = brightness("chosen_nll", [2.0, 3.0])
    assert low < high
    _, norm = _colours(np.array([[-1.0, 3.0]]), metric_info("reward_margin"))
    assert norm(0.0) == 0.5
    assert np.isnan(_array(small_book(), "rouge_l")[0, 1])
