"""The statistics of a study on values worked out by hand, and its table and page on cells written by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lifealign.errors import UserError
from lifealign.evaluation.scores import ScoreBook, continual_metrics
from lifealign.runtime.files import write_json, write_json_lines
from lifealign.study.compare import Table, tables
from lifealign.study.figures import draw_methods, draw_sweep
from lifealign.study.grid import Cell, Grid
from lifealign.study.options import load
from lifealign.study.page import Facts, page
from lifealign.study.record import check_settings, is_finished, read_record
from lifealign.study.report import write_report
from lifealign.study.results import Result, check_budget, figure_weights, read_results, result_of_run
from lifealign.study.statistics import bootstrap, is_learned, places, summarise
from lifealign.study.table import figures, interval_text, tidy, values

# -- statistics --------------------------------------------------------------------------------------------------------


def test_spread_over_seeds() -> None:
    """1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, deviation sqrt(14 / 2), error sqrt(7 / 3)."""
    summary = summarise([1.0, 2.0, 6.0])
    assert summary == pytest.approx((3.0, math.sqrt(7), math.sqrt(7 / 3), 3))
    assert summarise([5.0]) == (5.0, None, None, 1)


def test_learned_is_above_chance_by_the_binomial_test() -> None:
    """Of 10 pairs: P(9 or more) = 11/1024 = 0.011; P(8 or more) = 56/1024 = 0.055. Of 100: P(59) = 0.044, P(58) = 0.067."""
    assert is_learned(90.0, 10) and not is_learned(80.0, 10)
    assert is_learned(59.0, 100) and not is_learned(58.0, 100)
    assert not is_learned(0.0, 100)  # far from 50, and below it


def test_the_interval_of_seeds_alone() -> None:
    """Of four there is none. Of forty its width is that of Student's t, 2.0227 deviations to each side."""
    assert bootstrap([np.array([[3.0]])]) == (3.0, None, None, 1)
    assert bootstrap([np.array([[0.0], [2.0], [1.0], [1.0]])]) == (1.0, None, None, 4)
    assert bootstrap([np.full((5, 1), 3.0)]) == pytest.approx((3.0, 3.0, 3.0, 5))
    values = np.random.default_rng(0).normal(size=(40, 1))
    interval = bootstrap([values])
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.low == pytest.approx(2 * 2.0227 * math.sqrt(values.var(ddof=1) / 40), rel=0.06)


def test_few_seeds_are_drawn_as_far_apart_as_they_are() -> None:
    """Two seeds at -1 and 1, each pair alike: draws have a mean of -1, 0 or 1, which vary by 1/2 where 1 is right; and two
    values say next to nothing of their spread, so Student's t asks for 12.7062 where the normal distribution has 1.9600."""
    interval = bootstrap([np.array([[-1.0] * 9, [1.0] * 9])])
    reach = math.sqrt(2) * 12.70620 / 1.959964
    assert interval == pytest.approx((0.0, -reach, reach, 2), rel=1e-5)


@pytest.mark.parametrize("seeds", [3, 5])
def test_where_nothing_differs_few_intervals_exclude_zero(seeds: int) -> None:
    """Of a thousand differences that are chance, seeds and pairs alike, 5 % should: 3.65 deviations more are 7.5 %."""
    generator = np.random.default_rng(seeds)
    found = 0
    for _ in range(1000):
        of_seeds, of_pairs = generator.normal(size=(seeds, 1)), generator.normal(size=(1, 40))
        found += bootstrap([of_seeds + of_pairs + generator.normal(size=(seeds, 40))]).excludes_zero
    assert found < 75


def test_with_one_seed_the_pairs_are_drawn() -> None:
    """A task with pairs 0 and 2, and one whose pairs are all 5: the sum lies between 5 and 7."""
    assert bootstrap([np.array([[0.0, 2.0]]), np.array([[5.0, 5.0, 5.0]])]) == (6.0, 5.0, 7.0, 1)


