"""Short-to-Long Memory Consolidation of all factors of an adapter, sharded over ranks.

Each factor belongs to one rank, which alone keeps its history and refines its updates. What a rank computes depends on its
factors alone, so the result does not depend on how many ranks there are, beyond the rounding of differently batched
products. All of it happens in the host's memory, whatever device the model is on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from lifealign.errors import ConsolidationFailed
from lifealign.memory.basis import Basis, norm, rescale_history
from lifealign.memory.truncation import Denoised, SVDMethod, truncate
from lifealign.runtime import distributed

Factors = dict[str, torch.Tensor]
Record = dict[str, Any]

BATCH_ELEMENTS = 1 << 20
"""Most numbers of an update in one batched call: enough that calls cost little beside their work, and few enough that its
copies cost little memory. A history in bfloat16 is copied as well, at twice its size."""


class Space(StrEnum):
    """What is consolidated: the factors of an adapter each by itself, or their product."""

    factors = "factors"
    product = "product"


@dataclass(frozen=True)
class ConsolidationOptions:
    """How updates become memory; docs/method.md."""

    energy: float = 0.9  # theta, share of an update's squared norm that truncation keeps
    scale: float = 0.5  # lambda, factor on what lies in the span of history
    svd: SVDMethod = SVDMethod.auto
    memory_rank: int | None = None  # most directions of a factor's history; None: no bound
    memory_dtype: torch.dtype = torch.float32  # of what is remembered
    length_only: bool = False  # an update takes the length that refinement gives it, and keeps its own direction


class Consolidated(NamedTuple):
    """What became of a stage, on the rank that owns it."""

    values: Factors  # new value of each owned factor
    update: Factors  # what memory holds of the change; factors by name, or parts of products
    records: list[Record]  # of all ranks' factors, in the order of their names


class Consolidator(ABC):
    """Turns what a stage changed into long-term memory. Methods are called on every rank.

    Args:
        owners: rank of each factor.
    """

    def __init__(self, owners: Mapping[str, int], options: ConsolidationOptions) -> None:
        self.owners, self.options = owners, options

    @property
    def owned(self) -> set[str]:
        """Names of the factors that this rank refines."""
        return {name for name, owner in self.owners.items() if owner == distributed.rank()}

    def consolidate(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Consolidated:
        """Denoise and refine what changed in the owned factors, and let the results join the history.

        Raises:
            ConsolidationFailed: on every rank, naming the factor, where a value is not finite or the linear algebra fails.
                The raw update is never passed on.
        """
        return _on_all_ranks(self._refined(before, after))

    def pass_on(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Consolidated:
        """The change as it is, for a stage that is not consolidated: no history is made of it.

        Raises:
            ConsolidationFailed: as in :meth:`consolidate`.
        """
        return _on_all_ranks(self._raw(before, after))

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether this rank remembers a tensor of this name."""

    @abstractmethod
    def remember(self, update: Mapping[str, torch.Tensor]) -> None:
        """Let an update that was consolidated in an earlier run join the history, in the order in which they were made.

        Raises:
            ValueError: where it is not finite.
        """

    @abstractmethod
    def _refined(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        """What consolidation makes of the owned factors, a portion at a time."""

    @abstractmethod
    def _raw(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        """The change of the owned factors as it is, a portion at a time."""


def _on_all_ranks(portions: Iterator[Consolidated]) -> Consolidated:
    """All portions of this rank, with the records of all ranks; or the same failure on all of them."""
    own, problem = Consolidated({}, {}, []), None
    try:
        for portion in portions:
            own.values.update(portion.values)
            own.update.update(portion.update)
            own.records.extend(portion.records)
    except Exception as error:  # whatever it is, the other ranks wait for this one's records, and must hear of it there
        problem = error
    everywhere = distributed.gather_objects((own.records, None if problem is None else str(problem)))
    failed = next((other for _, other in everywhere if other is not None), None)
    if failed is not None:
        raise ConsolidationFailed(f"consolidation: {failed}") from problem
    records = [record for share, _ in everywhere for record in share]
    return own._replace(records=sorted(records, key=lambda record: record["factor"]))


class FactorConsolidator(Consolidator):
    """The paper's: every A and every B of every adapted layer by itself. Factors of one shape go through one batched call.

    A factor and the transpose of another are of one shape: all are turned so that the short side comes first, which changes
    no singular value and no inner product.

    Args:
        shapes: whole shape of every factor of the adapter.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], options: ConsolidationOptions) -> None:
        super().__init__(assign_owners({name: shape.numel() * min(shape) for name, shape in shapes.items()}), options)
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in shapes:
            if self.holds(name):
                groups[tuple(sorted(shapes[name]))].append(name)
        self._bases: list[tuple[list[str], Basis]] = []
        for shape, names in groups.items():
            many = max(1, BATCH_ELEMENTS // (shape[0] * shape[1]))
            for start in range(0, len(names), many):
                batch = names[start : start + many]
                basis = Basis(len(batch), shape, dtype=options.memory_dtype, limit=options.memory_rank)
                self._bases.append((batch, basis))

    def holds(self, name: str) -> bool:
        return self.owners.get(name) == distributed.rank()

    def remember(self, update: Mapping[str, torch.Tensor]) -> None:
        for names, basis in self._bases:
            basis.extend(torch.stack([_wide(update[name]) for name in names]))

    def _refined(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        for names, basis in self._bases:
            change, lengths = _changes(names, before, after)
            short_term = self._truncated(names, change)
            long_term = rescale_history(short_term.update, basis, self.options.scale)
            refined = of_length(change, long_term.update) if self.options.length_only else long_term.update
            remembered = refined.to(self.options.memory_dtype)
            _join(names, basis, remembered)
            columns = {
                "factor": names,
                "kept_rank": short_term.kept_rank.tolist(),
                "kept_energy": short_term.kept_energy.tolist(),
                "history_share": long_term.history_share.tolist(),
                "update_norm": lengths,
                "refined_norm": norm(remembered.float()).tolist(),
                "merged_energy": basis.merged.tolist(),
                "singular_values": [values[values > 0].tolist() for values in short_term.singular_values],
            }
            records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            yield _integrated(names, before, remembered, records)

    def _raw(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        for names, _ in self._bases:
            change, lengths = _changes(names, before, after)
            records = [
                {"factor": name, "update_norm": length, "refined_norm": length}
                for name, length in zip(names, lengths, strict=True)
            ]
            yield _integrated(names, before, change, records)

    def _truncated(self, names: Sequence[str], change: torch.Tensor) -> Denoised:
        try:
            return truncate(change, self.options.energy, self.options.svd)
        except torch.linalg.LinAlgError:  # of which factor, they tell one by one
            singly = []
            for name, one in zip(names, change, strict=True):
                with naming([name]):
                    singly.append(truncate(one, self.options.energy, self.options.svd))
            return Denoised(*(torch.stack(field) for field in zip(*singly, strict=True)))


def assign_owners(cost: Mapping[str, float]) -> dict[str, int]:
    """Rank of each item: the costliest first, each to the rank with the least to do so far."""
    load = [0.0] * distributed.world_size()
    owners = {}
    for name in sorted(cost, key=lambda n: (-cost[n], n)):
        owners[name] = load.index(min(load))
        load[owners[name]] += cost[name]
    return owners


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Inside, linear algebra that fails is a failed consolidation of these factors."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ConsolidationFailed(f"the linear algebra of {', '.join(names)} failed: {error}") from error


def not_finite(name: str) -> ConsolidationFailed:
    return ConsolidationFailed(f"the update of {name} is not finite")


def _changes(
    names: Sequence[str], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, list[float]]:
    """W_1 - W_0, (factors, short, long), and their norms.

    Raises:
        ConsolidationFailed: naming the first factor whose update is not finite.
    """
    first = _wide(before[names[0]])
    changes = first.new_empty(len(names), *first.shape)
    for change, name in zip(changes, names, strict=True):
        change.copy_(_wide(after[name] - before[name]))  # several times as fast as stacking what is turned
    lengths = norm(changes).tolist()
    for name, length in zip(names, lengths, strict=True):
        if not math.isfinite(length):
            raise not_finite(name)
    return changes, lengths


def of_length(update: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Each of the updates, (factors, short, long), scaled to the norm of the other in its place; zero stays zero."""
    lengths, wanted = (norm(matrices).view(-1, 1, 1) for matrices in (update, other))
    return update * torch.where(lengths > 0, wanted / lengths, 0).to(update.dtype)


def _join(names: Sequence[str], basis: Basis, update: torch.Tensor) -> None:
    """Let updates join the history of their factors.

    Raises:
        ConsolidationFailed: naming the factor whose history cannot be decomposed.
    """
    try:
        basis.extend(update)
    except torch.linalg.LinAlgError:  # of which factor, they tell one by one
        for factor, name in enumerate(names):
            with naming([name]):
                basis.directions(slice(factor, factor + 1))
        raise


def _integrated(
    names: Sequence[str], before: Mapping[str, torch.Tensor], remembered: torch.Tensor, records: list[Record]
) -> Consolidated:
    """W = W_0 + RSM, of what memory holds: so the adapter is the sum of its memory whatever the dtype."""
    update = {}
    for name, part in zip(names, remembered, strict=True):
        update[name] = (part.mT if before[name].shape != part.shape else part).contiguous()
    return Consolidated({name: before[name] + update[name] for name in names}, update, records)


def _wide(factor: torch.Tensor) -> torch.Tensor:
    """The factor with its short side first."""
    return factor.mT if factor.shape[0] > factor.shape[1] else factor
