"""Look at the cache of reference log-probabilities, and empty it.

Imports neither torch nor anything that does, ``lifealign.command`` among it: the answer comes at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lifealign.arguments import ArgumentParser, exit_code
from lifealign.errors import UserError
from lifealign.models.reference_cache import DEFAULT_MAX_MIB, CachedBase, cached_bases, clear, reference_folder

SHORT = 12
"""Digits of a base's hash that are shown."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code: 2 for a mistake, which is told in one line."""
    return exit_code(lambda: _do(arguments))


def _do(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
    if given.dir is not None and not Path(given.dir).expanduser().is_dir():
        raise UserError(f"--dir {given.dir}: no such folder; give the one that cache.dir named")
    folder = reference_folder(given.dir)
    if given.action == "clear":
        _clear(folder, given.base)
    else:
        (_list if given.action == "list" else _size)(folder)


def _parser() -> ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--dir", metavar="DIR", help="what cache.dir was; the default is that of a run")
    parser = ArgumentParser(prog="cache.py", description="The cache of reference log-probabilities.")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=ArgumentParser, metavar="list | size | clear")
    actions.add_parser("list", parents=[where], help="the bases, with pairs, size and when they were last used")
    actions.add_parser("size", parents=[where], help="the size of all of it")
    clearing = actions.add_parser("clear", parents=[where], help="remove all of it, or one base")
    clearing.add_argument("base", nargs="?", metavar="BASE", help="the beginning of a base's hash, as list shows it")
    return parser


def _list(folder: Path) -> None:
    bases = cached_bases(folder)
    console = Console(soft_wrap=True)
    if not bases:
        console.print(f"{folder}: empty", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("Base", "Model", "Dtype", "Device", "Pairs", "Size", "Last used"):
        table.add_column(
            heading,
            justify="right" if heading in ("Pairs", "Size") else "left",
            no_wrap=heading != "Model",  # a path may be long; the rest must stay readable beside it
            overflow="fold",
        )
    for base in bases:
        about = [str(base.about.get(key, "?")) for key in ("model", "dtype", "device")]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(base.last_used))
        table.add_row(base.name[:SHORT], *about, str(base.pairs), readable(base.size), used)
    console.print(table, highlight=False)


def _size(folder: Path) -> None:
    size = sum(base.size for base in cached_bases(folder))
    print(f"{readable(size)} in {folder}; runs keep it below cache.max_mib, by default {readable(DEFAULT_MAX_MIB * 2**20)}")


def _clear(folder: Path, beginning: str | None) -> None:
    bases = cached_bases(folder)
    chosen = bases if beginning is None else [_one(bases, beginning)]
    try:
        clear(folder, None if beginning is None else chosen[0].name)
    except OSError as error:
        raise UserError(f"the cache cannot be cleared: {error}") from error
    print(f"removed {readable(sum(base.size for base in chosen))} from {folder}")


def _one(bases: Sequence[CachedBase], beginning: str) -> CachedBase:
    found = [base for base in bases if base.name.startswith(beginning.lower())]
    if not found:
        raise UserError(f"clear {beginning}: the hash of no base begins like this; `cache.py list` shows those there are")
    if len(found) > 1:
        raise UserError(f"clear {beginning}: the hashes of {len(found)} bases begin like this; give more digits")
    return found[0]


def readable(size: float) -> str:
    """A number of bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