def test_seeds_and_pairs_are_crossed() -> None:
    """d[s, p] = a[s] + b[p] has a bootstrap variance of var(a)/S + var(b)/P, the first with S - 1: with nested or independent
    draws of pairs for each seed the second term would be var(b)/(S P). 1.96 deviations to each side are the normal interval."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=40), 3 * generator.normal(size=60)
    interval = bootstrap([a[:, None] + b])
    wanted = 2 * 1.96 * math.sqrt(a.var(ddof=1) / 40 + b.var() / 60)
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.low == pytest.approx(wanted, rel=0.06)
    assert interval.mean == pytest.approx(a.mean() + b.mean())


def test_an_interval_excludes_zero_on_either_side() -> None:
    five = np.array([[1.0], [2.0], [1.0], [2.0], [1.0]])
    assert bootstrap([five]).excludes_zero and bootstrap([-five]).excludes_zero
    assert not bootstrap([five - 1.5]).excludes_zero and not bootstrap([np.array([[9.0]])]).excludes_zero


def test_an_interval_of_a_single_seed_is_of_pairs_alone_and_marked_where_that_is_asked_for() -> None:
    interval = bootstrap([np.full((1, 20), 9.0)])
    assert interval == pytest.approx((9.0, 9.0, 9.0, 1))
    assert interval_text(interval, 1) == "9.0 [9.0, 9.0] †" and interval_text(interval, 1, fewest_seeds=2) == "9.0 [9.0, 9.0]"


def test_best_and_second_best() -> None:
    means = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}
    assert places(means, higher_is_better=True) == {"b": 1, "d": 1, "c": 2}
    assert places(means, higher_is_better=False) == {"a": 1, "c": 2}


def test_figures_are_weighted_sums_of_the_matrix() -> None:
    """Against lifealign.evaluation's own figures, on a matrix of distinct numbers."""
    matrix = [[2.0, None, None], [3.0, 7.0, None], [11.0, 5.0, 13.0]]
    for figure, wanted in continual_metrics(matrix).items():
        total = sum(weight * (matrix[i][j] or 0.0) for (i, j), weight in figure_weights(figure, 3).items())
        assert total == pytest.approx(wanted)


# -- cells written by hand ---------------------------------------------------------------------------------------------

MARGINS = {
    ("er", 0): [[[1, 1, -1, 1]], [[1, -1, -1, 1], [2, 2]]],
    ("er", 1): [[[1, 1, 1, 1]], [[1, 1, -1, 1], [2, -2]]],
    ("lifealign", 0): [[[1, 1, 1, 1]], [[1, 1, -1, 1], [2, 2]]],
    ("lifealign", 1): [[[1, 1, 1, 1]], [[1, 1, 1, 1], [2, 2]]],
    ("mtl", 0): [[[1, 1, 1, 1], [2, 2]]],
}
"""Margins of held-out pairs, by task, after each task: `instruct` has four pairs, `hc3` two.

Accuracies, instruct then hc3: er 75 -> 50, 100 (last 75, BWT -25, AP (75 + 75)/2 = 75) and 100 -> 75, 50 (62.5, -25, 81.25);
lifealign 100 -> 75, 100 (87.5, -25, 93.75) and 100 -> 100, 100 (100, 0, 100); mtl 100, 100 at once (100, none, none)."""

TASKS = ["instruct", "hc3"]
SETTINGS = {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "gradient_accumulation_steps": None}


def write_cell(cell: Cell, margins: Sequence[Sequence[Sequence[float]]], *, base: str = "abc", **settings: Any) -> None:
    """What train.py leaves that a study reads."""
    book = ScoreBook(TASKS)
    for row, scored in enumerate(margins):
        after = row if len(margins) == len(TASKS) else len(TASKS) - 1  # joint training fills the last row
        lines = []
        for on, of_task in enumerate(scored):
            book.record("preference_accuracy", after, on, 100 * float(np.mean(np.array(of_task) > 0)))
            book.record("chosen_nll", after, on, 2.0 + on)
            book.record("rouge_l", after, on, 10.0 + cell.seed)
            lines += [{"task": TASKS[on], "id": f"{TASKS[on]}/{n}", "margin": m} for n, m in enumerate(of_task)]
        write_json_lines(cell.folder / "tasks" / f"{row + 1:02d}_{TASKS[row]}" / "predictions.jsonl", lines)
    write_json(cell.folder / "scores.json", book.to_json(cell.method, "dpo", cell.seed))
    record = {"exit_code": 0, "wall_seconds": 10.0 + cell.seed, "peak_memory_mib": 500.0, "steps": 12, "attempts": 1}
    write_json(cell.folder / "cell.json", {"overrides": list(cell.overrides), **record})
    known = {
        "data": {"max_prompt_tokens": 64, "max_response_tokens": 64},
        "evaluation": {"max_generations": None, "max_new_tokens": 8},
        "model": {"path": "bundled", "lora": {"r": 8}},
        "sft": SETTINGS,
        "preference": SETTINGS,
        **settings,
    }
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(known))
    state = {"data": {task: "hash" for task in TASKS}, "base": base, "steps": 12}
    write_json(cell.folder / "checkpoints" / "00006" / "state.json", state)
    steps = [{"kind": "step", "gated_share": 0.25}, {"kind": "step", "gated_share": 0.75}, {"kind": "step", "loss": 1.0}]
    write_json_lines(cell.folder / "metrics.jsonl", steps)


