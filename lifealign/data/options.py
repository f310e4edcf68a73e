"""What a user may say about rows: where they come from, how long they may be, and which tasks form a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from lifealign.errors import UserError, check_name


@dataclass
class DataOptions:
    """``data.*``: where rows come from and how much of them is used."""

    hub: bool = False  # True: rows come from the public hub names in the sequence's ``sources``
    root: str | None = None  # folder holding TASK/train.* and TASK/test.* or dev.*; None: the bundled demonstration set
    max_train: int | None = None  # training pairs a task, the first of its file that are usable; None: all
    max_eval: int | None = None  # held-out pairs a task
    max_prompt_tokens: int = 512  # longer prompts lose their beginning
    max_response_tokens: int = 512  # longer responses lose their end, but keep the end-of-sequence token
    max_empty: float = 0.02  # share of rows with an empty prompt or response above which a file is refused
    tuning_pairs: int = 0  # training pairs of one task that are set aside to choose settings on, and never trained on
    tuning_task: str | None = None  # whose; None: the first of the sequence
    tuning: bool = False  # True: that task is scored on them in place of its held-out pairs

    def __post_init__(self) -> None:
        if self.tuning_pairs < 0:
            raise UserError(f"data.tuning_pairs={self.tuning_pairs}: must be 0 or more")
        if self.tuning and not self.tuning_pairs:
            raise UserError("data.tuning=true, but data.tuning_pairs=0 sets no pairs aside; give their number")
        for key in ("max_train", "max_eval", "max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.{key}={value}: must be at least 1")
        if not 0 <= self.max_empty <= 1:
            raise UserError(f"data.max_empty={self.max_empty}: must lie in [0, 1]")


@dataclass
class Columns:
    """Which columns of a row hold what. Empty names fall back to the ones every task may use (see docs/data.md)."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    responses: list[str] | None = None  # two columns of responses, for data that says which of the two is better
    preferred: str | None = None  # column with the index (0 or 1) of the better one of ``responses``
    join_rejected: str | None = None  # joins a list of rejected answers ("; "); None: the first that is not empty


@dataclass
class HubSource:
    """A data set of the Hugging Face hub."""

    path: str = MISSING
    name: str | None = None  # configuration of the data set
    revision: str | None = None  # branch, tag or commit; None: the main branch
    data_dir: str | None = None
    data_files: str | None = None
    train_split: str = "train"
    eval_split: str | None = "test"  # None: hold out ``eval_share`` of the training split
    eval_share: float = 0.1
    columns: Columns | None = None  # columns of the hub's rows; None: those of the task


@dataclass
class TaskSource:
    """One task of a sequence."""

    domain: str = ""  # what the task is about, for tables and reports
    columns: Columns = field(default_factory=Columns)  # columns of the rows under ``data.root``
    hub: HubSource | None = None
    of: str | None = None  # the task whose rows this one reads, with that one's columns and hub; None: its own
    part: list[float] = field(default_factory=lambda: [0.0, 1.0])  # from where to where of the usable training rows


LONGEST_NAME = 180
"""Characters of a task's name: folders' names have more in them, and end at 200."""


@dataclass
class SequenceOptions:
    """``sequence.*``: the tasks, in the order in which the model meets them."""

    name: str = MISSING
    tasks: list[str] = MISSING
    sources: dict[str, TaskSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("sequence.name", self.name)
        for task in self.tasks:
            check_name("sequence.tasks", task)
            if len(task) > LONGEST_NAME:
                raise UserError(f"sequence.tasks: the name {task[:20]}… has {len(task)} characters; at most {LONGEST_NAME}")
        for task, source in self.sources.items():
            check_name("sequence.sources", task)
            check_name(f"sequence.sources.{task}.of", source.of or task)
