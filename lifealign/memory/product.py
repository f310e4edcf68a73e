"""Consolidation of what an adapter does, the product B A, in place of its factors one by one.

Two adapters with the same product are the same model, yet their factors may share nothing. Here the update of a layer is
ΔW = B₁ A₁ - B₀ A₀, a matrix of rank 2r at most, kept as two thin matrices: no matrix of the size of the weight is ever
built. Truncation goes through a core of 2r x 2r; inner products of updates through the r x r products of their parts.

    ⟨L₁ R₁, L₂ R₂⟩ = tr((L₁ᵀ L₂) (R₂ R₁ᵀ))

What refinement leaves, on top of B₀ A₀, has a higher rank than an adapter can hold. The best adapter of rank r takes its
place, and what that costs is reported. Memory holds what was added in effect, so that the products of a run's adapter
still are the sum of its memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from lifealign.memory.basis import RANK_TOLERANCE
from lifealign.memory.consolidation import (
    Consolidated,
    ConsolidationOptions,
    Consolidator,
    Record,
    assign_owners,
    naming,
    not_finite,
)
from lifealign.memory.truncation import ENERGY_TOLERANCE
from lifealign.runtime import distributed

LEFT, RIGHT = ".left", ".right"
"""What the names of a layer's parts in memory end in."""

ROUNDING = 1e-13
"""Singular values below this share of what a difference or a sum was made of are its rounding, in float64."""


class Product(NamedTuple):
    """The matrix ``left @ right``, never formed."""

    left: torch.Tensor  # (rows, k)
    right: torch.Tensor  # (k, columns)

    def double(self) -> Product:
        return Product(self.left.double(), self.right.double())

    def norm(self) -> float:
        return inner(self, self).clamp(min=0).sqrt().item()


class Spectral(NamedTuple):
    """A product as its singular values and vectors: u · diag(s) · vt."""

    u: torch.Tensor  # (rows, k)
    s: torch.Tensor  # (k,), descending
    vt: torch.Tensor  # (k, columns)

    def leading(self, rank: int) -> Product:
        return Product(self.u[:, :rank] * self.s[:rank], self.vt[:rank])


def total(parts: Sequence[Product]) -> Product:
    """The sum of products, as one of the ranks' sum."""
    return Product(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 0))


def scaled(product: Product, factor: float) -> Product:
    return product._replace(left=product.left * factor)


def inner(a: Product, b: Product) -> torch.Tensor:
    """() the Frobenius inner product."""
    return ((a.left.mT @ b.left) * (a.right @ b.right.mT)).sum()


def spectral(product: Product) -> Spectral:
    """Through QR of both parts and the SVD of their core, float64."""
    left, right = torch.linalg.qr(product.left.double()), torch.linalg.qr(product.right.double().mT)
    u, s, vt = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return Spectral(left.Q @ u, s, vt @ right.Q.mT)


def rank_holding(s: torch.Tensor, energy: float) -> int:
    """The fewest leading singular values that hold ``energy`` of the squared sum; none of a zero spectrum."""
    if energy == 1:
        return len(s)
    squares = s.square()
    before = squares.cumsum(0) - squares
    return int(((before < energy * squares.sum() * (1 - ENERGY_TOLERANCE)) & (squares > 0)).sum())


def without_noise(found: Spectral, noise: float) -> Spectral:
    """The directions whose singular values are above ``noise``."""
    rank = int((found.s > noise).sum())
    return Spectral(found.u[:, :rank], found.s[:rank], found.vt[:rank])