@pytest.fixture
def study(tmp_path: Path) -> Grid:
    options = load("main", ["seeds=[0,1]", "tuning=null", "only_regimes=[twenty]", f"dir={tmp_path}"])
    options.methods["mtl"] = replace(options.methods["mtl"], overrides=["strategy=seqft", "objective=dpo"])
    options.only = ["er", "lifealign", "mtl"]
    return Grid(options, [])


@pytest.fixture
def results(study: Grid) -> list[Result]:
    """Five of the six cells: the second seed of mtl has not run."""
    for cell in study.cells({}):
        if (cell.method, cell.seed) in MARGINS:
            write_cell(cell, MARGINS[cell.method, cell.seed])
    return read_results(study.cells({}))


def of(results: Sequence[Result], method: str, seed: int) -> Mapping[tuple[str, str], float | None]:
    (result,) = (r for r in results if (r.cell.method, r.cell.seed) == (method, seed))
    return {(metric, figure): value for metric, figure, value in figures(result)}


def test_every_figure_of_a_cell(results: list[Result]) -> None:
    found = of(results, "er", 1)
    assert [found["preference_accuracy", figure] for figure in ("last", "bwt", "ap")] == [62.5, -25.0, 81.25]
    assert found["preference_accuracy", "last:hc3"] == 50.0
    assert found["chosen_nll", "last"] == 2.5 and found["chosen_nll", "bwt"] == 0.0
    assert found["text_mean", "last"] == found["rouge_l", "last"] == 11.0  # the one text metric that was scored
    assert found["cost", "wall_seconds"] == 11.0 and found["cost", "steps"] == 12
    assert found["logs", "gated_share"] == 0.5  # of the steps that have one
    assert ("logs", "kept_rank") not in found


def test_bwt_over_learned_tasks(results: list[Result]) -> None:
    """Four pairs of four: P = 1/16, not below 5 %. With ten of ten it is 1/1024, and the accuracy falls to 70."""
    assert of(results, "er", 1)["preference_accuracy", "bwt_learned"] is None
    cell = replace(results[0].cell, folder=results[0].cell.folder / "other")
    write_cell(cell, [[[1] * 10], [[1] * 7 + [-1] * 3, [2, 2]]])
    (longer,) = read_results([cell])
    assert longer.learned == [True]
    assert longer.value("preference_accuracy", "bwt_learned") == pytest.approx(-30.0)
    assert longer.value("rouge_l", "bwt_learned") == longer.value("text_mean", "bwt_learned") == 0.0
    (found,) = [v for m, f, v in figures(longer) if f == "tasks_learned"]
    assert found == 1


def test_joint_training_has_a_last_row_alone(results: list[Result]) -> None:
    found = of(results, "mtl", 0)
    assert [found["preference_accuracy", figure] for figure in ("last", "bwt", "bwt_learned", "ap")] == [
        100.0,
        None,
        None,
        None,
    ]


