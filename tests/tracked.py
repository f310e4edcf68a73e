"""What sinks wrote, read back from their files."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7


def wandb_records(folder: Path) -> list[Any]:
    """The records of every offline wandb run below a run directory, in order; all of them have ended.

    wandb writes from a process of its own: a file is whole when it holds the record of the run's exit.
    """
    found: list[Any] = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        deadline = time.monotonic() + 20
        while not any(record.HasField("exit") for record in _records(path)):
            assert time.monotonic() < deadline, f"{path}: has not ended"
            time.sleep(0.1)
        found += _records(path)
    return found


def _records(path: Path) -> Iterator[Any]:
    """A log of LevelDB's form behind a few bytes of its own.

    Blocks of 32 KiB hold pieces of records: checksum (4 bytes), length (2), kind (1: 1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    data, place, held = path.read_bytes(), FILE_HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4) and place <= len(data):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Every call of ``log``: its values by name, those of media as wandb describes them."""
    records = [record for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [_values(record.history.item) for record in records]


def _values(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        name, *inner = item.nested_key or [item.key]
        place, key = found, name
        for deeper in inner:
            place, key = place.setdefault(key, {}), deeper
        place[key] = json.loads(item.value_json)
    return found


def tensorboard_events(folder: Path) -> Any:
    """What TensorBoard would show of a run directory, everything kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(folder / "tensorboard"), sizes)
    events.Reload()
    return events


def csv_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.csv`` as ``metrics.jsonl`` has them: numbers as numbers, empty cells left out."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [
            {k: v if k in ("task", "stage") else json.loads(v) for k, v in row.items() if v} for row in csv.DictReader(file)
        ]


def step_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of kind "step" of ``metrics.jsonl``, without what is null."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "kind" and v is not None} for row in rows if row["kind"] == "step"]