class ProductHistory:
    """The span of the updates of one layer so far, as products; only their inner products are ever needed.

    Directions of which the span holds less than a tolerance, relative to the lengths of the updates, are left out, as in
    ``Basis``; the tolerance is squared because it bounds an eigenvalue of the Gram matrix.
    """

    def __init__(self) -> None:
        self.updates: list[Product] = []
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    def extend(self, update: Product) -> None:
        row = torch.stack([*self._inner(update), inner(update, update)])
        self._gram = pad(self._gram, (0, 1, 0, 1))
        self._gram[-1], self._gram[:, -1] = row, row
        self.updates.append(Product(update.left.float(), update.right.float()))

    def project(self, update: Product) -> Product | None:
        """Component in the span, of rank up to that of all updates together; None where nothing is remembered."""
        lengths = self._gram.diagonal().sqrt()
        used = lengths > 0
        if not used.any():
            return None
        lengths = lengths[used]
        squares, vectors = torch.linalg.eigh(self._gram[used][:, used] / lengths / lengths[:, None])
        keep = squares > RANK_TOLERANCE[torch.float32] ** 2 * squares[-1]
        against = torch.stack(self._inner(update))[used] / lengths
        weights = vectors[:, keep] @ ((vectors[:, keep].mT @ against) / squares[keep]) / lengths
        chosen = [u for u, is_used in zip(self.updates, used.tolist(), strict=True) if is_used]
        return total([scaled(u.double(), w) for u, w in zip(chosen, weights.tolist(), strict=True)])

    def _inner(self, update: Product) -> list[torch.Tensor]:
        return [inner(past.double(), update) for past in self.updates]


