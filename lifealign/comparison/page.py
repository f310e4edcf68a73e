"""The page of a comparison, as HTML and as Markdown: the same blocks of words, tables and pictures.

``index.html`` is self-contained: pictures are inlined, there is no script, nothing is loaded from anywhere, and a content
policy forbids the browser to load or run anything else. What comes from runs is escaped in both.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from lifealign.comparison.ranking import FIGURES, Comparison, written
from lifealign.comparison.runs import LeftOut, Run
from lifealign.evaluation.scores import format_score
from lifealign.study.table import decimals, interval_text, label

HOW_TO_READ = (
    "Last: mean score over the tasks at the end. BWT: mean change since each earlier task was trained. AP: mean over the steps "
    "of the mean over the tasks seen by then. Bold: best of a column; italics: second best. ↓ lower is better: a positive BWT "
    "is then forgetting. Runs rank by Last of the first metric, equal ones by the next."
)
ABOUT_DIFFERENCES = (
    "With 95 % percentile bootstrap intervals over the held-out pairs, drawn anew within each task, the same for both runs; "
    "metrics that are no mean over pairs have none. They say nothing of other seeds or other data. †: 0 is outside."
)


@dataclass(frozen=True)
class Cell:
    """A text of a table, and whether it is the best (1) or second best (2) of its column."""

    text: str
    place: int = 0


@dataclass(frozen=True)
class Block:
    """A part of the page; what it lacks is empty. The first column of a table is text, the others are numbers, or prose."""

    title: str
    level: int = 2
    words: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    prose: bool = False
    pictures: Sequence[str] = ()  # names of files beside the page


def blocks(comparison: Comparison, failed: Sequence[LeftOut]) -> list[Block]:
    """The parts of the page, in their order.

    Args:
        failed: jobs of a sweep that have no scores, and why.
    """
    tasks = f"Over {', '.join(comparison.runs[0].tasks)}. {HOW_TO_READ}"
    heads = ["Run", *(f"{label(metric)}" for metric in comparison.metrics)]
    lasts = [_scores(comparison, run, [(metric, "last") for metric in comparison.metrics]) for run in comparison.ranked]
    made = [Block("Leaderboard: Last of each metric", words=tasks, heads=heads, rows=lasts)]
    if comparison.swept is not None:
        names = [picture_name("sensitivity", metric) for metric in comparison.metrics]
        made.append(Block(f"Sensitivity to {comparison.swept}", pictures=names))
    made.append(_settings(comparison))
    for metric in comparison.metrics:
        made += _of_metric(comparison, metric)
    if comparison.left_out:
        made.append(_list("Not compared", comparison.left_out))
    if failed:
        made.append(_list("Failed", failed))
    return made


def picture_name(kind: str, metric: str) -> str:
    return f"{kind}_{metric}.png"


def _of_metric(comparison: Comparison, metric: str) -> Iterator[Block]:
    rows = [_scores(comparison, run, [(metric, figure) for figure in FIGURES]) for run in comparison.ranked]
    yield Block(label(metric), heads=["Run", *FIGURES.values()], rows=rows, pictures=[picture_name("scores", metric)])
    others = [run for run in comparison.ranked if run is not comparison.first]
    if not others:
        return
    title = f"Difference to {comparison.labels[comparison.first.name]}"
    if not comparison.paired:
        yield Block(title, 3, words="None: the runs kept no predictions, so nothing says that their rows are the same.")
        return
    rows = [[_name(comparison, run), *(_difference(comparison, run, metric, figure) for figure in FIGURES)] for run in others]
    yield Block(title, 3, words=ABOUT_DIFFERENCES, heads=["Run", *FIGURES.values()], rows=rows)


def _scores(comparison: Comparison, run: Run, figures: Sequence[tuple[str, str]]) -> list[Cell]:
    """A row: the run, and these (metric, figure) of it."""
    cells = [_name(comparison, run)]
    for metric, figure in figures:
        text = format_score(comparison.figure(run, metric, figure), decimals(metric))
        cells.append(Cell(text, comparison.places(metric, figure).get(run.name, 0) if len(comparison.runs) > 1 else 0))
    return cells


def _difference(comparison: Comparison, run: Run, metric: str, figure: str) -> Cell:
    return Cell(interval_text(comparison.difference(run, metric, figure), decimals(metric)))


def _settings(comparison: Comparison) -> Block:
    """A row for each setting in which runs differ; the folders of runs that go by another name."""
    title, ranked = "Settings in which the runs differ", comparison.ranked
    table = {
        **{key: {name: written(value) for name, value in row.items()} for key, row in comparison.differing.items()},
        **{f"training rows of {task} (hash)": row for task, row in comparison.other_rows.items()},
    }
    if not table:
        return Block(title, words="None.")
    if any(comparison.labels[run.name] != run.name for run in ranked):
        table["folder"] = {run.name: run.name for run in ranked}
    rows = [[Cell(key), *(Cell(row[run.name]) for run in ranked)] for key, row in table.items()]
    return Block(title, heads=["Setting", *(comparison.labels[run.name] for run in ranked)], rows=rows)


def _list(title: str, left_out: Sequence[LeftOut]) -> Block:
    return Block(title, heads=["Run", "Why"], rows=[[Cell(run.name), Cell(run.why)] for run in left_out], prose=True)


def _name(comparison: Comparison, run: Run) -> Cell:
    return Cell(comparison.labels[run.name])


def html(title: str, parts: Sequence[Block], pictures: Mapping[str, bytes]) -> bytes:
    """``index.html``.

    Args:
        pictures: PNG by file name, for all that the parts name.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("lifealign.comparison").joinpath("page.html").read_text(encoding="utf-8"))
    inlined = {name: "data:image/png;base64," + base64.b64encode(png).decode("ascii") for name, png in pictures.items()}
    # "replace": JSON may smuggle half a surrogate pair into a name, and a page must not fail over it.
    return template.render(title=title, blocks=parts, pictures=inlined).encode("utf-8", "replace")


def markdown(title: str, parts: Sequence[Block]) -> bytes:
    """``comparison.md``, with the pictures beside it."""
    lines = [f"# {_plain(title)}"]
    for block in parts:
        lines.append(f"{'#' * block.level} {_plain(block.title)}")
        lines += [block.words and _plain(block.words), _table(block), *(f"![{name}]({name})" for name in block.pictures)]
    return ("\n\n".join(line for line in lines if line) + "\n").encode("utf-8", "replace")


def _table(block: Block) -> str:
    if not block.rows:
        return ""
    marks = {0: "", 1: "**", 2: "*"}
    heads = [[_plain(head) for head in block.heads], ["---", *["---" if block.prose else "---:"] * (len(block.heads) - 1)]]
    rows = [[f"{marks[cell.place]}{_plain(cell.text)}{marks[cell.place]}" for cell in row] for row in block.rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*heads, *rows])


def _plain(text: str) -> str:
    """A text that means itself in Markdown: no markup, no HTML, no new column or line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
