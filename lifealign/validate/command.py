"""What ``launch/validate.py`` does, in the order in which a person would look."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import RenderableType
from rich.table import Table

from lifealign.assembly import check_positions, judged_tasks
from lifealign.assets import SIX_DOMAINS
from lifealign.config import build
from lifealign.data.options import DataOptions
from lifealign.data.tasks import Task, load_tasks, seen_prompts
from lifealign.data.tokenize import Pair
from lifealign.evaluation.judge import check_judge
from lifealign.models.loading import load_tokenizer
from lifealign.models.quantization import check_quantization
from lifealign.runtime import distributed
from lifealign.runtime.terminal import console
from lifealign.validate.estimate import estimate, estimate_table
from lifealign.validate.examples import example
from lifealign.validate.lengths import LengthRecorder, length_table
from lifealign.validate.work import batch_table, plan_work, step_table


def validate(composed: DictConfig, ranks: int | None = None) -> None:
    """Load rows and tokenizer, build the model without weights, and print what was found.

    Args:
        ranks: processes to reckon with; None: as many as the launcher has started.

    Raises:
        UserError: for the first mistake.
    """
    config, ranks = build(composed), ranks or distributed.world_size()
    config.tracking.check()
    check_quantization(config.model, config.zero.stage)
    if "judge" in config.evaluation.metrics:
        check_judge(config.evaluation.judge, judged_tasks(config))
    tokenizer = load_tokenizer(config.model)
    recorder = LengthRecorder(tokenizer)
    tasks = load_tasks(config.sequence, config.data, recorder, SIX_DOMAINS)
    check_positions(config, tasks)
    config.check_batches({task.name: len(task.train) for task in tasks}, ranks)
    work = plan_work(config, tasks, ranks)
    _show(_task_table(tasks, config.data), length_table(recorder, config.data))
    for number, task in enumerate(dict.fromkeys((tasks[0].name, tasks[-1].name))):
        own = next(t for t in tasks if t.name == task)
        pair = own.train[min(number, len(own.train) - 1)]
        _show(example(pair, tokenizer, task))
    _show(batch_table(config, ranks), step_table(work))
    _show(estimate_table(estimate(config, tasks, work, ranks), ranks))
    console.print("The configuration is valid; nothing was trained.")


def _show(*what: RenderableType) -> None:
    for one in what:
        console.print(one, highlight=False, markup=False)


def _task_table(tasks: Sequence[Task], data: DataOptions) -> Table:
    table = Table(title="Tasks")
    for name in ("task", "train", "held out", "of them seen prompts", "dropped", "longest row (tokens)", "pairs at a limit"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, seen in zip(tasks, seen_prompts(tasks), strict=True):
        pairs = [*task.train, *task.test]
        longest = max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        at_limit = sum(_at_limit(pair, data) for pair in pairs)
        counts = len(task.train), len(task.test), seen, sum(task.dropped.values()), longest, at_limit
        table.add_row(task.name, *map(str, counts))
    return table


def _at_limit(pair: Pair, data: DataOptions) -> bool:
    """Whether the prompt or a response is as long as it may be, so that something was cut off, or just nothing."""
    longest = max(len(pair.chosen), len(pair.rejected))
    return len(pair.prompt) >= data.max_prompt_tokens or longest >= data.max_response_tokens