def best_adapter(wanted: Spectral, a: torch.Tensor) -> Product:
    """The adapter B A of the rank of ``a`` that is nearest to a matrix, as (rows, r) and (r, columns).

    There are many. This one's A has orthogonal rows, as long as those of ``a`` were on the average, which span what is
    needed first, then what else ``a`` spanned, then anything; B carries the magnitude. So a gradient reaches every row
    however low the rank of what is wanted, and steps of the optimiser mean what they meant before. An A with more rows than
    columns keeps the rows for which there is no direction left.
    """
    a, r = a.double(), len(a)
    length = a.square().sum(1).mean().sqrt().item() or 1.0
    held = without_noise(Spectral(wanted.u[:, :r], wanted.s[:r], wanted.vt[:r]), ROUNDING * _largest(wanted.s))
    rank, most = len(held.s), min(a.shape)
    rest = torch.linalg.svd(a - (a @ held.vt.mT) @ held.vt, full_matrices=False)
    spanned = rest.Vh[: min(most - rank, int(rest.S.gt(1e-6 * length).sum()))]
    anything = torch.randn(most - rank - len(spanned), a.shape[1], dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(torch.cat([held.vt, spanned, anything]).mT).Q.mT
    left = (held.u * held.s) @ (held.vt @ directions[:rank].mT) / length
    return Product(pad(left, (0, r - rank)), torch.cat([directions * length, a[most:]]))


def _largest(s: torch.Tensor) -> float:
    return s[0].item() if len(s) else 0.0


class ProductConsolidator(Consolidator):
    """One update a layer: B₁ A₁ - B₀ A₀.

    Args:
        shapes: whole shape of every factor of the adapter.

    Memory is float32, whatever the option says: the adapter could not be rounded along with its products, and would not
    be the sum of its memory any more.

    Raises:
        ValueError: where a factor has no partner.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], options: ConsolidationOptions) -> None:
        self._layers = pair_factors(shapes)
        cost = {layer: sum(shapes[n].numel() * min(shapes[n]) for n in pair) for layer, pair in self._layers.items()}
        self._owner = assign_owners(cost)
        super().__init__({n: self._owner[layer] for layer, pair in self._layers.items() for n in pair}, options)
        self._history = {layer: ProductHistory() for layer, owner in self._owner.items() if owner == distributed.rank()}

    def holds(self, name: str) -> bool:
        return name.removesuffix(LEFT).removesuffix(RIGHT) in self._history

    def remember(self, update: Mapping[str, torch.Tensor]) -> None:
        for layer, history in self._history.items():
            past = Product(update[layer + LEFT], update[layer + RIGHT])
            if not all(torch.isfinite(part).all() for part in past):
                raise ValueError(f"history holds an update of {layer} that is not finite")
            history.extend(past.double())

    def _refined(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        for layer, history in self._history.items():
            with naming([layer]):
                start, found = self._start_and_change(layer, before, after)
                kept_rank = rank_holding(found.s, self.options.energy)
                short_term = found.leading(kept_rank)
                past = history.project(short_term)
                factors, lost = self._integrated(layer, before, after, start, short_term, past)
                update = _remembered(start, *factors)
                history.extend(update.double())
            kept, whole = found.s[:kept_rank].square().sum().item(), found.s.square().sum().item()
            record = {
                "factor": layer,
                "kept_rank": kept_rank,
                "kept_energy": kept / whole if whole else 1.0,
                "history_share": past.norm() ** 2 / kept if past is not None and kept else 0.0,
                "update_norm": whole**0.5,
                "refined_norm": update.double().norm(),
                "truncation_error": lost,
                "singular_values": found.s.tolist(),
            }
            yield self._done(layer, factors, update, record)

    def _raw(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[Consolidated]:
        for layer, (a, b) in self._layers.items():
            if layer not in self._history:
                continue
            with naming([layer]):
                start, found = self._start_and_change(layer, before, after)
                factors = after[b], after[a]
                update = _remembered(start, *factors)
            length = found.s.norm().item()
            record = {"factor": layer, "update_norm": length, "refined_norm": length}
            yield self._done(layer, factors, update, record)

    def _start_and_change(
        self, layer: str, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> tuple[Product, Spectral]:
        """B₀ A₀ and B₁ A₁ - B₀ A₀, float64.

        Raises:
            ConsolidationFailed: naming a factor that is not finite.
        """
        a, b = self._layers[layer]
        for name in (a, b):
            if not torch.isfinite(after[name] - before[name]).all():
                raise not_finite(name)
        start = Product(before[b], before[a]).double()
        found = spectral(total([Product(after[b], after[a]).double(), scaled(start, -1.0)]))
        return start, without_noise(found, ROUNDING * (start.norm() + _largest(found.s)))

    def _integrated(
        self,
        layer: str,
        before: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
        start: Product,
        short_term: Product,
        past: Product | None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
        """B and A of the nearest adapter to W = B₀ A₀ + RSM, and the norm of what it cannot hold."""
        a, b = self._layers[layer]
        if short_term.right.shape[0] == 0:
            return (before[b], before[a]), 0.0
        refined = [short_term] if past is None else [short_term, scaled(past, self.options.scale - 1)]
        wanted = spectral(total([start, *refined]))
        adapter = best_adapter(wanted, after[a])
        lost = wanted.s[len(after[a]) :].norm().item()
        return (adapter.left.to(after[b].dtype), adapter.right.to(after[a].dtype)), lost

    def _done(self, layer: str, factors: tuple[torch.Tensor, torch.Tensor], update: Product, record: Record) -> Consolidated:
        a, b = self._layers[layer]
        values = {b: factors[0].contiguous(), a: factors[1].contiguous()}
        return Consolidated(values, {layer + LEFT: update.left, layer + RIGHT: update.right}, [record])


def _remembered(start: Product, b: torch.Tensor, a: torch.Tensor) -> Product:
    """What a new adapter adds to an old one, in float32. As a difference of two products it would lose its digits there."""
    added = spectral(total([Product(b, a).double(), scaled(start, -1.0)]))
    added = without_noise(added, ROUNDING * (start.norm() + _largest(added.s)))
    left, right = added.leading(len(added.s))
    return Product(left.float().contiguous(), right.float().contiguous())


def pair_factors(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of A and B by the name of their layer.

    Raises:
        ValueError: where a factor has no partner.
    """
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        parts = re.fullmatch(r"(.+)\.lora_([AB])(?:\..+)?", name)
        assert parts is not None, f"{name} is no LoRA factor"
        layers[parts[1]][parts[2]] = name
    for layer, sides in layers.items():
        if len(sides) < 2:
            raise ValueError(f"{layer} has no pair of LoRA factors A and B")
    return {layer: (sides["A"], sides["B"]) for layer, sides in layers.items()}
