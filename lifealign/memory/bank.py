"""The long-term memory on disk: a ledger of entries, and the update that each of them added to the adapter.

    memory/ledger.json                          what each entry is, what happened to its factors, and hashes
    memory/000_TASK_STAGE/shard-R.safetensors   the updates that rank R owned, in the dtype of memory

An adapter is its initial value plus the sum of all entries. What stands here is what resuming, scaling and reverting go by,
so every tensor is read against the hash in the ledger.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.runtime.files import flush_folder, read_json, write_json

Entry = dict[str, Any]


def read_ledger(folder: Path) -> list[Entry]:
    """The entries of a memory folder, oldest first; none where there is no ledger.

    Raises:
        UserError: where it cannot be read.
    """
    ledger = folder / "ledger.json"
    if not ledger.exists():
        return []
    try:
        entries = read_json(ledger)["entries"]
        for entry in entries:
            if entry["hashes"]["update"] != _combined(entry["tensors"]):
                raise ValueError(f"the hash of entry {entry['name']} is not that of its tensors")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{ledger}: not a ledger ({error}); take it from a copy of the run") from error
    return entries


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
    """Entries of one run, oldest first. Every method is called on every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []

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
        if distributed.is_main():
            shutil.rmtree(self.folder / name, ignore_errors=True)  # left by a run that stopped before it was counted
            (self.folder / name).mkdir(parents=True)
        distributed.barrier()
        save_file(dict(update), self.folder / name / f"shard-{distributed.rank()}.safetensors")
        shares = distributed.gather_objects({key: _digest(tensor) for key, tensor in update.items()})
        tensors = dict(sorted(item for share in shares for item in share.items()))
        self.entries.append(
            {
                "name": name,
                **about,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "hashes": {"update": _combined(tensors), **hashes},
                "tensors": tensors,
                "factors": list(records),
            }
        )
        if distributed.is_main():
            flush_folder(self.folder / name)
            self._write_ledger()

    def load(self, count: int) -> None:
        """Take up the first ``count`` entries and forget later ones.

        Raises:
            UserError: where the ledger holds fewer.
        """
        entries = read_ledger(self.folder)[:count]
        if len(entries) < count:
            raise UserError(f"{self.folder}: the ledger holds {len(entries)} entries, the checkpoint speaks of {count}")
        self.entries = entries
        distributed.barrier()  # every rank has read the ledger before it is written again
        if distributed.is_main():
            self._write_ledger()

    def _write_ledger(self) -> None:
        write_json(self.folder / "ledger.json", {"entries": self.entries})


def _combined(tensors: Mapping[str, str]) -> str:
    """sha256 over the hashes of an update's tensors, whichever ranks wrote them."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(tensors.items())).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
