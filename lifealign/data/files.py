"""Rows from a folder: DATA_ROOT/TASK/train.* and test.* or else dev.*, as json, jsonl or parquet."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from lifealign.data.hub import read_parquet
from lifealign.data.rows import Rows
from lifealign.data.turns import RowMistake, describe
from lifealign.errors import UserError, did_you_mean, library_line

MOST_EXPANDED, ANYWAY = 100, 64 << 20
"""How many times its size a packed file may unpack to, and bytes that any may: text packs ten times, a bomb a thousand."""

EXTENSIONS = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz", ".parquet.gz")


def task_folders(root: Path) -> list[str]:
    """Names of the folders under ``root``. Raises UserError where ``root`` is none or is itself a task's folder."""
    if not root.is_dir():
        raise UserError(f"data.root: no folder '{root}' (looked in {Path.cwd()}); give the folder that holds TASK/train.json")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names and _candidates(root, "train"):
        raise UserError(f"data.root: '{root}' is a task's own folder; give the folder above it, '{root.resolve().parent}'")
    if not names:
        raise UserError(f"data.root: '{root}' holds no task's folder; looked for TASK/train.json and the like")
    return names


def read_task(root: Path, task: str) -> tuple[Rows, Rows]:
    """Training and held-out rows of one task. Raises UserError naming what is missing, doubled or unreadable."""
    folder = root / task
    if not folder.is_dir():
        raise UserError(
            f"no folder '{folder}' for task '{task}'{did_you_mean(task, task_folders(root))}; "
            f"give data.root=FOLDER with the task in it, or data=hub"
        )
    return read_rows(find_file(folder, "train")), read_rows(find_file(folder, "test", "dev"))


def find_file(folder: Path, *splits: str) -> Path:
    """The one file of the first split that has one."""
    for split in splits:
        found = _candidates(folder, split)
        if len(found) > 1:
            raise UserError(f"'{folder}' holds {' and '.join(path.name for path in found)}; keep one of them")
        if found:
            return found[0]
    looked_for = ", ".join(f"{split}{extension}" for split in splits for extension in EXTENSIONS)
    raise UserError(f"'{folder}' has no {' or '.join(splits)} file; looked for {looked_for}")


def read_rows(path: Path) -> Rows:
    """Rows of one file. Raises UserError naming the file and the line or row that is not what it should be."""
    split, _, extension = path.name.partition(".")
    lines: list[int] | None = None
    if extension == "parquet":
        items = read_parquet(path)
    elif extension == "parquet.gz":
        items = _read_packed_parquet(path)
    elif extension.startswith("jsonl"):
        items, lines = _read_jsonl(path)
    else:
        items = _read_json(path)
    if not items:
        raise UserError(f"{path}: no rows in this file")
    rows = Rows(str(path), split, items, range(len(items)), lines)
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            raise UserError(f"{rows.where(position)}: a row must be a JSON object; found {describe(item)}")
    return rows


def _read_packed_parquet(path: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / path.stem
        unpacked.write_bytes(_read_bytes(path))
        try:
            return read_parquet(unpacked)
        except UserError as error:
            raise UserError(str(error).replace(str(unpacked), str(path))) from error


def _candidates(folder: Path, split: str) -> list[Path]:
    return [path for extension in EXTENSIONS if (path := folder / f"{split}{extension}").is_file()]


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked where it is packed."""
    try:
        raw = path.read_bytes()
        return _decompressed(path, raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a gzip file ({error}); compress it again or drop the .gz") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _decompressed(path: Path, raw: bytes) -> bytes:
    most = max(ANYWAY, MOST_EXPANDED * len(raw))
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: unpacks to more than {MOST_EXPANDED} times its size; give it unpacked, if that is right")
    return content


def _parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONDecodeError: it is none.
        RowMistake: it is one that no row can be: a key that stands twice would be lost, what is nested a thousand times or has
            a number of thousands of digits cannot be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise RowMistake("it is nested too deeply") from error
    except ValueError as error:
        raise RowMistake(library_line(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowMistake(f"an object has the key {twice[:40]!r} twice; keep one")
    return found


def _read_json(path: Path) -> list[Any]:
    text = _read_text(path)
    try:
        value = _parsed(text)
    except RowMistake as error:
        raise UserError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        fix = (
            f"; it looks like JSON Lines: rename it to {path.name.replace('.json', '.jsonl')}"
            if error.msg == "Extra data"
            else ""
        )
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}){fix}") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a JSON array of objects, [{{...}}, {{...}}]; found {describe(value)}")
    return value


def _read_jsonl(path: Path) -> tuple[list[Any], list[int]]:
    """Values and their 1-based lines; blank lines are skipped."""
    items, lines = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # splitlines would also cut at U+2028
        if not line.strip():
            continue
        try:
            items.append(_parsed(line))
        except RowMistake as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
        lines.append(number)
    return items, lines
