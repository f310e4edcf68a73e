"""Where numbers go: ``metrics.jsonl`` in the run directory, and wandb as its mirror. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lifealign.runtime import distributed
from lifealign.runtime.files import read_json, write_json
from lifealign.runtime.options import TrackingMode, TrackingOptions


class Tracker:
    """Appends rows to ``metrics.jsonl`` and sends their numbers to wandb; does nothing on ranks other than 0.

    wandb's run id is kept in ``tracking.json``, so that a resumed run continues the same wandb run.
    """

    def __init__(self, options: TrackingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        self._file = None
        self._wandb = None
        if not distributed.is_main():
            return
        self._file = open(  # noqa: SIM115  closed by __exit__
            folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1
        )
        if options.mode is not TrackingMode.disabled:
            self._wandb = _start_wandb(options, folder, config)

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write one row; ``kind`` says what it describes: "step", "consolidation", "evaluation".

        A number that is not finite becomes null: JSON has no other way to say it.
        """
        if self._file is None:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, **plain}, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))})

    def position(self) -> int:
        """Length of ``metrics.jsonl`` in bytes, to go back to. Rank 0 only."""
        assert self._file is not None
        self._file.flush()
        return self._file.tell()

    def rewind(self, position: int) -> None:
        """Forget the rows that an interrupted run wrote after its last checkpoint; they will be written again."""
        if self._file is not None:
            self._file.truncate(position)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _start_wandb(options: TrackingOptions, folder: Path, config: Mapping[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # slow to import, and needed by one rank of a tracked run only

    kept = folder / "tracking.json"
    if not kept.exists():
        write_json(kept, {"wandb_id": secrets.token_hex(4)})
    return wandb.init(
        mode=options.mode.value,
        project=options.project,
        group=options.group,
        name=folder.name,
        id=read_json(kept)["wandb_id"],
        resume="allow" if options.mode is TrackingMode.online else None,
        dir=str(folder),
        config=dict(config),
        settings=wandb.Settings(console="off", silent=True),
    )
