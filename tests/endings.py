"""What two runs that should have come to the same end have come to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lifealign.memory.bank import read_ledger, read_update

Tensors = Mapping[str, torch.Tensor]

WHEN = ("date", "seal")  # of an entry of the ledger: when it was made, and a hash that covers this
SPEED = ("pairs_per_second", "tokens_per_second")


def differences(run: Path, expected: Path) -> list[str]:
    """What differs in any bit between two finished runs of the same command, dates and speeds left out."""
    found = []
    for folder in ("adapter", *(f"tasks/{path.name}/adapter" for path in sorted((expected / "tasks").iterdir()))):
        if not equal(weights(run / folder), weights(expected / folder)):
            found.append(folder)
    for file in ("scores.json", *(f"tasks/{path.name}/predictions.jsonl" for path in sorted((expected / "tasks").iterdir()))):
        if (run / file).read_text() != (expected / file).read_text():
            found.append(file)
    if rows(run) != rows(expected):
        found.append("metrics.jsonl")
    return [*found, *memory_differences(run / "memory", expected / "memory")]


def memory_differences(folder: Path, expected: Path) -> list[str]:
    """Entries of the ledger, with what happened to each factor, and every tensor of every update."""
    ours, theirs = ([{k: v for k, v in entry.items() if k not in WHEN} for entry in read_ledger(f)] for f in (folder, expected))
    if ours != theirs:
        return ["memory/ledger.json"]
    return [
        f"memory/{entry['name']}"
        for entry in ours
        if not equal(read_update(folder, entry), read_update(expected, entry))  # type: ignore[arg-type]
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that an adapter's folder holds."""
    return {f"{path.name}/{key}": t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def equal(left: Tensors, right: Tensors) -> bool:
    """Same names and dtypes, and no bit apart; nothing is equal to nothing at all, which nobody meant to compare."""
    same = left.keys() == right.keys() and bool(left)
    return same and all(t.dtype == right[name].dtype and t.equal(right[name]) for name, t in left.items())


def rows(run: Path) -> list[dict[str, Any]]:
    """Every logged line."""
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in SPEED} for row in logged]


def distance(found: Tensors, expected: Tensors) -> float:
    """Frobenius norm of the difference over all tensors, as a share of that of ``expected``."""
    assert found.keys() == expected.keys()
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (off / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5