def test_a_model_that_stays_in_use_is_scored_once(study: Grid) -> None:
    """One model a task: the score on `instruct` stands in the last row too, its pairs in the first folder alone."""
    cell = study.cells({})[0]
    write_cell(cell, [[[1, 1, -1, 1]], [[1, 1, -1, 1], [2, -2]]])
    write_json_lines(
        cell.folder / "tasks" / "02_hc3" / "predictions.jsonl",
        [{"task": "hc3", "id": f"hc3/{n}", "margin": m} for n, m in enumerate([2, -2])],
    )
    (result,) = read_results([cell])
    assert result.margins(1, 0).tolist() == [1, 1, -1, 1]
    parts = result.parts("preference_accuracy", "last")
    assert parts is not None and [part.mean() for part in parts] == [37.5, 25.0]


def test_pair_values_of_the_continuous_metrics(results: list[Result]) -> None:
    """log σ(1) = −log(1 + e⁻¹); the margin is itself. Only figures of metrics that were scored have parts."""
    result = results[0]
    for metric in ("mean_log_sigmoid", "reward_margin"):
        for after, row in enumerate(MARGINS[result.cell.method, result.cell.seed]):
            for on, margins in enumerate(row):
                value = {"reward_margin": float, "mean_log_sigmoid": lambda r: -math.log1p(math.exp(-r))}[metric]
                result.book.record(metric, after, on, float(np.mean([value(r) for r in margins])))
        for figure in ("last", "bwt", "ap"):
            parts = result.parts(metric, figure)
            assert parts is not None
            assert sum(part.mean() for part in parts) == pytest.approx(result.book.figures(metric)[figure])
    assert result.parts("chosen_nll", "last") is None


def test_unequal_budgets_make_no_table(study: Grid, results: list[Result]) -> None:
    check_budget(results)
    cell = results[-1].cell
    cell.kept.unlink()
    write_cell(cell, MARGINS[cell.method, cell.seed], preference={**SETTINGS, "epochs": 3})
    with pytest.raises(UserError, match=r"differ in preference\.epochs: 2 -> 3"):
        write_report(study, {}, "command")
    assert (study.options.folder / "results.csv").exists() and not (study.options.folder / "study.md").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"path": "bundled", "lora": {"r": 64}}}, r"lora\.r: 8 -> 64"),
        ({"data": {"max_prompt_tokens": 64, "max_response_tokens": 32}}, r"limits\.max_response_tokens: 64 -> 32"),
        ({"evaluation": {"max_generations": 2, "max_new_tokens": 8}}, r"answers\.max_generations: None -> 2"),
    ],
)
def test_adapters_limits_and_answers_are_part_of_the_budget(
    changed: dict[str, Any], told: str, study: Grid, results: list[Result]
) -> None:
    """Of cells that an earlier version kept they are not known, and then they are not compared."""
    cell = results[-1].cell
    cell.kept.unlink()
    write_cell(cell, MARGINS[cell.method, cell.seed], **changed)
    other = read_results([cell])[0]
    with pytest.raises(UserError, match=told):
        check_budget([*results[:-1], other])
    for key in ("lora", "limits", "answers"):
        del other.budget[key]
    check_budget([*results[:-1], other])


def test_cells_of_a_seed_start_from_one_base_and_seeds_may_have_their_own(study: Grid, results: list[Result]) -> None:
    def rewrite(method: str, seed: int, **given: Any) -> None:
        (cell,) = (r.cell for r in results if (r.cell.method, r.cell.seed) == (method, seed))
        cell.kept.unlink(missing_ok=True)
        write_cell(cell, MARGINS[method, seed], **given)

    rewrite("lifealign", 1, base="others")
    with pytest.raises(UserError, match=r"er/twenty/seed1 and .*lifealign/twenty/seed1 differ in model\.hash: abc -> others"):
        write_report(study, {}, "command")
    rewrite("er", 1, base="others")
    check_budget(read_results(study.cells({})))
    rewrite("er", 1, base="others", sft={**SETTINGS, "epochs": 3})
    rewrite("lifealign", 1, base="others", sft={**SETTINGS, "epochs": 3})
    with pytest.raises(UserError, match=r"seed0 and .*seed1 differ in sft\.epochs"):
        check_budget(read_results(study.cells({})))


