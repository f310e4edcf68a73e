"""The tasks of a sequence, in its order: rows found, checked, tokenised."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lifealign.data.files import read_task, task_folders
from lifealign.data.hub import read_hub
from lifealign.data.options import Columns, DataOptions, SequenceOptions, TaskSource
from lifealign.data.rows import Rows
from lifealign.data.rules import read_preferences
from lifealign.data.schema import Preference
from lifealign.data.tokenize import Pair, PairTokenizer
from lifealign.errors import UserError, did_you_mean

HELD_OUT = "prompt is held out"
"""Reason for which a training row is dropped: it would teach what a held-out one asks."""


@dataclass(frozen=True)
class Task:
    """One preference domain, ready to train and to score on."""

    name: str
    domain: str
    train: list[Pair]
    test: list[Pair]
    dropped: dict[str, int]  # reason -> rows of both files; length reasons only of the rows that were tokenised
    data_hash: str  # sha256 over the canonical rows of ``train`` and ``test``


def seen_prompts(tasks: Sequence[Task]) -> list[int]:
    """For each task its held-out pairs whose prompt stands in a training pair of any of them: data sets that split by row have
    some, and tasks that come back."""
    trained = {tuple(pair.prompt) for task in tasks for pair in task.train}
    return [sum(tuple(pair.prompt) in trained for pair in task.test) for task in tasks]


def load_tasks(sequence: SequenceOptions, data: DataOptions, tokenizer: Any, bundled_root: Path) -> list[Task]:
    """Every task of ``sequence``, in order.

    ``bundled_root`` is the folder of the demonstration set, read where neither ``data.root`` nor ``data.hub`` is given.
    Every row of every file is checked before the first is tokenised.

    Raises:
        UserError: anything wrong with the options, the files or their rows, in one line.
    """
    _check_options(sequence, data)
    pair_tokenizer = PairTokenizer(tokenizer, data.max_prompt_tokens, data.max_response_tokens)
    root = None if data.hub else Path(data.root) if data.root is not None else bundled_root
    _check_names(sequence, root)
    tasks = {name: _checked(sequence, name, data, root) for name in sequence.tasks}
    if data.tuning_pairs:
        tasks = _set_aside(sequence, data, pair_tokenizer, tasks)
    return [_task(sequence, name, data, pair_tokenizer, splits) for name, splits in tasks.items()]


@dataclass(frozen=True)
class _Split:
    """What a task has of one split, before tokens."""

    rows: Rows
    preferences: list[Preference]  # usable ones
    dropped: Counter[str]  # of the whole file

    def without(self, other: _Split) -> _Split:
        """The split less the rows that ``other`` has of the same source, and less others with the prompt of one of them."""
        if self.rows.source != other.rows.source:
            return self
        taken = {_prompt(preference) for preference in other.preferences}
        return replace(self, preferences=[p for p in self.preferences if _prompt(p) not in taken])


_Splits = tuple[_Split, _Split]  # training, then held-out


def _prompt(preference: Preference) -> str:
    return json.dumps(preference.prompt)


def _checked(sequence: SequenceOptions, name: str, data: DataOptions, root: Path | None) -> _Splits:
    task = sequence.sources.get(name) or TaskSource()
    owner = task.of or name
    source = sequence.sources.get(owner) or TaskSource()
    if root is not None:
        columns, splits = source.columns, read_task(root, owner)
    else:
        assert source.hub is not None  # _check_names has seen to it
        columns, splits = source.hub.columns or source.columns, read_hub(source.hub)
    _check_columns(columns, owner)
    train, test = (_Split(rows, *read_preferences(rows, name, columns, data.max_empty)) for rows in splits)
    if train.rows.source == test.rows.source:  # rows were held out of one split, which may hold several of one prompt
        left = train.without(test).preferences
        if not left:
            raise UserError(
                f"{train.rows.source}: every prompt is held out, so nothing is left to train on; give a smaller hub.eval_share"
            )
        gone = len(train.preferences) - len(left)
        train = replace(train, preferences=left, dropped=Counter({**train.dropped, HELD_OUT: gone}))
    return replace(train, preferences=_part(train, name, task.part)), test


def _part(train: _Split, name: str, part: Sequence[float]) -> list[Preference]:
    """Usable training rows from one share to another; parts that meet share no row and leave none out."""
    start, end = (round(share * len(train.preferences)) for share in part)
    if start == end:
        raise UserError(
            f"sequence.sources.{name}.part={list(part)}: none of the {len(train.preferences)} usable rows of "
            f"{train.rows.source} lies in it; make it wider"
        )
    return train.preferences[start:end]


def _set_aside(
    sequence: SequenceOptions, data: DataOptions, tokenizer: PairTokenizer, tasks: Mapping[str, _Splits]
) -> dict[str, _Splits]:
    """The tasks with the tuning slice taken out of all that is trained on; where it is asked for, its task is scored on it."""
    name = data.tuning_task or sequence.tasks[0]
    aside = _tuning_slice(name, data, tokenizer, tasks[name][0])
    left = {task: (train.without(aside), test) for task, (train, test) in tasks.items()}
    emptied = [task for task, (train, _) in left.items() if not train.preferences]
    if emptied:
        raise UserError(f"data.tuning_pairs={data.tuning_pairs}: no training row of task '{emptied[0]}' is left; give fewer")
    if data.tuning:
        left[name] = (left[name][0], aside)
    return left


def _tuning_slice(name: str, data: DataOptions, tokenizer: PairTokenizer, train: _Split) -> _Split:
    """The pairs behind those that are trained on: of the first max_train + tuning_pairs usable ones, the last tuning_pairs."""
    limit = None if data.max_train is None else data.max_train + data.tuning_pairs
    kept, _ = tokenizer.pairs(train.preferences, limit)
    if len(kept) <= data.tuning_pairs:
        raise UserError(
            f"data.tuning_pairs={data.tuning_pairs}: task '{name}' has {len(kept)} usable training pairs, which leaves none to "
            f"train on; give fewer, or another data.tuning_task"
        )
    return _Split(train.rows, _used(train.preferences, kept[-data.tuning_pairs :]), Counter())


def _task(sequence: SequenceOptions, name: str, data: DataOptions, tokenizer: PairTokenizer, splits: _Splits) -> Task:
    dropped: Counter[str] = Counter()
    pairs, used = [], []
    for split, limit in zip(splits, (data.max_train, data.max_eval), strict=True):
        kept, cut = tokenizer.pairs(split.preferences, limit)
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in cut.items() if count)
            raise UserError(
                f"{split.rows.source}: no pair is left after truncation ({reasons}); raise data.max_response_tokens"
            )
        for part in (split.dropped, cut):
            dropped.update(part)
        pairs.append(kept)
        used.append(_used(split.preferences, kept))
    source = sequence.sources.get(name) or TaskSource()
    return Task(name, source.domain or name, pairs[0], pairs[1], dict(dropped), data_hash(used))


def _used(preferences: Sequence[Preference], pairs: Sequence[Pair]) -> list[Preference]:
    ids = {pair.id for pair in pairs}
    return [preference for preference in preferences if preference.id in ids]


def data_hash(splits: Iterable[Sequence[Preference]]) -> str:
    """sha256 of the preferences of all splits: ids, turns and texts, in order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"split of {len(split)}\n".encode())
        for row in split:
            digest.update(json.dumps([row.id, row.prompt, row.chosen, row.rejected], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _check_options(sequence: SequenceOptions, data: DataOptions) -> None:
    if data.root is not None and data.hub:
        raise UserError(f"data.root={data.root} and data.hub=true exclude each other; drop one of them")
    if not sequence.tasks:
        raise UserError("sequence.tasks is empty; name at least one task")
    doubled = [name for name, count in Counter(sequence.tasks).items() if count > 1]
    if doubled:
        again = f"{doubled[0]}_again"
        raise UserError(
            f"sequence.tasks names '{doubled[0]}' twice; to meet it again, name '{again}' and say "
            f"sequence.sources.{again}.of={doubled[0]}"
        )
    if data.tuning_pairs and data.tuning_task is not None and data.tuning_task not in sequence.tasks:
        raise UserError(
            f"data.tuning_task={data.tuning_task}: no task of this sequence{did_you_mean(data.tuning_task, sequence.tasks)}"
        )


def _check_names(sequence: SequenceOptions, root: Path | None) -> None:
    """Each task must have a source in the sequence or a folder; from the hub, a hub name."""
    known = {str(name) for name in sequence.sources} | set(task_folders(root) if root is not None else ())
    for name in sequence.tasks:
        if name not in known:
            raise UserError(f"sequence.tasks: unknown task '{name}'{did_you_mean(name, known)}")
        source = sequence.sources.get(name) or TaskSource()
        _check_source(name, source, sequence, known)
        owner = source.of or name
        if root is None and sequence.sources[owner].hub is None:
            raise UserError(
                f"data.hub=true, but sequence.sources.{owner}.hub names no data set; add its path, "
                f"or give files with data.hub=false data.root=FOLDER"
            )


def _check_source(name: str, source: TaskSource, sequence: SequenceOptions, known: Collection[str]) -> None:
    """A part must be a part, and rows of another task must be that task's own."""
    key = f"sequence.sources.{name}"
    if len(source.part) != 2 or not 0 <= source.part[0] < source.part[1] <= 1:
        raise UserError(f"{key}.part={list(source.part)}: must be [from, to] with 0 <= from < to <= 1")
    if source.of is None:
        return
    if source.of not in known or source.of == name:
        raise UserError(f"{key}.of={source.of}: no other task{did_you_mean(source.of, {*known} - {name})}")
    if (owner := sequence.sources.get(source.of)) and owner.of is not None:
        raise UserError(f"{key}.of={source.of}: that one has no rows of its own; say of={owner.of}")
    if source.columns != Columns() or source.hub is not None:
        raise UserError(f"{key}: columns and hub are those of '{source.of}', whose rows it reads; drop them here")


def _check_columns(columns: Columns, task: str) -> None:
    if (columns.responses is None) != (columns.preferred is None) or (columns.responses and len(columns.responses) != 2):
        raise UserError(f"sequence.sources.{task}: columns.responses (two columns) and columns.preferred go together")
