"""The score matrix: figures worked out by hand, the book, its JSON and the closing table."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from lifealign.evaluation.scores import METRICS, ScoreBook, closing_table, continual_metrics, metric_info

MATRIX = [[50.0, None, None], [40.0, 61.0, None], [47.0, 55.0, 72.0]]


def filled_book(rows: int = 3) -> ScoreBook:
    book = ScoreBook(["a", "b", "c"])
    for after in range(rows):
        for on in range(after + 1):
            book.record("rouge_l", after, on, MATRIX[after][on])
    return book


def test_figures_of_three_tasks() -> None:
    """Last = (47 + 55 + 72)/3 = 174/3 = 58. BWT = ((47 − 50) + (55 − 61))/2 = −9/2 = −4.5.

    AP = (50 + (40 + 61)/2 + 58)/3 = (50 + 50.5 + 58)/3 = 158.5/3.
    """
    figures = continual_metrics(MATRIX)
    assert figures["last"] == pytest.approx(58.0, abs=1e-10)
    assert figures["bwt"] == pytest.approx(-4.5, abs=1e-10)
    assert figures["ap"] == pytest.approx(158.5 / 3, abs=1e-10)
    assert list(figures) == ["last", "bwt", "ap"]


@pytest.mark.parametrize("filler", [None, math.nan, math.inf, 1e9])
def test_forward_entries_are_ignored(filler: float | None) -> None:
    full = [[value if j <= i else filler for j, value in enumerate(row)] for i, row in enumerate(MATRIX)]
    triangle = [row[: i + 1] for i, row in enumerate(MATRIX)]
    assert continual_metrics(full) == continual_metrics(triangle) == continual_metrics(MATRIX)


def test_one_task_has_no_backward_transfer() -> None:
    assert continual_metrics([[3.25]]) == {"last": 3.25, "bwt": None, "ap": 3.25}


@pytest.mark.parametrize(
    ("matrix", "place"),
    [
        ([], "no rows"),
        ([[1.0], [2.0]], r"matrix\[1\] has 1 entries"),
        ([[1.0, 2.0], [2.0, 3.0], [1.0, 2.0, 3.0]], r"matrix\[0\] has 2 entries"),
        ([[1.0], [None, 2.0]], r"matrix\[1\]\[0\] is None"),
        ([[1.0], [1.0, math.nan]], r"matrix\[1\]\[1\] is nan"),
        ([[math.inf]], r"matrix\[0\]\[0\] is inf"),
    ],
)
def test_a_bad_matrix_is_named(matrix: list[list[float | None]], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        continual_metrics(matrix)


def test_json_has_the_agreed_form_and_comes_back() -> None:
    written = filled_book().to_json("lifealign", "fpo", 7)
    assert written == {
        "tasks": ["a", "b", "c"],
        "metrics": {"rouge_l": {"matrix": MATRIX, "last": 58.0, "bwt": -4.5, "ap": pytest.approx(158.5 / 3)}},
        "strategy": "lifealign",
        "objective": "fpo",
        "seed": 7,
    }
    read = ScoreBook.from_json(json.loads(json.dumps(written, allow_nan=False)))
    assert read.to_json("lifealign", "fpo", 7) == written
    assert read.matrix("rouge_l") == MATRIX


def test_an_unfinished_run_gives_the_figures_so_far() -> None:
    """After two of three tasks: Last = (40 + 61)/2 = 50.5, BWT = 40 − 50 = −10, AP = (50 + 50.5)/2 = 50.25."""
    book = filled_book(rows=2)
    assert book.matrix("rouge_l") == MATRIX[:2]
    assert book.figures("rouge_l") == {"last": 50.5, "bwt": -10.0, "ap": 50.25}


def test_joint_training_has_a_last_row_only() -> None:
    book = ScoreBook(["a", "b"])
    book.record("rouge_l", 1, 0, 10.0)
    assert book.figures("rouge_l") == {"last": None, "bwt": None, "ap": None}
    book.record("rouge_l", 1, 1, 30.0)
    assert book.figures("rouge_l") == {"last": 20.0, "bwt": None, "ap": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_json_never_holds_nan(value: float | None) -> None:
    book = filled_book()
    book.record("rouge_l", 1, 0, value)
    entry = json.loads(json.dumps(book.to_json("er", "dpo", 0), allow_nan=False))["metrics"]["rouge_l"]
    assert entry["matrix"][1] == [None, 61.0, None]
    assert (entry["last"], entry["bwt"], entry["ap"]) == (58.0, None, None)
    assert ScoreBook.from_json(book.to_json("er", "dpo", 0)).matrix("rouge_l") == book.matrix("rouge_l")


def test_recording_outside_the_sequence_fails() -> None:
    book = ScoreBook(["a"])
    for metric, after, on in (("rouge_l", 1, 0), ("rouge_l", 0, -1), ("../rouge", 0, 0)):
        with pytest.raises(ValueError):
            book.record(metric, after, on, 1.0)
    assert book.metrics == []


def test_damaged_json_is_named() -> None:
    with pytest.raises(ValueError, match="'metrics'"):
        ScoreBook.from_json({"tasks": ["a"]})
    with pytest.raises(ValueError, match="rouge_l row 0 has 2 entries for 1 tasks"):
        ScoreBook.from_json({"tasks": ["a"], "metrics": {"rouge_l": {"matrix": [[1.0, 2.0]]}}})


def test_closing_table_reads_without_colour() -> None:
    book = ScoreBook(["a", "b"])
    book.record("preference_accuracy", 0, 0, 62.5)
    book.record("chosen_nll", 0, 0, 2.345678)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(closing_table(book))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("the first 1 of 2 tasks" in line for line in lines)
    assert ["Preference", "accuracy", "(%)", "62.50", "–", "62.50"] in [line.split() for line in lines]
    assert ["Chosen", "NLL", "(nats/token)", "↓", "2.35", "–", "2.35"] in [line.split() for line in lines]


def test_only_the_nll_is_better_when_lower() -> None:
    assert [name for name, info in METRICS.items() if not info.higher_is_better] == ["chosen_nll"]
    assert metric_info("of_a_plugin").title == "of_a_plugin"
