"""Short-to-Long Memory Consolidation of all factors of an adapter, sharded over ranks.

Each factor belongs to one rank, which alone keeps its history and refines its updates. Factors of one shape go through
one batched call. What a rank computes depends on its factors alone, so the result does not depend on how many ranks
there are, beyond the rounding of differently batched products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from lifealign.memory.subspace import Basis, rescale_history, truncate
from lifealign.runtime import distributed

Factors = dict[str, torch.Tensor]


def assign_owners(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, int]:
    """Rank of each factor: the costliest first, each to the rank with the least to do so far.

    Cost is that of the Gram product, long side times the square of the short one, which dominates both steps.
    """
    cost = {name: shape.numel() * min(shape) for name, shape in shapes.items()}
    load = [0] * ranks
    owners = {}
    for name in sorted(cost, key=lambda n: (-cost[n], n)):
        owners[name] = load.index(min(load))
        load[owners[name]] += cost[name]
    return owners


class Consolidator:
    """Refines the updates of the factors that this rank owns, and remembers them.

    Args:
        shapes: whole shape of every factor of the adapter.
        energy: theta, share of an update's squared norm that truncation keeps.
        scale: lambda, factor on what lies in the span of history.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], *, energy: float, scale: float) -> None:
        self.energy, self.scale = energy, scale
        self.owners = assign_owners(shapes, distributed.world_size())
        groups: dict[torch.Size, list[str]] = defaultdict(list)
        for name, shape in shapes.items():
            if self.owners[name] == distributed.rank():
                groups[shape].append(name)
        self._groups = [(names, Basis(len(names), shape.numel())) for shape, names in groups.items()]

    @property
    def owned(self) -> set[str]:
        """Names of the factors that this rank refines."""
        return {name for names, _ in self._groups for name in names}

    def consolidate(self, updates: Mapping[str, torch.Tensor]) -> tuple[Factors, list[dict[str, Any]]]:
        """Denoise and refine the owned updates, and let the results join the history.

        Returns:
            the refined updates by name, and for every factor of every rank a record of what happened to it.

        Raises:
            ValueError: on every rank, naming the factor, where an update is not finite. The raw update is never passed on.
        """
        _check_finite(updates)
        refined: Factors = {}
        records: list[dict[str, Any]] = []
        for names, basis in self._groups:
            stacked = torch.stack([updates[name] for name in names])
            short_term = truncate(stacked, self.energy)
            long_term = rescale_history(short_term.update, basis, self.scale)
            basis.extend(long_term.update.flatten(1))
            refined |= zip(names, long_term.update, strict=True)
            columns = {
                "factor": names,
                "kept_rank": short_term.kept_rank.tolist(),
                "kept_energy": short_term.kept_energy.tolist(),
                "history_share": long_term.history_share.tolist(),
                "update_norm": stacked.double().flatten(1).norm(dim=1).tolist(),
                "refined_norm": long_term.update.double().flatten(1).norm(dim=1).tolist(),
            }
            records += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        everywhere = [record for share in distributed.gather_objects(records) for record in share]
        return refined, sorted(everywhere, key=lambda record: record["factor"])

    def remember(self, refined: Mapping[str, torch.Tensor]) -> None:
        """Let refined updates of an earlier run join the history, in the order in which they were made.

        Raises:
            ValueError: on every rank, naming the factor, where an update is not finite.
        """
        _check_finite(refined)
        for names, basis in self._groups:
            basis.extend(torch.stack([refined[name] for name in names]).flatten(1))


def _check_finite(updates: Mapping[str, torch.Tensor]) -> None:
    """All ranks learn of a bad factor on any of them: none may wait for one that has stopped."""
    own = [name for name, update in updates.items() if not torch.isfinite(update).all()]
    bad = [name for share in distributed.gather_objects(own) for name in share]
    if bad:
        raise ValueError(f"consolidation: the update of {bad[0]} is not finite")
