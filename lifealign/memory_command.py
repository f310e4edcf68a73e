"""Open a run's long-term memory: what each task put in, what it fought with, and an adapter without it.

Everything works offline, on a CPU and on files alone; only scoring loads the model. The run's adapter and memory are never
changed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lifealign.arguments import ArgumentParser, exit_code
from lifealign.errors import UserError, did_you_mean
from lifealign.memory.bank import Entry, read_ledger
from lifealign.memory.contributions import Summary, by_layer, cosines, summarise, tasks_of
from lifealign.runtime import distributed
from lifealign.runtime.files import new_folder, read_json, write_bytes, write_json, writing

SHORT = 12
"""Digits of a hash that are shown."""

FIGURES = ("kept_rank", "kept_energy", "history_share", "update_norm", "refined_norm", "merged_energy", "truncation_error")


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code: 2 for a mistake, which is told in one line."""
    return exit_code(lambda: _do(_parser().parse_args(arguments)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="memory.py", description="The long-term memory of a run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=ArgumentParser, metavar="ACTION")
    actions.add_parser("list", help="what each stage of each task put in").set_defaults(do=_list)
    show = actions.add_parser("show", help="one task by layer, its spectrum, and its conflicts with other tasks")
    show.add_argument("task", metavar="TASK")
    show.add_argument("--to", type=Path, metavar="DIR", help="where pictures go; RUN_DIR/report unless told")
    show.set_defaults(do=_show)
    to = argparse.ArgumentParser(add_help=False)
    to.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    to.add_argument("--score", action="store_true", help="score the new adapter on the run's tasks, beside the old scores")
    scale = actions.add_parser("scale", parents=[to], help="an adapter with more or less of some tasks")
    scale.add_argument("factors", nargs="+", metavar="TASK=FACTOR")
    scale.set_defaults(do=lambda given, _: _edit(given, [_factor(word) for word in given.factors]))
    revert = actions.add_parser("revert", parents=[to], help="an adapter as if a task had put nothing in")
    revert.add_argument("tasks", nargs="+", metavar="TASK")
    revert.set_defaults(do=lambda given, _: _edit(given, [(task, 0.0) for task in given.tasks]))
    export = actions.add_parser("export", help="the ledger as a table, a row a factor: CSV")
    export.add_argument("--to", type=Path, metavar="FILE", help="a file; standard output unless told")
    export.set_defaults(do=_export)
    return parser


def _factor(argument: str) -> tuple[str, float]:
    task, is_given, factor = argument.rpartition("=")
    try:
        if is_given:
            return task, float(factor)
    except ValueError:
        pass
    raise UserError(f"scale {argument}: give a task and a number, such as hc3=0.5")


def _do(given: argparse.Namespace) -> None:
    if not (given.run / "config.yaml").exists():
        raise UserError(f"{given.run} holds no run: there is no config.yaml in it")
    entries = read_ledger(given.run / "memory")
    if not entries:
        raise UserError(f"{given.run}: there is no long-term memory; it is kept by strategy=lifealign")
    given.do(given, entries)


def _list(given: argparse.Namespace, entries: Sequence[Entry]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("Task", "Stage", "Date", *SUMMARY, "Update"):
        table.add_column(heading, justify="right" if heading in SUMMARY else "left", no_wrap=True)
    for entry in entries:
        figures = _summary_cells(summarise(entry["factors"]))
        date = entry["date"][:16].replace("T", " ")
        table.add_row(entry["task"], entry["stage"], date, *figures, entry["hashes"]["update"][:SHORT])
    _console().print(table, highlight=False)


SUMMARY = ("Norm", "Before", "Kept rank", "Kept energy", "In conflict")
"""Headings of a summary: the norm of what joined the adapter and of what training had changed, the singular directions that
truncation kept and their share of energy, and the share of that which lay in the span of the past."""


def _summary_cells(summary: Summary) -> list[str]:
    rank = "–" if summary.kept_rank is None else f"{summary.kept_rank:.1f}"
    norms = f"{summary.norm:.4g}", f"{summary.update_norm:.4g}"
    return [*norms, rank, *map(_percent, (summary.kept_energy, summary.history_share))]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _show(given: argparse.Namespace, entries: Sequence[Entry]) -> None:
    from lifealign.evaluation.figures import draw_conflict, draw_spectrum, png  # slow to import

    own = [entry for entry in entries if entry["task"] == given.task]
    tasks = tasks_of(entries)
    if not own:
        raise UserError(f"show {given.task}: the ledger names no such task{did_you_mean(given.task, tasks)}")
    console = _console()
    for entry in own:
        console.print(f"{entry['task']}, {entry['stage']}, {entry['date']}", highlight=False, style="bold")
        console.print(", ".join(f"{what} {value[:SHORT]}" for what, value in entry["hashes"].items()), highlight=False)
        console.print(_layer_table(entry), highlight=False)
    conflict = cosines(given.run / "memory", entries)
    others = ", ".join(f"{other} {value:+.3f}" for other, value in zip(tasks, conflict[tasks.index(given.task)], strict=True))
    console.print(f"Cosine with what each task added: {others}", highlight=False)
    spectra = {entry["stage"]: [r["singular_values"] for r in entry["factors"] if "singular_values" in r] for entry in own}
    folder = given.to or given.run / "report"
    pictures = {"memory_conflict.png": draw_conflict(conflict.numpy(), tasks)}
    pictures[f"memory_spectrum_{given.task}.png"] = draw_spectrum(spectra)
    for name, figure in pictures.items():
        write_bytes(folder / name, png(figure))
        console.print(f"written: {folder / name}", highlight=False)


def _layer_table(entry: Entry) -> Table:
    """A row a layer, its factors together."""
    table = Table(box=None, pad_edge=False)
    table.add_column("Layer", no_wrap=True)
    for heading in SUMMARY:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, records in by_layer(entry["factors"]).items():
        table.add_row(layer, *_summary_cells(summarise(records)))
    return table


def _edit(given: argparse.Namespace, wanted: Sequence[tuple[str, float]]) -> None:
    from safetensors.torch import save_file

    from lifealign.memory.edit import edit, finished_adapters  # slow to import, as is what it needs
    from lifealign.models.adapter import WEIGHTS, copy_adapter

    if distributed.world_size() > 1:
        raise UserError("memory.py writes an adapter in one process; start it with python")
    factors = dict(wanted)
    if len(factors) < len(wanted):
        raise UserError("a task is named twice; give each once")
    if given.to.exists():
        raise UserError(f"--to {given.to}: exists already; name a folder that does not")
    newest = finished_adapters(given.run)[-1]
    if given.score:
        _check_scored(given.run, newest.parent)
    edited = edit(given.run, factors)
    made_of = [{**_identity(entry), "factor": factors.get(entry["task"], 1.0)} for entry in edited.entries]
    with new_folder(given.to) as beside, writing(given.to):
        copy_adapter(newest, beside)
        save_file(edited.factors, beside / WEIGHTS, {"format": "pt"})
        write_json(beside / "edit.json", {"run": given.run.resolve().name, "scaled": factors, "entries": made_of})
    console = _console()
    if edited.truncation_error:
        console.print(f"an adapter of this rank lacks {100 * edited.truncation_error:.2g} % of the wanted products")
    console.print(f"written: {given.to}", highlight=False)
    if given.score:
        _score(given.run, given.to, console)


def _check_scored(run: Path, newest: Path) -> None:
    """Raises UserError where the run has no scores after its newest task, to print beside those of an edit.

    A run writes them behind the adapter: first beside it, then into its own matrix. It may have been killed in between.
    """
    if not (run / "scores.json").exists():
        raise UserError(f"{run}: there are no scores yet to compare with; leave out --score")
    if not read_json(run / "scores.json")["metrics"]:
        raise UserError(f"{run}: was scored by no metric, so there is nothing to compare with; leave out --score")
    number = int(newest.name.partition("_")[0])
    scored = max((len(entry["matrix"]) for entry in read_json(run / "scores.json")["metrics"].values()), default=0)
    if scored < number or not (newest / "scores.json").exists():
        raise UserError(f"{newest}: the run was interrupted before this task was scored; go on with it first")


def _identity(entry: Entry) -> dict[str, Any]:
    return {key: entry[key] for key in ("name", "task", "stage", "hashes")}


def _score(run: Path, adapter: Path, console: Console) -> None:
    """Score an edited adapter on every task the run has finished, and print it beside the scores of the run's own."""
    from lifealign.evaluation.scores import METRICS, format_score, metric_info
    from lifealign.memory.edit import finished_adapters
    from lifealign.rescore import Scorer

    before = read_json(run / "scores.json")["metrics"]
    finished = len(finished_adapters(run))
    try:
        scorer = Scorer(run)
        scores = {task.name: result.scores for task, result in scorer.score(adapter, scorer.tasks[:finished])}
    finally:
        distributed.stop()
    write_json(adapter / "scores.json", {"scores": scores})
    table = Table(box=None, pad_edge=False)
    table.add_column("Task", no_wrap=True)
    metrics = [metric for metric in METRICS if metric in before and metric in scorer.config.evaluation.metrics]
    for metric in metrics:
        table.add_column(metric_info(metric).title, justify="right")
    for number, (task, values) in enumerate(scores.items()):
        was = [before[metric]["matrix"][finished - 1][number] for metric in metrics]
        pairs = [(old, values[metric]) for old, metric in zip(was, metrics, strict=True)]
        table.add_row(task, *(f"{format_score(old)} → {format_score(new)}" for old, new in pairs))
    console.print(table, highlight=False)


def _export(given: argparse.Namespace, entries: Sequence[Entry]) -> None:
    rows = list(_rows(entries))
    if given.to is None:
        _write_csv(rows, sys.stdout)
        return
    given.to.parent.mkdir(parents=True, exist_ok=True)
    with open(given.to, "w", encoding="utf-8", newline="") as file:
        _write_csv(rows, file)
    _console().print(f"written: {given.to}, {len(rows)} rows", highlight=False)


def _rows(entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """A row a factor and entry."""
    for entry in entries:
        about = {key: entry[key] for key in ("name", "task", "task_number", "stage", "date", "space", "consolidated")}
        hashes = {f"{what}_sha256": value for what, value in entry["hashes"].items()}
        for record in entry["factors"]:
            values = " ".join(f"{value:.6g}" for value in record.get("singular_values", ()))
            figures = {key: record.get(key, "") for key in FIGURES}
            yield {**about, "factor": record["factor"], **figures, "singular_values": values, **hashes}


def _write_csv(rows: Sequence[Mapping[str, Any]], file: Any) -> None:
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)


def _console() -> Console:
    """Names are printed as they are; lines that a terminal is too narrow for are wrapped by it, and nothing is cut."""
    return Console(soft_wrap=True, markup=False, emoji=False, width=240)
