"""Refinement: an update weighed against the span of the updates before it.

``refine`` is the reference, for one factor and in float64. The same ``Basis``, with vectors of fewer digits and for a batch of
factors of one shape, serves the sharded consolidation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from lifealign.memory.truncation import denoise

RANK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""A stored update adds a direction to the span only if what the span leaves of it is longer than this share of its own
length, by the dtype of the vectors. A repeated update, itself float32 or bfloat16, leaves rounding noise of a tenth of it."""


CANCELLED = 0.5
"""Where subtracting the span leaves a smaller share of an update, cancellation has cost digits, and it is done once more."""


class Refined(NamedTuple):
    """An update weighed against the span of history."""

    update: torch.Tensor  # (batch, rows, columns)
    history_share: torch.Tensor  # (batch,) float64, share of the squared norm that lay in the span; 0 for a zero update


class Basis:
    """Orthonormal basis of the span of a growing list of updates, for a batch of factors of one shape.

    Vectors are orthonormal or zero: a factor whose new update added no direction holds a zero vector, so that the batch
    stays rectangular and projections are unaffected. An update of which the span leaves little is orthogonalised twice
    ("twice is enough", Giraud et al., 2005), which keeps the basis orthonormal to the rounding of its dtype.

    **Capacity.** With ``limit`` m a factor keeps at most m directions. Beyond it this is a frequent-directions sketch
    (Liberty, 2013): of the m + 1 singular directions of the history, the one with the least energy d leaves, and d is taken
    from the energy of the others. For the history H, a row an update, with S its energies in the kept directions V, and D
    the sum of all d so far (``merged``), every unit vector x and every k <= m satisfy

        0 <= ‖H x‖² - xᵀ Vᵀ S V x <= D <= ‖H - H_k‖² / (m + 1 - k),

    with H_k the best approximation of rank k, in the Frobenius norm. A direction in which the past has more than D energy is
    therefore never forgotten. Each time a direction leaves, the others are turned and rounded once more.

    Args:
        shape: rows and columns of an update.
        dtype: of the vectors. Products are taken in it (bfloat16: in float32) along rows, and summed over rows in float64.
        limit: most directions of a factor; None: as many as there are updates.
    """

    def __init__(
        self, batch: int, shape: Sequence[int], *, dtype: torch.dtype = torch.float64, limit: int | None = None
    ) -> None:
        rows, columns = shape
        self.size, self.limit = 0, limit
        self.merged = torch.zeros(batch, dtype=torch.float64)
        self._store = torch.zeros(0, batch, rows, columns, dtype=dtype)  # its first ``size`` vectors are in use
        self._energies = torch.zeros(batch, 0, 0, dtype=torch.float64)  # Vᵀ Hᵀ H V, kept only where there is a limit

    @property
    def vectors(self) -> torch.Tensor:
        """(size, batch, rows, columns)."""
        return self._store[: self.size]

    def coordinates(self, update: torch.Tensor) -> torch.Tensor:
        """(batch, size) float64 inner products with the vectors."""
        rows = update.to(self._working).flatten(0, 1).unsqueeze(1)
        by_row = torch.bmm(rows, self._matrices().mT).squeeze(1)  # in this form products run along memory
        return by_row.unflatten(0, update.shape[:2]).sum(1, dtype=torch.float64)

    def combine(self, coordinates: torch.Tensor) -> torch.Tensor:
        """(batch, rows, columns): the sum of the vectors, each times its coordinate; (batch, size) in."""
        batch, rows, columns = self._store.shape[1:]
        weights = coordinates.to(self._working).unsqueeze(1).expand(-1, rows, -1).flatten(0, 1).unsqueeze(1)
        return torch.bmm(weights, self._matrices()).view(batch, rows, columns)

    def extend(self, update: torch.Tensor) -> None:
        """Let an update join the history; (batch, rows, columns).

        Raises:
            ValueError: where it is not finite; leaving it out would shorten the history unseen.
            LinAlgError: where :meth:`directions` cannot be had, of a factor that is beyond its limit.
        """
        update = update.to(self._working)
        whole = norm(update)
        if not torch.isfinite(whole).all():
            raise ValueError("history holds an update that is not finite")
        coordinates = self.coordinates(update)
        residual = update - self.combine(coordinates)
        length = norm(residual)
        again = length < CANCELLED * whole
        if again.any():
            correction = torch.where(again[:, None], self.coordinates(residual), 0.0)
            residual -= self.combine(correction)
            coordinates, length = coordinates + correction, norm(residual)
        is_new = length > RANK_TOLERANCE[self._store.dtype] * whole
        if self.limit is not None:
            self._add_energy(coordinates, torch.where(is_new, length, 0.0))
        self._append(residual, torch.where(is_new, 1 / length, 0.0))
        if not is_new.any():
            self._drop_last()
        elif self.limit is not None and self.size > self.limit:
            self._merge_least()

    def directions(self, factors: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Where there is a limit: energies of the history of these factors, ascending, and its directions in the vectors."""
        return torch.linalg.eigh(self._energies[factors])

    @property
    def _working(self) -> torch.dtype:
        return torch.promote_types(self._store.dtype, torch.float32)

    def _matrices(self) -> torch.Tensor:
        """(batch * rows, size, columns): for each row of each factor, that row of every vector."""
        return self.vectors.to(self._working).permute(1, 2, 0, 3).flatten(0, 1)

    def _append(self, residual: torch.Tensor, factors: torch.Tensor) -> None:
        """Each residual, times its factor, as one more vector; (batch, rows, columns) and (batch,).

        Room is doubled where there is none, so that a vector is moved a bounded number of times.
        """
        if self.size == len(self._store):
            room = max(4, 2 * self.size)
            room = room if self.limit is None else min(room, self.limit + 1)
            grown = self._store.new_empty(room, *self._store.shape[1:])
            grown[: self.size] = self._store
            self._store = grown
        torch.mul(residual, factors.to(residual.dtype)[:, None, None], out=self._store[self.size])
        self.size += 1

    def _drop_last(self) -> None:
        self.size -= 1
        self._energies = self._energies[:, : self.size, : self.size]

    def _add_energy(self, known: torch.Tensor, new: torch.Tensor) -> None:
        """An update with these coordinates in the vectors, (batch, size), and in the one about to be added, (batch,)."""
        coordinates = torch.cat([known, new.unsqueeze(-1)], -1)
        self._energies = pad(self._energies, (0, 1, 0, 1))
        self._energies += coordinates.unsqueeze(-1) * coordinates.unsqueeze(-2)
        # Less than none: a zero vector is the first to leave.
        self._energies[:, -1, -1] -= torch.where(new == 0, self._energies.diagonal(dim1=1, dim2=2).clamp(min=0).sum(-1), 0.0)

    def _merge_least(self) -> None:
        """Turn the vectors to the singular directions of the history, and let the one with the least energy go."""
        squares, rotation = self.directions()
        least, others = squares[:, :1].clamp(min=0), squares[:, 1:]
        self.merged += least[:, 0]
        self._energies = torch.diag_embed(torch.where(others > 0, others - least, others))
        batch, rows = self._store.shape[1:3]
        weights = rotation[:, :, 1:].mT.to(self._working).unsqueeze(1).expand(-1, rows, -1, -1).flatten(0, 1)
        turned = torch.bmm(weights, self._matrices())  # (batch * rows, limit, columns)
        self.size -= 1
        self._store[: self.size] = turned.unflatten(0, (batch, rows)).permute(2, 0, 1, 3)


def norm(update: torch.Tensor) -> torch.Tensor:
    """(batch,) float64 Frobenius norms of (batch, rows, columns).

    Squares are summed along rows in the dtype of the update: in float32 numbers below 1e-22 count as none, and a row of norm
    above 1e19 as not finite.
    """
    return torch.linalg.vector_norm(update, dim=-1).double().norm(dim=-1)


def rescale_history(update: torch.Tensor, basis: Basis, scale: float) -> Refined:
    """Scale the component in the span of history: SM_o + scale * SM_p (the paper's refinement, lambda = 0.5).

    Args:
        update: (batch, rows, columns), of the batch and shape of the basis.
        scale: in [0, 1]; 1 changes nothing, 0 removes every component in the span.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"scale={scale}: must lie in [0, 1]")
    coordinates = basis.coordinates(update)
    past = basis.combine(coordinates).to(update.dtype)
    total = norm(update).square()
    share = torch.where(total > 0, coordinates.square().sum(-1) / total, 0.0).clamp(max=1)  # vectors are unit but for rounding
    return Refined(update.clone() if scale == 1 else update.sub(past, alpha=1 - scale), share)


def refine(update: torch.Tensor, history: Sequence[torch.Tensor], *, energy: float, scale: float) -> torch.Tensor:
    """The refined update of one factor: denoise, then scale what lies in the span of its history (docs/method.md).

    Args:
        update: (rows, columns), the factor's change over a stage.
        history: earlier refined updates of the same shape; may be empty, and may hold zero or repeated updates.
        energy: share of the squared norm that truncation keeps, in [0, 1].
        scale: factor on the component in the span of history, in [0, 1].

    Raises:
        ValueError: for options out of range, a non-finite update, or a history of another shape.
    """
    if any(past.shape != update.shape for past in history):
        raise ValueError(f"history holds updates of another shape than {tuple(update.shape)}")
    basis = Basis(1, update.shape)  # on the CPU, whichever device updates are on
    for past in history:
        basis.extend(past.detach().cpu().unsqueeze(0))
    refined = rescale_history(denoise(update.detach().cpu().double(), energy).unsqueeze(0), basis, scale)
    return refined.update.squeeze(0).to(update)