def test_the_page_can_be_had_without_the_runs(study: Grid, results: list[Result]) -> None:
    """Of each finished cell a file stays; folders may go, to free the disk or because the machine is another one."""
    cell = next(r.cell for r in results if (r.cell.method, r.cell.seed) == ("lifealign", 0))
    cell.kept.unlink()
    write_cell(cell, [[[0.1, 1 / 3, -1e-30, 7.0]], [[0.1, 1e-30, -0.7, 7.0], [2.5, -2.5]]])
    write_json(cell.folder / "stability.json", {"worst": 40.0, "end": 50.0, "gap": 10.0, "tasks": {}})
    of_runs = [result_of_run(result.cell, read_record(result.cell)) for result in results]
    read_results(study.cells({}))
    for result in results:
        shutil.rmtree(result.cell.folder)
        assert is_finished(result.cell) and result.cell.kept.stat().st_size < 4096
    again = read_results(study.cells({}))
    assert tidy("main", again).equals(tidy("main", of_runs)) and len(again) == 5
    assert of(again, "lifealign", 0)["stability", "gap"] == 10.0 and of(again, "er", 0)["logs", "gated_share"] == 0.5
    first, second = (table_of(study, found) for found in (of_runs, again))
    for figure in ("last", "bwt", "ap"):
        wanted = first.difference("lifealign", "er", "preference_accuracy", figure)
        assert second.difference("lifealign", "er", "preference_accuracy", figure) == wanted is not None
    write_report(study, {}, "command")
    assert "**5 of 6 cells finished**" in (study.options.folder / "study.md").read_text()


def test_what_was_kept_counts_and_not_what_a_folder_says_beside_it(results: list[Result]) -> None:
    """Files from elsewhere, put beside the folder of a run that was begun here: skipping, checks and tables agree on them."""
    cell = results[0].cell
    write_json(cell.folder / "cell.json", {"overrides": ["more=1"], "exit_code": None})
    assert is_finished(cell) and read_record(cell).overrides == list(cell.overrides)
    check_settings([cell])


def test_a_run_without_its_checkpoints_says_nothing_of_its_rows(results: list[Result]) -> None:
    cell = results[0].cell
    cell.kept.unlink()
    shutil.rmtree(cell.folder / "checkpoints")
    with pytest.raises(UserError, match=r"has finished and its checkpoints are gone"):
        read_results([cell])


def test_bases_are_compared_where_their_hashes_are_known(results: list[Result]) -> None:
    unknown = replace(results[0], budget={**results[0].budget, "model": {"path": "bundled", "hash": None}})
    check_budget([unknown, *results])
    elsewhere = replace(results[0], budget={**results[0].budget, "model": {"path": "other", "hash": None}})
    with pytest.raises(UserError, match=r"differ in model\.path: bundled -> other|differ in model\.path: other -> bundled"):
        check_budget([elsewhere, *results])


