"""The long-term memory on disk: a ledger of entries, and the update that each of them added to the adapter.

    memory/ledger.json                          what each entry is, and hashes
    memory/000_TASK_STAGE/details.json          what happened to each factor, and the hash of each tensor
    memory/000_TASK_STAGE/shard-R.safetensors   the updates that rank R owned, in the dtype of memory

An adapter is its initial value plus the sum of all entries. What stands here is what resuming, scaling and reverting go by.
So every tensor and every file of details is read against its hash, and each entry is sealed with a hash over itself and the
seal of the entry before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lifealign.errors import UserError, check_name
from lifealign.runtime import distributed
from lifealign.runtime.files import Seal, file_seal, flush_folder, read_json, write_json
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)

Entry = dict[str, Any]


def read_ledger(folder: Path) -> list[Entry]:
    """The entries of a memory folder with their ``tensors`` and ``factors``, oldest first; none where there is no ledger.

    Raises:
        UserError: where it cannot be read, or is not what was written.
    """
    return [{**entry, **_read_details(folder, entry)} for entry in _read_entries(folder)]


def _read_entries(folder: Path) -> list[Entry]:
    ledger = folder / "ledger.json"
    if not ledger.exists():
        return []
    try:
        entries, seal = read_json(ledger)["entries"], ""
        for entry in entries:
            if "seal" not in entry:
                raise UserError(f"{ledger}: written by an earlier version of LifeAlign, which kept no hashes")
            seal = _seal(entry, seal)
            if entry["seal"] != seal:
                raise UserError(f"{ledger}: entry {entry['name']} is not what was written; take it from a copy of the run")
            check_name(f"{ledger}: name", entry["name"])  # of a folder: whoever seals it anew leads nobody elsewhere
            if not isinstance(entry["hashes"]["details"], str):
                raise TypeError("hashes")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{ledger}: not a ledger ({error}); take it from a copy of the run") from error
    return entries


def _read_details(folder: Path, entry: Entry) -> dict[str, Any]:
    path = folder / entry["name"] / "details.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); take it from a copy of the run") from error
    if hashlib.sha256(content).hexdigest() != entry["hashes"]["details"]:
        raise UserError(f"{path}: is not what was written; take it from a copy of the run")
    try:
        details = json.loads(content)
        return {"tensors": dict(details["tensors"]), "factors": list(details["factors"])}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the details of an entry ({error}); take it from a copy of the run") from error


def read_update(folder: Path, entry: Entry, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of an entry that are ``wanted``, whichever rank wrote them.

    Raises:
        UserError: where one is missing, or is not what was written.
    """
    where, found = folder / entry["name"], {}
    for shard in sorted(where.glob("shard-*.safetensors")):
        try:
            with safe_open(shard, "pt") as file:
                names = [name for name in file.keys() if name in entry["tensors"] and wanted(name)]  # noqa: SIM118
                found |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: cannot be read ({error}); take it from a copy of the run") from error
    for name, expected in entry["tensors"].items():
        if wanted(name) and (name not in found or _digest(found[name]) != expected):
            state = "is not what was written" if name in found else "is missing"
            raise UserError(f"{where}: {name} {state}; take the folder from a copy of the run")
    return found


class MemoryBank:
    """Entries of one run, oldest first, without their details. Every method is called on every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.files: dict[str, Seal] = {}  # of the entries; by their paths in the run directory, which holds ``folder``

    def append(
        self,
        about: Mapping[str, Any],
        update: Mapping[str, torch.Tensor],
        records: Sequence[Mapping[str, Any]],
        hashes: Mapping[str, str],
    ) -> None:
        """Write this rank's part of an update; the entry counts once the ledger names it.

        Args:
            about: what made it; ``task`` and ``stage`` are part of its name.
            update: this rank's tensors.
            records: what happened to each factor of all ranks.
            hashes: of the data and the configuration that made it; that of the update is added here.
        """
        name = f"{len(self.entries):03d}_{about['task']}_{about['stage']}"
        where = self.folder / name
        with distributed.failing_together(OSError):
            if distributed.is_main():
                shutil.rmtree(where, ignore_errors=True)  # left by a run that stopped before it was counted
                where.mkdir(parents=True)
        shard = where / f"shard-{distributed.rank()}.safetensors"
        with distributed.failing_together(OSError, SafetensorError):
            save_file(dict(update), shard)
            own = self._path(shard), file_seal(shard)
        shards = distributed.gather_objects(own)
        shares = distributed.gather_objects({key: _digest(tensor) for key, tensor in update.items()})
        details = {"tensors": dict(sorted(item for share in shares for item in share.items())), "factors": list(records)}
        content = json.dumps(details, indent=1, allow_nan=False).encode()
        entry = {
            "name": name,
            **about,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hashes": {
                "update": _combined(details["tensors"]),
                **hashes,
                "details": hashlib.sha256(content).hexdigest(),
            },
        }
        entry["seal"] = _seal(entry, self.entries[-1]["seal"] if self.entries else "")
        entry = distributed.broadcast_object(entry)  # one date
        self.entries.append(entry)
        with distributed.failing_together(OSError):
            if distributed.is_main():
                (where / "details.json").write_bytes(content)
                flush_folder(where)
                self._write_ledger()
        of_details = {"bytes": len(content), "sha256": entry["hashes"]["details"]}
        self.files |= {**dict(shards), self._path(where / "details.json"): of_details}

    def load(self, entries: Sequence[Entry], files: Mapping[str, Seal]) -> list[Entry]:
        """Take up what :attr:`entries` and :attr:`files` were, and forget later entries; returns the entries with their
        tensors' hashes. The ledger is written anew from them, with a line that says so where it was damaged.

        Raises:
            UserError: where the details of an entry are missing or not what was written.
            OSError: on every rank, where the ledger cannot be written.
        """
        self.entries, self.files = list(entries), dict(files)
        with distributed.failing_together(OSError):
            if distributed.is_main():
                if not self._ledger_agrees():
                    line = f"{self.folder.name}/ledger.json is not what was written; written again from the checkpoint"
                    log.warning(line)
                    console.print(line, markup=False)
                self._write_ledger()
        return [{**entry, "tensors": _read_details(self.folder, entry)["tensors"]} for entry in self.entries]

    def _ledger_agrees(self) -> bool:
        """Whether the ledger begins with these entries; it may name later ones, of a run that was ended before it saved."""
        try:
            return _read_entries(self.folder)[: len(self.entries)] == self.entries
        except UserError:
            return False

    def _path(self, file: Path) -> str:
        return file.relative_to(self.folder.parent).as_posix()

    def _write_ledger(self) -> None:
        write_json(self.folder / "ledger.json", {"entries": self.entries})


def _seal(entry: Entry, before: str) -> str:
    """sha256 over an entry and the seal of the one before it: what is changed, moved or left out later on is noticed, but
    for entries that are missing at the end."""
    content = json.dumps({key: value for key, value in entry.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(f"{before}\n{content}".encode()).hexdigest()


def _combined(tensors: Mapping[str, str]) -> str:
    """sha256 over the hashes of an update's tensors, whichever ranks wrote them."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(tensors.items())).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
