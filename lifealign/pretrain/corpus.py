"""What a base reads: texts and chats as documents, without anything the tasks train or are scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lifealign.data.files import find_file, read_rows, read_task, task_folders
from lifealign.data.options import Columns, DataOptions
from lifealign.data.rows import Rows
from lifealign.data.rules import read_preferences
from lifealign.data.schema import read_row
from lifealign.data.tokenize import apply_template
from lifealign.data.turns import RowMistake, Turn
from lifealign.errors import UserError

Chat = list[Turn]

ANSWER = Columns(chosen="output", rejected="output")
"""Instruction rows have one answer; their prompt may stand in any form that a task's may."""

TEXT_FILES = (".txt", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


@dataclass
class Corpus:
    """Documents by source. A source is the name of a text file or of a task."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    chats: dict[str, list[Chat]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # chats that open like one of the tasks' rows

    def words(self) -> list[str]:
        """Every text of every document, for the tokenizer."""
        turns = [turn["content"] for chats in self.chats.values() for chat in chats for turn in chat]
        return [text for texts in self.texts.values() for text in texts] + turns


def fingerprint(texts: Sequence[Path], root: Path | None) -> dict[str, dict[str, str]]:
    """SHA-256 of every file that decides what is read, by name: text files, and each task's training and held-out file.

    Raises:
        UserError: a file or folder is not there, two text files have one name, or nothing was given.
    """
    if not texts and root is None:
        raise UserError("nothing to read: give --text FILE, or --root FOLDER with tasks in it")
    hashes: dict[str, dict[str, str]] = {"texts": {}, "tasks": {}}
    for path in texts:
        if not path.name.endswith(TEXT_FILES):
            raise UserError(f"--text {path}: must end in {', '.join(TEXT_FILES)}")
        if not path.is_file():
            raise UserError(f"--text {path}: no such file")
        if path.name in hashes["texts"]:
            raise UserError(f"--text {path}: two files are named '{path.name}'; rename one of them")
        hashes["texts"][path.name] = _sha256(path)
    for folder, task in _tasks(root):
        files = [find_file(folder / task, "train"), find_file(folder / task, "test", "dev")]
        hashes["tasks"].update({f"{task}/{path.name}": _sha256(path) for path in files})
    return hashes


def _tasks(root: Path | None) -> list[tuple[Path, str]]:
    return [] if root is None else [(root, task) for task in task_folders(root)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_corpus(texts: Sequence[Path], root: Path | None, skip_train: int) -> Corpus:
    """Text files, and of every task under ``root`` the chosen side of training rows past the first ``skip_train`` usable ones.

    A chat that opens (the user's first turn) like one of those first rows, or like a held-out row, of whatever task, is left
    out: data sets hold several rows of one prompt, and several lengths of one dialogue.

    Raises:
        UserError: anything wrong with a file or its rows, in one line.
    """
    corpus = Corpus()
    reserved: set[str] = set()
    for folder, task in _tasks(root):
        both = read_task(folder, task)
        train, held_out = (read_preferences(rows, task, Columns(), DataOptions().max_empty)[0] for rows in both)
        reserved |= {_opening(row.prompt) for row in [*train[:skip_train], *held_out]}
        corpus.chats[task] = [[*row.prompt, _assistant(row.chosen)] for row in train[skip_train:]]
    for path in texts:
        _read_text(path, corpus)
    for source, chats in corpus.chats.items():
        corpus.chats[source] = [chat for chat in chats if _opening(chat) not in reserved]
        corpus.left_out[source] = len(chats) - len(corpus.chats[source])
    return corpus


def _opening(turns: Sequence[Turn]) -> str:
    return next(turn["content"] for turn in turns if turn["role"] == "user")


def _read_text(path: Path, corpus: Corpus) -> None:
    """A line of a .txt file is a document; a row of another file is one, under ``text``, or an instruction with its output."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        corpus.texts[path.name] = [line.strip() for line in lines if line.strip()]
        return
    rows = read_rows(path)
    texts = [row["text"].strip() for row in rows.items if isinstance(row.get("text"), str)]
    if len(texts) == len(rows.items):
        corpus.texts[path.name] = [text for text in texts if text]
    else:
        corpus.chats[path.name] = [chat for position in range(len(rows.items)) if (chat := _instruction(rows, position))]


def _instruction(rows: Rows, position: int) -> Chat | None:
    """Row ``position`` as a chat; None where it lacks a question or an answer."""
    try:
        draft = read_row(rows.items[position], ANSWER)
    except RowMistake as mistake:
        raise UserError(f"{rows.where(position)}: {mistake}; a row holds 'text', or 'instruction' and 'output'") from None
    asked = any(turn["role"] == "user" for turn in draft.prompt)
    return [*draft.prompt, _assistant(draft.chosen)] if asked and draft.chosen else None


def _assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block: int, generator: torch.Generator) -> torch.Tensor:
    """All documents in random order, each closed by the padding token, cut into rows: (rows, block) int64.

    What is left over at the end, less than a row, is dropped.
    """
    documents = [text for texts in corpus.texts.values() for text in texts]
    for chats in corpus.chats.values():
        documents += [apply_template(tokenizer, chat) for chat in chats]
    order = torch.randperm(len(documents), generator=generator).tolist()
    ids = tokenizer([documents[i] + tokenizer.pad_token for i in order], verbose=False)["input_ids"]
    stream = torch.tensor([token for document in ids for token in document])
    return stream[: len(stream) // block * block].view(-1, block)
