"""Runs beside each other: figures worked out by hand on runs written by hand, and the command on runs that were trained."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import yaml
from support import REPOSITORY, command, train_here
from test_report import Tags

from lifealign.comparison.command import main, write_comparison
from lifealign.comparison.figures import draw_scores, sensitivity
from lifealign.comparison.ranking import Comparison
from lifealign.comparison.runs import read_runs
from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook
from lifealign.runtime.files import write_json, write_json_lines
from lifealign.study.table import interval_text

# -- runs written by hand ----------------------------------------------------------------------------------------------

TASKS = ("instruct", "hc3")
POOR = [[[1, 1, -1, 1]], [[1, -1, -1, 1], [2, 2]]]
"""Margins of held-out pairs, by task, after each task. Accuracies 75, then 50, 100: Last 75, BWT -25, AP (75 + 75)/2 = 75."""
GOOD = [[[1, 1, 1, 1]], [[1, 1, 1, 1], [2, 2]]]
"""All right: 100, 0 and 100."""
FAIR = [[[1, 1, 1, 1]], [[1, 1, -1, 1], [2, 2]]]
"""100, then 75 and 100: Last 87.5, BWT -25, AP (100 + 87.5)/2 = 93.75."""


def write_run(
    folder: Path,
    margins: Sequence[Sequence[Sequence[float]]],
    *,
    nll: float = 2.0,
    tasks: Sequence[str] = TASKS,
    rows: str = "row",
    **settings: Any,
) -> Path:
    """What train.py leaves that a comparison reads; ``nll`` is the Last of the chosen NLL."""
    book = ScoreBook(list(tasks))
    for after, scored in enumerate(margins):
        lines = []
        for on, of_task in enumerate(scored):
            book.record("preference_accuracy", after, on, 100 * float(np.mean(np.array(of_task) > 0)))
            book.record("chosen_nll", after, on, nll)
            same = {"task": tasks[on], "prompt": rows, "chosen": "a", "rejected": "b"}
            lines += [{**same, "id": f"{tasks[on]}/{n}", "margin": margin} for n, margin in enumerate(of_task)]
        write_json_lines(folder / "tasks" / f"{after + 1:02d}_{tasks[after]}" / "predictions.jsonl", lines)
    write_json(folder / "scores.json", book.to_json("lifealign", "fpo", 0))
    known = {"seed": 0, "run": {"name": folder.name}, "sequence": {"name": "six_domains", "tasks": list(tasks)}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**known, **settings}), encoding="utf-8")
    return folder


def threshold(value: float) -> dict[str, Any]:
    return {"objective": {"name": "fpo", "confidence_threshold": value}}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three runs that differ in the confidence threshold alone; the good one has the worst likelihood."""
    return [
        write_run(tmp_path / "poor", POOR, nll=1.0, **threshold(0.95)),
        write_run(tmp_path / "good", GOOD, nll=3.0, **threshold(0.6)),
        write_run(tmp_path / "fair", FAIR, nll=2.0, **threshold(0.8)),
    ]


def compared(folders: Sequence[Path], **options: Any) -> Comparison:
    runs, left_out = read_runs(folders)
    return Comparison(runs, left_out, **options)


def text_of(page: Path) -> str:
    return " ".join(Tags(page.read_text(encoding="utf-8")).text.split())


def test_runs_rank_by_the_first_metric_and_each_metric_has_its_direction(three: list[Path]) -> None:
    comparison = compared(three)
    assert [run.name for run in comparison.ranked] == ["good", "fair", "poor"]
    assert comparison.places("preference_accuracy", "last") == {"good": 1, "fair": 2}
    assert comparison.places("preference_accuracy", "bwt") == {"good": 1, "fair": 2, "poor": 2}  # 0, -25, -25
    assert comparison.places("chosen_nll", "last") == {"poor": 1, "fair": 2}
    assert [comparison.figure(comparison.first, "preference_accuracy", f) for f in ("last", "bwt", "ap")] == [100, 0, 100]


