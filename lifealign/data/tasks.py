"""The tasks of a sequence, in its order: rows found, checked, tokenised."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Task:
    """One preference domain, ready to train and to score on."""

    name: str
    domain: str
    train: list[Pair]
    test: list[Pair]
    dropped: dict[str, int]  # reason -> rows of both files; length reasons only of the rows that were tokenised
    data_hash: str  # sha256 over the canonical rows of ``train`` and ``test``


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
    checked = [_checked(sequence, name, data, root) for name in sequence.tasks]
    return [_task(sequence, name, data, pair_tokenizer, splits) for name, splits in zip(sequence.tasks, checked, strict=True)]


Splits = list[tuple[Rows, list[Preference], Counter[str]]]  # training, then held-out


def _checked(sequence: SequenceOptions, name: str, data: DataOptions, root: Path | None) -> Splits:
    source = sequence.sources.get(name) or TaskSource()
    if root is not None:
        columns, splits = source.columns, read_task(root, name)
    else:
        assert source.hub is not None  # _check_names has seen to it
        columns, splits = source.hub.columns or source.columns, read_hub(source.hub)
    _check_columns(columns, name)
    return [(rows, *read_preferences(rows, name, columns, data.max_empty)) for rows in splits]


def _task(sequence: SequenceOptions, name: str, data: DataOptions, tokenizer: PairTokenizer, splits: Splits) -> Task:
    dropped: Counter[str] = Counter()
    pairs, used = [], []
    for (rows, preferences, counts), limit in zip(splits, (data.max_train, data.max_eval), strict=True):
        kept, cut = tokenizer.pairs(preferences, limit)
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in cut.items() if count)
            raise UserError(f"{rows.source}: no pair is left after truncation ({reasons}); raise data.max_response_tokens")
        for part in (counts, cut):
            dropped.update(part)
        pairs.append(kept)
        used.append(_used(preferences, kept))
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
        raise UserError(f"sequence.tasks names '{doubled[0]}' twice; a task can be met once (copy its folder to meet it again)")


def _check_names(sequence: SequenceOptions, root: Path | None) -> None:
    """Each task must have a source in the sequence or a folder; from the hub, a hub name."""
    known = {str(name) for name in sequence.sources} | set(task_folders(root) if root is not None else ())
    for name in sequence.tasks:
        if name not in known:
            raise UserError(f"sequence.tasks: unknown task '{name}'{did_you_mean(name, known)}")
        if root is None and sequence.sources[name].hub is None:
            raise UserError(
                f"data.hub=true, but sequence.sources.{name}.hub names no data set; add its path, "
                f"or give files with data.hub=false data.root=FOLDER"
            )


def _check_columns(columns: Columns, task: str) -> None:
    if (columns.responses is None) != (columns.preferred is None) or (columns.responses and len(columns.responses) != 2):
        raise UserError(f"sequence.sources.{task}: columns.responses (two columns) and columns.preferred go together")
