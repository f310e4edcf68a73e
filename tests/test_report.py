"""The report: which files, nothing from outside, nothing hostile, readable pictures."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifealign.evaluation.figures import draw_forgetting, draw_heatmap, draw_layers, draw_singular_values, score_array
from lifealign.evaluation.heat import score_scale, shaded, share_scale
from lifealign.evaluation.report import write_report
from lifealign.evaluation.samples import Change, read_changes, word_diff
from lifealign.evaluation.scores import ScoreBook, metric_info
from lifealign.runtime.files import write_json_lines

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
        "data": [{"task": "hc3", "about": "questions of all kinds", "sha256": 8 * "0123abcd"}],
        "config_yaml": "seed: 1\n",
        "timing": {"train": 3725.0, "evaluate": 1.25},
        "changes": [Change("truthfulqa", "hc3", "Why?", "Because it is.", "Because it was so.", "Since.", changed=3, of=4)],
        "consolidation": [{"task": "hc3", "kept": 0.91234567}, {"task": "truthfulqa", "overlap": 0.25}],
        "versions": {"torch": "2.13"},
    }
    write_report(folder, book, **{**arguments, **changes})
    return (folder / "index.html").read_text(encoding="utf-8")


def entry(name: str, task: str, shares: tuple[float, float], consolidated: bool = True) -> dict[str, Any]:
    """An entry of a ledger over layers 9 and 10, given in the order of their names; layer 10's share of conflict second."""
    factors = [
        {
            "factor": f"base_model.model.layers.{layer}.q_proj.lora_{factor}.default.weight",
            "update_norm": 1.0,
            "refined_norm": 0.5,
            "kept_rank": rank,
            "kept_energy": 0.9,
            "history_share": share,
            "singular_values": [2.0, 1.0, 0.0],
        }
        for layer, share in ((10, shares[1]), (9, shares[0]))
        for factor, rank in (("A", 1), ("B", 2))
    ]
    return {"name": name, "task": task, "stage": "sft", "consolidated": consolidated, "factors": factors}


MEMORY = [
    entry("000_hc3_sft", "hc3", (0.0, 0.0)),
    entry("001_truthfulqa_sft", "truthfulqa", (0.25, 0.75)),
    entry("002_truthfulqa_preference", "truthfulqa", (0.5, 0.5), consolidated=False),
]


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
    assert "1 hc3 30.00 2 truthfulqa 29.50 30.00" in text  # the heat map
    for expected in ("questions of all kinds", 8 * "0123abcd", "1:02:05", "1.2 s", "0.9123", "0.25", "torch 2.13", "3 of 4"):
        assert expected in text
    for name in pictures:
        width, height = struct.unpack(">II", (tmp_path / "report" / name).read_bytes()[16:24])
        assert 200 < width < 1600 and 150 < height < 1200


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = write(tmp_path, small_book())
    assert "://" not in page and "<script" not in page and "@import" not in page and "url(" not in page
    for tag, attributes in Tags(page).found:
        assert tag not in {"script", "iframe", "object", "base"}
        assert attributes.get("href") in (None, "data:,")  # no icon: a browser would ask for one
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert re.search(r'<meta name="viewport" content="width=device-width', page)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    tags = Tags(
        write(
            tmp_path,
            small_book(("<script>", "$\\frac{_<b>$")),
            data=[{HOSTILE: HOSTILE}],
            config_yaml=HOSTILE,
            timing={HOSTILE: 1.0},
            changes=[Change(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE), Change("", "", "", "", HOSTILE, "")],
            consolidation=[{HOSTILE: HOSTILE}],
            versions={HOSTILE: HOSTILE},
        )
    )
    assert not {"script", "b"} & {tag for tag, _ in tags.found}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert sum(tag == "img" for tag, _ in tags.found) == 2
    assert tags.text.count("<script>alert(1)</script>") == tags.text.count("{{ 7 * 7 }}") == 15


def test_a_run_without_scores_has_a_page(tmp_path: Path) -> None:
    page = write(tmp_path, ScoreBook(["hc3"]), changes=[], consolidation=[], timing={}, versions={})
    assert "No scores were recorded." in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    first = write(tmp_path, small_book())
    assert write(tmp_path, small_book()) == first
    assert "Second." in write(tmp_path, small_book(), changes=[Change("hc3", "hc3", "", None, "Second.", "")])


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
        colours, norm = score_scale(np.array([values]), metric_info(metric))
        return [sum(colours(norm(value))[:3]) for value in values]

    low, high = brightness("rouge_l", [10.0, 20.0])
    assert high < low
    low, high = brightness("chosen_nll", [2.0, 3.0])
    assert low < high
    _, norm = score_scale(np.array([[-1.0, 3.0]]), metric_info("reward_margin"))
    assert norm(0.0) == 0.5
    assert np.isnan(score_array(small_book(), "rouge_l")[0, 1])