def test_bounds_come_last_and_are_not_the_best(tmp_path: Path) -> None:
    bound = write_run(tmp_path / "bound", GOOD, strategy={"name": "stl"})
    other = write_run(tmp_path / "other", POOR, strategy={"name": "er"})
    found = Comparison(read_runs([bound, other])[0])
    assert [run.name for run in found.ranked] == ["other", "bound"] and found.first.name == "other"
    assert found.places("preference_accuracy", "last") == {"other": 1}


def test_among_equal_runs_the_next_metric_decides(tmp_path: Path) -> None:
    worse, better = write_run(tmp_path / "a", GOOD, nll=3.0), write_run(tmp_path / "b", GOOD, nll=2.0)
    assert [run.name for run in compared([worse, better]).ranked] == ["b", "a"]


def test_differences_are_paired_and_their_intervals_are_of_the_pairs(three: list[Path]) -> None:
    """Poor minus good, Last: of `instruct` two pairs of four fell from 100 to 0, which the mean over two tasks halves, and of
    `hc3` none. A draw of four pairs takes k of those two with probability Binomial(4, 1/2): -12.5 k, and 0 and 4 have 1/16
    each, more than the 1/40 that lies outside on either side.

    BWT: of one earlier task. Its pairs: 0, -100, 0, 0 (the third was wrong at first as well), in the mean -25. None of
    four draws hits it with probability 0.316, all with 1/256, three or more with 13/256: from -75 to 0."""
    comparison = compared(three)
    good, fair, poor = comparison.ranked
    assert comparison.difference(poor, "preference_accuracy", "last") == (-25.0, -50.0, 0.0, 1)
    assert comparison.difference(poor, "preference_accuracy", "bwt") == (-25.0, -75.0, 0.0, 1)
    assert comparison.difference(poor, "chosen_nll", "last") == (-2.0, None, None, 1)
    last = comparison.difference(fair, "preference_accuracy", "last")
    assert last is not None and last.mean == -12.5
    assert comparison.difference(good, "preference_accuracy", "last") == (0.0, 0.0, 0.0, 1)
    assert interval_text(comparison.difference(poor, "preference_accuracy", "last"), 2) == "-25.00 [-50.00, 0.00]"


def test_a_difference_that_excludes_zero_is_marked(tmp_path: Path) -> None:
    """Every pair of `instruct` is lost: each draw gives -50."""
    none = [[[1, 1, 1, 1]], [[-1, -1, -1, -1], [2, 2]]]
    comparison = compared([write_run(tmp_path / "a", GOOD), write_run(tmp_path / "b", none)])
    interval = comparison.difference(comparison.ranked[1], "preference_accuracy", "last")
    assert interval_text(interval, 2) == "-50.00 [-50.00, -50.00] †"


