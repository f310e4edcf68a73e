"""The long-term memory on disk: a ledger of entries, and the refined update of every factor in each.

    memory/ledger.json                     what each entry is and what happened to its factors
    memory/000_TASK_STAGE/shard-R.safetensors   the refined updates of the factors that rank R owned

An adapter is its initial value plus the sum of all entries.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.runtime.files import flush_folder, read_json, write_json


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The entries of a memory folder, oldest first; none where there is no ledger."""
    ledger = folder / "ledger.json"
    return read_json(ledger)["entries"] if ledger.exists() else []


class MemoryBank:
    """Entries of one run, oldest first. Every method is called on every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []

    def append(self, task: str, stage: str, refined: Mapping[str, torch.Tensor], records: Sequence[Mapping[str, Any]]) -> None:
        """Write this rank's refined updates; the entry counts once the ledger names it."""
        name = f"{len(self.entries):03d}_{task}_{stage}"
        if distributed.is_main():
            shutil.rmtree(self.folder / name, ignore_errors=True)  # left by a run that stopped before it was counted
            (self.folder / name).mkdir(parents=True)
        distributed.barrier()
        shard = self.folder / name / f"shard-{distributed.rank()}.safetensors"
        save_file({k: v.contiguous() for k, v in refined.items()}, shard)
        distributed.barrier()
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.entries.append({"name": name, "task": task, "stage": stage, "date": date, "factors": list(records)})
        if distributed.is_main():
            flush_folder(self.folder / name)
            self._write_ledger()

    def load(self, count: int, names: Collection[str]) -> list[dict[str, torch.Tensor]]:
        """Take up the first ``count`` entries and forget later ones; returns the updates of ``names`` in each.

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
        return [self._read(self.folder / entry["name"], names) for entry in entries]

    def _write_ledger(self) -> None:
        write_json(self.folder / "ledger.json", {"entries": self.entries})

    @staticmethod
    def _read(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
        updates = {}
        for shard in sorted(folder.glob("shard-*.safetensors")):
            with safe_open(shard, "pt") as file:
                updates |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
        return updates