def test_a_cell_has_its_colour_and_a_gap_has_none() -> None:
    (known, gap), (full, _) = shaded(np.array([[0.0, np.nan], [1.0, 0.5]]), share_scale())
    assert (known.text, known.dark, full.text, full.dark) == ("0.00", False, "1.00", True)
    assert re.fullmatch("#[0-9a-f]{6}", known.colour) and known.colour != full.colour
    assert (gap.text, gap.colour) == ("", "")


# Memory


def test_memory_by_layer_and_stage(tmp_path: Path) -> None:
    """Layer 9 before 10, ranks as means over factors, shares of energy; what was not consolidated is passed over."""
    page = write(tmp_path, small_book(), memory=MEMORY)
    text = " ".join(Tags(page).text.split())
    assert "layer hc3 sft truthfulqa sft layers.9.q_proj 1.5 1.5 layers.10.q_proj 1.5 1.5" in text
    assert "layers.9.q_proj 0.00 0.25 layers.10.q_proj 0.00 0.75" in text
    names = {path.name for path in tmp_path.glob("memory_*.png")}
    values = {f"memory_values_{name}.png" for name in ("000_hc3_sft", "001_truthfulqa_sft")}
    assert names == values | {"memory_kept_rank.png", "memory_conflict_share.png"}
    assert page.count("<img") == 2 + 2  # two metrics' curves, two spectra


def test_spectra_tell_what_was_kept_from_what_was_cut() -> None:
    lines = draw_singular_values(MEMORY[0]["factors"][:1], "hc3 sft").axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[2.0, 1.0, 0.0], [2.0], [1.0, 0.0]]
    assert [line.get_fillstyle() for line in lines[1:]] == ["full", "none"]


def test_layers_have_a_number_each() -> None:
    cells = np.array([[0.25, np.nan], [0.5, 1.0]])
    axes = draw_layers(cells, ["layers.9", "layers.10"], ["hc3 sft", "hc3 preference"], title="Share", share=True).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.50", "1.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.9", "layers.10"]


# Answers before and after


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("The cat sat.", "The dog sat.", ["cat"], ["dog"]),
        ("one two", "one two", [], []),
        ("", "all new", [], ["all new"]),
        ("all gone", "", ["all gone"], []),
        ("a, b", "a; b", [","], [";"]),
    ],
)
def test_word_diff(before: str, after: str, gone: list[str], new: list[str]) -> None:
    left, right = word_diff(before, after)
    assert ["".join(text for text, _ in side) for side in (left, right)] == [before, after]
    assert [[text for text, marked in side if marked] for side in (left, right)] == [gone, new]


def test_words_that_changed_are_marked_and_stay_text(tmp_path: Path) -> None:
    page = write(tmp_path, small_book(), changes=[Change("t", "t", "?", "a <b> c", "a <i> c", "")])
    assert "<dd>a &lt;<del>b</del>&gt; c</dd>" in page
    assert "<dd>a &lt;<ins>i</ins>&gt; c</dd>" in page


def left_by(folder: Path, name: str, *rows: tuple[str, str, str]) -> None:
    texts = {"prompt": "?", "chosen": "!"}
    write_json_lines(
        folder / name / "predictions.jsonl",
        [{"task": task, "id": number, **texts, "prediction": answer} for task, number, answer in rows],
    )


def test_the_first_prompt_whose_answer_changed_is_shown(tmp_path: Path) -> None:
    left_by(tmp_path, "01_hc3", ("hc3", "a", "same"), ("hc3", "b", "old"), ("hc3", "c", "old too"))
    left_by(
        tmp_path, "02_safe_rlhf", ("hc3", "a", "same"), ("hc3", "b", "new"), ("hc3", "c", "new too"), ("safe_rlhf", "d", "x")
    )
    first, second, own = read_changes(tmp_path)
    assert (first.trained, first.before, first.after, first.of) == ("hc3", None, "same", 0)
    assert (second.trained, second.task, second.before, second.after) == ("safe_rlhf", "hc3", "old", "new")
    assert (second.changed, second.of) == (2, 3)
    assert (own.task, own.before, own.marked()) == ("safe_rlhf", None, ([], [("x", False)]))


def test_answers_that_were_not_generated_are_not_shown(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "01_hc3" / "predictions.jsonl", [{"task": "hc3", "id": "a", "prompt": "?", "chosen": "!"}])
    assert read_changes(tmp_path) == [] == read_changes(tmp_path / "missing")
