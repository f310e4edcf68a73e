"""Writing to disk so that a reader, or a run that starts again, never sees half a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lifealign.errors import UserError, library_line, yaml_line

Seal = dict[str, Any]
"""Of a file: ``bytes``, its size, and ``sha256``."""


def file_seal(path: Path) -> Seal:
    """What a file holds now; OSError where it cannot be read."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def check_writable(folder: Path, key: str) -> None:
    """Make a folder, and see that files can be written into it; for whoever is about to work for hours towards them.

    Raises:
        UserError: naming ``key``, where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written ({error.strerror}); name another folder") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def copy_file(source: Path, target: Path) -> None:
    """As :func:`write_bytes`, with what another file holds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    with open(source, "rb") as read, open(beside, "wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
    os.replace(beside, target)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`; NaN and infinity, which are not JSON, are refused."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What :func:`write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json_lines(path: Path, rows: list[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028, which may stand in a text
    return [json.loads(line) for line in lines if line]


def read_yaml(path: Path) -> Any:
    """Plain values. Raises UserError where it cannot be read, or has more than those: a tag that would call something."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(yaml_line(error, str(path))) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except (ValueError, TypeError, RecursionError) as error:  # a date that is none, a key that cannot be one, nesting
        raise UserError(f"{path}: not YAML of plain values ({library_line(error)})") from error


def numbered_folders(folder: Path) -> list[Path]:
    """Those below ``folder`` that are named NUMBER_NAME, by number: 11 comes before 100. None where there is no folder."""
    found = [path for path in folder.glob("[0-9]*_*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("_")[0]))


def flush_folder(folder: Path) -> None:
    """Flush every file below a folder, and the folder's own entries, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """An empty folder beside ``to``, which takes its name once it is full; where anything fails nothing of it is left.

    Raises:
        UserError: where it cannot be made, or not be put in its place.
    """
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))  # nobody else's, whatever lies there
    try:
        new = beside / to.name  # with the permissions that folders have, which that of mkdtemp has not
        with writing(to):
            new.mkdir()
        yield new
        with writing(to):
            flush_folder(new)
            os.rename(new, to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def writing(to: Path) -> Iterator[None]:
    """Inside, what cannot be written, as on a disk that is full, is told in one line with the option that named the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or library_line(error)
        raise UserError(f"--to {to}: cannot be written ({reason})") from error


def replace_folder(new: Path, old: Path) -> None:
    """Put a finished folder in the place of another; what was there is removed only after the new one stands.

    Between two renames nothing stands there: who is killed then leaves the old one as ``NAME.retired``.
    """
    flush_folder(new)
    retired = old.with_name(old.name + ".retired")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)