def test_what_is_kept_with_other_settings_is_refused_and_what_is_damaged_told(results: list[Result]) -> None:
    cell = results[0].cell
    shutil.rmtree(cell.folder)
    other = replace(cell, overrides=(*cell.overrides, "more=1"))
    with pytest.raises(UserError, match=rf"other settings \(more=1\).*removing that folder and {cell.kept.name}"):
        check_settings([other])
    cell.kept.write_bytes(cell.kept.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{cell.kept.name} is not what a study keeps of a cell"):
        is_finished(cell)


def table_of(study: Grid, results: list[Result]) -> Table:
    (table,) = tables(study, tidy("main", results), results)
    return table


def test_differences_are_paired_by_seed_and_pair(study: Grid, results: list[Result]) -> None:
    """LifeAlign minus ER: Last 12.5 and 37.5, in the mean 25. With seed 0, pair 2 of `instruct` and all of `hc3` are equal.

    A BWT of 0 and 25 has 12.5."""
    table = table_of(study, results)
    last, bwt = (table.difference("lifealign", "er", "preference_accuracy", figure) for figure in ("last", "bwt"))
    assert last is not None and bwt is not None
    assert last.mean == pytest.approx(25.0) and bwt.mean == pytest.approx(12.5)
    assert last.low is not None and last.high is not None
    assert last.low < 12.5 and last.high > 37.5  # further than the seeds, for two are few
    nll = table.difference("lifealign", "er", "chosen_nll", "last")
    assert nll == (0.0, None, None, 2)  # two seeds alone
    assert table.difference("lifealign", "mtl", "preference_accuracy", "bwt") is None  # mtl has none
    one = table.difference("lifealign", "mtl", "rouge_l", "last")
    assert one == (0.0, None, None, 1)  # one seed in common, and no values of pairs


def test_bwt_over_learned_tasks_is_compared_over_those_that_both_learned(study: Grid, results: list[Result]) -> None:
    """Ten pairs of ten are learned, and fall to nine and to seven: a difference of 20. Two pairs are learned by neither."""
    for result, wrong in zip(results[:3:2], (3, 1), strict=True):  # er and lifealign, seed 0
        result.cell.kept.unlink()
        write_cell(result.cell, [[[1] * 10], [[1] * (10 - wrong) + [-1] * wrong, [2, 2]]])
    again = read_results(study.cells({}))
    both = [result for result in again if result.cell.seed == 0 and result.cell.method != "mtl"]
    found = table_of(study, both).difference("lifealign", "er", "preference_accuracy", "bwt_learned")
    assert found is not None and found.mean == pytest.approx(20.0)
    assert found.low is not None and found.high is not None and found.low < 20 < found.high  # of the ten pairs
    write_cell(replace(both[0].cell, folder=both[0].cell.folder / "x"), [[[1] * 3 + [-1] * 7], [[1] * 10, [2, 2]]])
    (unlearned,) = read_results([replace(both[0].cell, folder=both[0].cell.folder / "x")])
    assert table_of(study, [unlearned, both[1]]).difference("lifealign", "er", "preference_accuracy", "bwt_learned") is None


def test_held_out_rows_that_come_twice_are_drawn_once(study: Grid, results: list[Result]) -> None:
    """Twice the same pairs: what they add to a difference is of one draw, and varies by more than that of two draws."""
    for result, margins in zip(results[:3:2], ([1, -1] * 20, [1, 1] * 20), strict=True):
        result.cell.kept.unlink()
        write_cell(result.cell, [[margins], [margins, margins]])
    both = [result for result in read_results(study.cells({})) if result.cell.seed == 0 and result.cell.method != "mtl"]
    apart = table_of(study, both)
    widths = []
    for table in (apart, replace(apart, owners={"hc3": "instruct"})):
        found = table.difference("lifealign", "er", "preference_accuracy", "last")
        assert found is not None and found.low is not None and found.high is not None
        assert found.mean == pytest.approx(50.0)
        widths.append(found.high - found.low)
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(2), rel=0.15)


def test_a_pair_on_which_the_policy_overflowed_leaves_no_interval(study: Grid, results: list[Result]) -> None:
    """Its margin is no number; the scores themselves may be, as accuracy is where the rejected response has -inf."""
    one = next(result for result in results if result.cell.method == "er")
    task = one.book.tasks[0]
    broken = one.scored[-1][task].copy()
    broken[0] = np.nan
    overflowed = replace(one, scored=[*one.scored[:-1], {**one.scored[-1], task: broken}])
    assert overflowed.parts("preference_accuracy", "last") is None and one.parts("preference_accuracy", "last") is not None


def test_the_csv_is_tidy(study: Grid, results: list[Result]) -> None:
    frame = tidy("main", results)
    assert list(frame.columns) == ["study", "method", "regime", "sequence", "seed", "metric", "figure", "value"]
    assert values(frame, "lifealign", "preference_accuracy", "last") == {0: 87.5, 1: 100.0}
    assert values(frame, "mtl", "preference_accuracy", "bwt") == {}
    assert {*frame[frame.method == "mtl"].regime} == {"any"} and {*frame[frame.method == "er"].regime} == {"twenty"}


