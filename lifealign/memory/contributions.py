"""What each task put into an adapter, read from its ledger: how much, and how it stands to what others put in."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lifealign.memory.bank import Entry, read_update
from lifealign.memory.product import LEFT, RIGHT, Product, inner


@dataclass(frozen=True)
class Summary:
    """Figures of some factors of an entry together; shares are of their energy, None where nothing was consolidated."""

    norm: float  # of what joined the adapter
    update_norm: float  # of what training changed
    kept_rank: float | None  # mean over factors
    kept_energy: float | None
    history_share: float | None  # of the denoised update, in the span of the past


def summarise(records: Sequence[dict[str, Any]]) -> Summary:
    """Energies add up over factors, so shares are weighed by them."""
    energies = [record["update_norm"] ** 2 for record in records]
    norm = math.hypot(*(record["refined_norm"] for record in records))
    update_norm = math.sqrt(math.fsum(energies))
    if any("kept_rank" not in record for record in records):
        return Summary(norm, update_norm, None, None, None)
    kept = [energy * record["kept_energy"] for energy, record in zip(energies, records, strict=True)]
    known = [energy * record["history_share"] for energy, record in zip(kept, records, strict=True)]
    rank = sum(record["kept_rank"] for record in records) / len(records)
    return Summary(norm, update_norm, rank, _share(kept, energies, 1.0), _share(known, kept, 0.0))


def _share(part: Sequence[float], whole: Sequence[float], of_nothing: float) -> float:
    return math.fsum(part) / math.fsum(whole) if math.fsum(whole) else of_nothing


def by_layer(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each layer's factors, by its name in the model; layer 10 comes after layer 9."""
    layers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        layers[re.sub(r"^base_model\.model\.|\.lora_.*$", "", record["factor"])].append(record)
    return dict(sorted(layers.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def tasks_of(entries: Sequence[Entry]) -> list[str]:
    """Names of the tasks, in the order in which they first came."""
    return list(dict.fromkeys(entry["task"] for entry in entries))


def cosines(folder: Path, entries: Sequence[Entry]) -> torch.Tensor:
    """Cosine between what each two tasks added, all factors together; (tasks, tasks) float64, NaN for a task of nothing."""
    tasks = tasks_of(entries)
    belongs = torch.tensor([[float(entry["task"] == task) for task in tasks] for entry in entries], dtype=torch.float64)
    gram = belongs.T @ sum(_grams(folder, entries), torch.zeros(len(entries), len(entries))).double() @ belongs
    lengths = gram.diagonal().clamp(min=0).sqrt()
    return (gram / (lengths * lengths[:, None])).clamp(-1, 1)


def _grams(folder: Path, entries: Sequence[Entry]) -> Iterator[torch.Tensor]:
    """Inner products of all entries' updates of a factor, one factor after the other, never more than one in memory."""
    for name in entries[0]["tensors"] if entries else ():
        if name.endswith(LEFT):
            left, right = _read(folder, entries, name), _read(folder, entries, name.removesuffix(LEFT) + RIGHT)
            products = [Product(*parts) for parts in zip(left, right, strict=True)]
            yield torch.stack([torch.stack([inner(a, b) for b in products]) for a in products])
        elif not name.endswith(RIGHT):
            flat = torch.stack([update.flatten() for update in _read(folder, entries, name)])
            yield flat @ flat.T


def _read(folder: Path, entries: Sequence[Entry], name: str) -> list[torch.Tensor]:
    """A tensor of every entry, float64."""
    return [read_update(folder, entry, name.__eq__)[name].double() for entry in entries]
