"""``launch/compare.py RUN_DIR...``, and the end of a sweep: read runs, print how they rank, write the page and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lifealign.arguments import ArgumentParser, exit_code
from lifealign.comparison.figures import draw_scores, draw_sensitivity
from lifealign.comparison.page import blocks, html, markdown, picture_name
from lifealign.comparison.ranking import FIGURES, Comparison
from lifealign.comparison.runs import LeftOut, Run, common_parent, comparable, find_runs, read_runs
from lifealign.errors import UserError, did_you_mean
from lifealign.evaluation.figures import png
from lifealign.evaluation.scores import format_score
from lifealign.runtime.files import write_bytes, write_text
from lifealign.runtime.terminal import console
from lifealign.study.table import decimals, label
from lifealign.sweep import Ended

FOLDER = "comparison"
KINDS = {"scores": draw_scores, "sensitivity": draw_sensitivity}


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code: 2 for a mistake, which is told in one line."""
    return exit_code(lambda: _compare(arguments))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="compare.py", description="Runs beside each other: a leaderboard, a page and a table.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run, or a folder with runs, such as a sweep's")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where files go; comparison/ beside the runs unless told")
    parser.add_argument("--against", metavar="RUN", help="the run that differences are taken to; the first-ranked unless told")
    return parser


def _compare(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
    folders = find_runs(given.runs)
    alone = given.runs[0] if len(given.runs) == 1 and given.runs[0].resolve() not in folders else None
    write_comparison(folders, given.to or (alone or common_parent(folders)) / FOLDER, against=given.against)


def compare_sweep(folder: Path, ended: Sequence[Ended]) -> None:
    """Compare the runs of a sweep's jobs, in its folder; where that cannot be done, a line says why."""
    failed = [LeftOut(_job_name(job), job.error or "") for job in ended if job.exit_code]
    runs = list(dict.fromkeys(folder / job.run for job in ended if job.run is not None and not job.exit_code))
    try:
        if not runs:
            raise UserError("no job has finished")
        write_comparison(runs, folder / FOLDER, failed=failed)
    except UserError as error:
        console.print(f"no comparison: {error}", markup=False)


def _job_name(job: Ended) -> str:
    return ", ".join(f"{key}={value}" for key, value in job.swept.items()) or f"job {job.job}"


def write_comparison(
    folders: Sequence[Path], to: Path, *, against: str | None = None, failed: Sequence[LeftOut] = ()
) -> Comparison:
    """Print how runs rank, and write ``comparison.csv``, ``comparison.md``, ``index.html`` and pictures into ``to``.

    Raises:
        UserError: where no runs can be compared, or a file of theirs is not what a run writes.
    """
    runs, unfinished = read_runs(folders)
    if not runs:
        raise UserError(f"no run to compare: {unfinished[0].name}, {unfinished[0].why}")
    reference = _named(runs, against, common_parent(folders)) if against is not None else None
    same, others = comparable(runs, reference)
    comparison = Comparison(same, [*others, *unfinished], reference.name if reference is not None else None)
    for run in comparison.left_out:
        console.print(f"not compared: {run.name}, {run.why}", markup=False)
    console.print(leaderboard(comparison))
    _write(comparison, to, failed)
    console.print(f"{to / 'index.html'}, comparison.md, comparison.csv", markup=False)
    return comparison


def _named(runs: Sequence[Run], name: str, parent: Path) -> Run:
    """The run that is called so: by its folder, or by its name below the folder that all runs lie in."""
    for run in runs:
        if name == run.name or Path(name).resolve() == parent / run.name:
            return run
    raise UserError(f"--against {name}: there is no such run with scores{did_you_mean(name, [run.name for run in runs])}")


def _write(comparison: Comparison, to: Path, failed: Sequence[LeftOut]) -> None:
    parts = blocks(comparison, failed)
    named = {name for block in parts for name in block.pictures}
    drawn = {picture_name(kind, metric): (draw, metric) for metric in comparison.metrics for kind, draw in KINDS.items()}
    pictures = {name: png(draw(comparison, metric)) for name, (draw, metric) in drawn.items() if name in named}
    for stale in (path for kind in KINDS for path in to.glob(f"{kind}_*.png") if path.name not in pictures):
        stale.unlink()  # of an earlier comparison of other runs
    for name, picture in pictures.items():
        write_bytes(to / name, picture)
    title = f"{len(comparison.runs)} runs compared" if len(comparison.runs) > 1 else comparison.runs[0].name
    write_text(to / "comparison.csv", comparison.tidy().to_csv(index=False))
    write_bytes(to / "comparison.md", markdown(title, parts))
    write_bytes(to / "index.html", html(title, parts, pictures))


def leaderboard(comparison: Comparison) -> Table:
    """A section a metric, the run that ranks first on top. It says the same without colour."""
    table = Table(
        title=f"{len(comparison.runs)} runs over {', '.join(comparison.runs[0].tasks)}",
        caption="¹ best, ² second best; ↓ lower is better: a positive BWT is then forgetting",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Metric and run", overflow="fold")
    for heading in FIGURES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in comparison.metrics:
        table.add_row(Text(label(metric), style="bold"))
        for run in comparison.ranked:
            cells = [_marked(comparison, run, metric, figure) for figure in FIGURES]
            table.add_row(Text(f"  {comparison.labels[run.name]}"), *cells)
        table.add_section()
    return table


def _marked(comparison: Comparison, run: Run, metric: str, figure: str) -> Text:
    text = format_score(comparison.figure(run, metric, figure), decimals(metric))
    place = comparison.places(metric, figure).get(run.name) if len(comparison.runs) > 1 else None
    return Text(text + {1: "¹", 2: "²"}.get(place or 0, " "), style="bold" if place == 1 else "")