def test_the_page(study: Grid, results: list[Result]) -> None:
    """Last of ER: 75 and 62.5, mean 68.75, deviation 12.5/sqrt 2 = 8.84, error 6.25. MTL is better and not ranked."""
    facts = Facts("python x", ["Commit abc, 2025-01-01, a machine"], 5, 6, ["er, seed 0: exit code 1: `so it goes`"])
    task = {"task": "instruct", "train": 8, "held_out": 4, "seen_prompts": 3, "cues": {"more_questions": 50.0}}
    tuned = {"method": "seqft", "regime": "any", "variants": [["er", "twenty"]], "scores": {"1": {}}, "chosen": None}
    text = page(study, facts, [table_of(study, results)], [tuned], [task], ["picture.png"])
    assert "- Commit abc, 2025-01-01, a machine\n- 2 cells at once" in text
    assert "**5 of 6 cells finished**" in text and "so it goes" in text and "![picture.png](picture.png)" in text
    assert "| ER | *68.75 ± 8.84 (6.25)* | *-25.00 ± 0.00 (0.00)* | – | *78.12 ± 4.42 (3.12)* | 0.0 | 2 |" in text
    assert "| LifeAlign | **93.75 ± 8.84 (6.25)** | **-12.50 ± 17.68 (12.50)** | – | **96.88 ± 4.42 (3.12)** | 0.0" in text
    assert "| MTL | 100.00 | – | – | – | – | 1 |" in text
    assert "- Text metrics: answers to all prompts of a task, cut at 64 tokens, beside whole references" in text
    assert "### Chosen NLL (nats/token) ↓" in text and "2.5000 ± 0.0000 (0.0000)" in text
    assert "| ER | 10.50 ± 0.71 (0.50) | 32.22 | 0.00 ± 0.00 (0.00) | -4.46 | 10.50 ± 0.71 (0.50) | 35.63 |" in text
    assert "| ER | 10 | 500 | 12 |" in text and "| instruct | 8 | 4 | 3 | 50.0 |" in text
    assert "Learning rates" not in text  # tuning is switched off


def test_a_rate_at_the_edge_of_the_grid_is_marked_in_whatever_order_it_is_given(tmp_path: Path) -> None:
    grid = Grid(load("main", ["seeds=[0]", "only=[er]", "tuning.scales=[1,0.5,2,4]", f"dir={tmp_path}"]), [])
    scores = {f"{scale:g}": {} for scale in grid.tuning.scales}
    shared = {"regime": "any", "variants": [["er", "twenty"]], "scores": scores}
    tuned = [{"method": f"best {chosen:g}", "chosen": chosen, **shared} for chosen in (0.5, 1.0, 2.0, 4.0)]
    text = page(grid, Facts("python x", [], 0, 1, []), [], tuned, [], [])
    assert "| Tuned | × 1 | × 0.5 | × 2 | × 4 | Chosen | Taken by |" in text
    for chosen, mark in (("0.5", " \\*"), ("1", ""), ("2", ""), ("4", " \\*")):
        assert f"| best {chosen} | – | – | – | – | {chosen}{mark} | er |" in text


def test_pictures_show_means_and_deviations(study: Grid, results: list[Result]) -> None:
    table = table_of(study, results)
    last, bwt = draw_methods(study, [table], "preference_accuracy").axes
    assert [bar.get_height() for bar in last.patches] == [68.75, 93.75, 100.0]
    assert [label.get_text() for label in last.get_xticklabels()] == ["ER", "LifeAlign", "MTL"]
    assert [bar.get_height() for bar in bwt.patches][:2] == [-25.0, -12.5]


def test_a_sweep_is_a_line_over_its_values(tmp_path: Path) -> None:
    """λ = 0.5 is LifeAlign itself; of the others only λ = 0 has run."""
    options = load("sensitivity", ["seeds=[0]", "tuning=null", f"dir={tmp_path}"])
    options.only = ["lifealign", *(name for name in options.methods if name.startswith("lambda_"))]
    grid = Grid(options, [])
    cells = {cell.method: cell for cell in grid.cells({})}
    write_cell(cells["lifealign"], MARGINS["lifealign", 0])
    write_cell(cells["lambda_0"], MARGINS["er", 0])
    (table,) = tables(grid, *(lambda found: (tidy("s", found), found))(read_results(grid.cells({}))))
    axes = draw_sweep(grid, [table], "lambda", options.sweeps["lambda"], "preference_accuracy").axes[0]
    assert axes.lines[0].get_ydata().tolist() == [75.0, 87.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5"]
    assert draw_sweep(grid, [table], "gamma", options.sweeps["gamma"], "preference_accuracy") is None  # one value alone