def test_differences_are_taken_to_the_run_that_is_named(three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    to = three[0].parent / "to"
    assert main([*map(str, three), "--to", str(to), "--against", "poor"]) == 0
    text = text_of(to / "index.html")
    assert "Difference to confidence_threshold=0.95" in text
    assert "confidence_threshold=0.6 25.00 [0.00, 50.00] 25.00 [0.00, 75.00]" in text
    assert main([*map(str, three), "--to", str(to), "--against", str(three[1])]) == 0
    assert "Difference to confidence_threshold=0.6" in text_of(to / "index.html")
    capsys.readouterr()
    assert main([*map(str, three), "--against", "por"]) == 2
    assert capsys.readouterr().err == "error: --against por: there is no such run with scores; did you mean 'poor'?\n"


def test_the_table_is_tidy(three: list[Path]) -> None:
    to = three[0].parent / "to"
    write_comparison(three, to)
    with open(to / "comparison.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "objective.confidence_threshold", "metric", "figure", "value"]
    assert len(rows) == 3 * 2 * 5  # runs, metrics; last, bwt, ap and last of both tasks
    (poor,) = (r for r in rows if (r["run"], r["metric"], r["figure"]) == ("poor", "preference_accuracy", "last:instruct"))
    assert (float(poor["objective.confidence_threshold"]), float(poor["value"])) == (0.95, 50.0)


def test_the_page_and_its_markdown_hold_the_same_figures(three: list[Path]) -> None:
    to = three[0].parent / "to"
    write_comparison(three, to)
    text, words = text_of(to / "index.html"), (to / "comparison.md").read_text(encoding="utf-8")
    for label, figures in {
        "confidence_threshold=0.6": ("100.00", "0.00", "100.00"),
        "confidence_threshold=0.8": ("87.50", "-25.00", "93.75"),
        "confidence_threshold=0.95": ("75.00", "-25.00", "75.00"),
    }.items():
        assert f"{label} {' '.join(figures)}" in text
    assert r"| confidence\_threshold=0.6 | **100.00** | **0.00** | **100.00** |" in words
    assert r"| confidence\_threshold=0.8 | *87.50* | *-25.00* | *93.75* |" in words
    assert r"| confidence\_threshold=0.95 | 75.00 | *-25.00* | 75.00 |" in words
    assert r"| confidence\_threshold=0.95 | **1.0000** |" in words  # the likelihood, of which less is better
    assert "objective.confidence_threshold 0.6 0.8 0.95" in text
    pictures = {
        f"{kind}_{metric}.png" for kind in ("scores", "sensitivity") for metric in ("preference_accuracy", "chosen_nll")
    }
    assert {path.name for path in to.iterdir()} == {*pictures, "comparison.csv", "comparison.md", "index.html"}
    assert set(re.findall(r"\]\((\S+\.png)\)", words)) == pictures


def test_sensitivity_is_over_the_one_number_that_differs(three: list[Path]) -> None:
    comparison = compared(three)
    assert comparison.swept == "objective.confidence_threshold"
    assert sensitivity(comparison, "preference_accuracy") == [(0.6, 100.0), (0.8, 87.5), (0.95, 75.0)]
    (last, _) = draw_scores(comparison, "preference_accuracy").axes
    assert [bar.get_width() for bar in last.patches] == [100.0, 87.5, 75.0]


def test_seeds_are_no_setting_to_be_sensitive_to(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"s{n}", margins, seed=n) for n, margins in enumerate((POOR, GOOD))]
    assert compared(seeds).swept is None
    more = write_run(tmp_path / "more", FAIR, seed=1, **threshold(0.8))
    both = compared([write_run(tmp_path / "less", GOOD, seed=0, **threshold(0.6)), more])
    assert both.swept == "objective.confidence_threshold"


@pytest.mark.parametrize(
    "other", [{"objective": {"confidence_threshold": None}}, {"objective": {"beta": 0.1}}, {"data": {"x": 1}}]
)
def test_no_sensitivity_where_other_things_differ(tmp_path: Path, other: dict[str, Any]) -> None:
    """A value that is no number, another key, one key more: each run then goes by all that differs."""
    runs = [write_run(tmp_path / "a", GOOD, **threshold(0.6)), write_run(tmp_path / "b", POOR, **{**threshold(0.8), **other})]
    comparison = compared(runs)
    assert comparison.swept is None
    assert comparison.differing


def test_pictures_of_an_earlier_comparison_do_not_stay(three: list[Path]) -> None:
    to = three[0].parent / "to"
    write_comparison(three, to)
    write_comparison(three[:1], to)
    assert [path.name for path in sorted(to.glob("*.png"))] == ["scores_chosen_nll.png", "scores_preference_accuracy.png"]
    assert "Difference" not in text_of(to / "index.html")


# -- runs that must not be compared ------------------------------------------------------------------------------------


def test_runs_with_other_tasks_or_rows_are_listed_with_the_reason(
    three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    parent = three[0].parent
    tasks = write_run(parent / "tasks", GOOD, tasks=("hc3", "instruct"))
    rows = write_run(parent / "rows", GOOD, rows="another row")
    half = write_run(parent / "half", GOOD[:1])
    assert main([*map(str, [*three, tasks, rows, half]), "--to", str(parent / "to")]) == 0
    text = text_of(parent / "to" / "index.html")
    assert "tasks it went through other tasks (hc3, instruct) than poor (instruct, hc3)" in text
    assert "rows it was scored on other held-out rows than poor" in text
    assert "half it is not finished: there are scores over the first 1 of 2 tasks" in text
    assert "3 runs compared" in text
    assert capsys.readouterr().out.count("not compared: ") == 3
    with open(parent / "to" / "comparison.csv", encoding="utf-8", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"poor", "good", "fair"}


def test_two_runs_with_nothing_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", GOOD)
    write_run(tmp_path / "b", GOOD, rows="another row")
    assert main([str(tmp_path)]) == 2
    said = "error: no scores to compare with those of a: b, it was scored on other held-out rows than a\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "comparison").exists()


def test_a_run_without_scores_is_refused_where_it_is_named(three: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (three[0] / "scores.json").unlink()
    assert main([*map(str, three)]) == 2
    line = f"error: {three[0]} has no scores.json: no task of this run is finished; start it again, or leave it out\n"
    assert capsys.readouterr().err == line
    assert main([str(three[0].parent)]) == 0  # in a folder of runs it is listed
    assert "poor no task of it is finished" in text_of(three[0].parent / "comparison" / "index.html")


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "runs" / "run", GOOD)
    for arguments, said in (
        ([], "the following arguments are required: RUN_DIR"),
        ([str(tmp_path / "empty")], "holds no run: there is no config.yaml in it or below it"),
        ([str(tmp_path / "nowhere")], "holds no run: there is no config.yaml in it or below it"),
        ([str(run), "--too", "x"], "unrecognized arguments: --too x"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    (run / "scores.json").write_text("{")
    assert main([str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    told = "scores.json, config.yaml or a predictions.jsonl is not what a run writes"
    assert line.startswith(f"error: {run}: {told} (Expecting property name")
    run = write_run(tmp_path / "runs" / "cut", GOOD)
    predictions = next(run.rglob("predictions.jsonl"))
    predictions.write_text(predictions.read_text()[:-20])
    assert main([str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run}: {told} (Unterminated string")


def test_runs_that_kept_no_predictions_have_scores_and_no_differences(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, margins) for name, margins in (("a", GOOD), ("b", POOR))]
    for path in tmp_path.rglob("predictions.jsonl"):
        path.unlink()
    write_comparison(runs, tmp_path / "to")
    text = text_of(tmp_path / "to" / "index.html")
    assert "a 100.00 0.00 100.00" in text and "the runs kept no predictions" in text


def test_other_training_rows_are_told(tmp_path: Path) -> None:
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        run = write_run(tmp_path / name, GOOD)
        write_json(run / "checkpoints" / "00006" / "state.json", {"data": {"instruct": digest, "hc3": "same"}})
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "to")
    assert "training rows of instruct (hash) 11111111 22222222" in text_of(tmp_path / "to" / "index.html")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = "</style><script>alert(1)</script><img src=x onerror=alert(2)> | **x** {{ 7 * 7 }} $\\frac{_<b>$"
    tasks = ("<script>", "$x_{1}$")
    runs = [
        write_run(tmp_path / f"<b>{n}|", GOOD, tasks=tasks, strategy={"a": hostile * n, "b": n, "c": n, "d": n}) for n in (1, 2)
    ]
    write_comparison(runs, tmp_path / "to")
    page = (tmp_path / "to" / "index.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert not {"script", "b", "link", "iframe", "object", "base"} & {tag for tag, _ in tags.found}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    sources = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(sources) == 2 and all((source or "").startswith("data:image/png;base64,") for source in sources)
    assert "{{ 7 * 7 }}" in tags.text and "://" not in page and "@import" not in page and "url(" not in page
    words = (tmp_path / "to" / "comparison.md").read_text(encoding="utf-8")
    assert "<script" not in words.replace("\\<", "") and r"\*\*x\*\*" in words
    for block in re.findall(r"(?:^\|.*\n)+", words, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, "a bar in a name made a new column"


# -- runs that were trained --------------------------------------------------------------------------------------------

METRICS = "evaluation.metrics=[preference_accuracy,mean_log_sigmoid,chosen_nll,rouge_l]"
TINY = (METRICS, "sft.epochs=1", "preference.epochs=1", "evaluation.max_generations=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in the learning rate of preferences, below a folder."""
    folder = tmp_path_factory.mktemp("trained")
    for rate in (0.0005, 0.002, 0.008):
        train_here(folder / "runs" / f"rate{rate}", *TINY, f"preference.lr={rate}")
    return folder / "runs"


@pytest.fixture(scope="module")
def page(trained: Path) -> tuple[Path, str]:
    """What the command writes and says, as a user calls it."""
    ended = command(sys.executable, str(REPOSITORY / "launch" / "compare.py"), str(trained))
    assert (ended.returncode, ended.stderr) == (0, "")
    return trained / "comparison", ended.stdout


def scores(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "scores.json").read_text())["metrics"]


def test_the_command_writes_what_scores_json_says(trained: Path, page: tuple[Path, str]) -> None:
    folder, out = page
    with open(folder / "comparison.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {path.name: scores(path) for path in trained.iterdir() if path.name != "comparison"}
    assert {row["run"] for row in rows} == set(runs)
    for row in rows:
        assert row["preference.lr"] == row["run"].removeprefix("rate")
        if row["figure"] in ("last", "bwt", "ap"):
            assert float(row["value"]) == pytest.approx(runs[row["run"]][row["metric"]][row["figure"]])
    text = text_of(folder / "index.html")
    for name, metrics in runs.items():
        figures = [f"{metrics['mean_log_sigmoid'][key]:.4f}" for key in ("last", "bwt", "ap")]
        assert f"lr={name.removeprefix('rate')} {' '.join(figures)}" in text
        assert all(figure in out for figure in figures)
    assert len(list(folder.glob("sensitivity_*.png"))) == 4
    assert out.splitlines()[-1].endswith("comparison.csv")


def test_the_differences_of_trained_runs_are_those_of_their_scores(trained: Path) -> None:
    comparison = compared(sorted(path for path in trained.iterdir() if path.name != "comparison"))
    for run in comparison.ranked[1:]:
        for metric in ("preference_accuracy", "mean_log_sigmoid"):
            for figure in ("last", "bwt", "ap"):
                found = comparison.difference(run, metric, figure)
                own, first = (scores(r.result.cell.folder)[metric][figure] for r in (run, comparison.first))
                assert found is not None and found.low is not None and found.high is not None
                assert found.mean == pytest.approx(own - first, abs=1e-6)
                assert found.low <= found.mean <= found.high


def test_a_run_scored_on_fewer_rows_is_not_compared(trained: Path, tmp_path: Path) -> None:
    fewer = train_here(tmp_path / "fewer", *TINY, "data.max_eval=4", "preference.lr=0.001")
    runs = [*(path for path in trained.iterdir() if path.name != "comparison"), fewer]
    (left_out,) = write_comparison(runs, tmp_path / "to").left_out
    assert left_out.why.startswith("it was scored on other held-out rows")
    with pytest.raises(UserError, match="held-out rows"):
        write_comparison(runs[-2:], tmp_path / "to")


def test_a_browser_shows_the_page(page: tuple[Path, str]) -> None:
    reason = browser.missing()
    if reason is not None:
        pytest.skip(reason)
    with browser.browser() as driver:
        for size in browser.SIZES:
            browser.show(driver, page[0] / "index.html", size)
            assert browser.troubles(driver) == []
            assert browser.overflow(driver) == 0
            loaded = driver.execute_script("return [...document.images].map(image => image.naturalWidth)")
            assert len(loaded) == 8 and all(loaded)  # a picture of scores and one of the sensitivity, for each metric
