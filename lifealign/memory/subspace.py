"""Linear algebra of Short-to-Long Memory Consolidation: truncate an update, and weigh it against the span of the past.

Everything here is pure. Updates may carry leading batch dimensions, so that factors of one shape go through one call;
results have the dtype of the input, and all arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

RANK_TOLERANCE = 1e-6
"""A stored update adds a direction to the history's span only if what the span leaves of it is longer than this share
of its own length. Updates are float32, so a repeated one leaves about 1e-7 of rounding noise, which is no knowledge."""

ENERGY_TOLERANCE = 1e-12
"""Slack, relative to the total, in comparing energies: a spectrum that meets the threshold exactly must be seen to."""


class Denoised(NamedTuple):
    """An update cut to its leading singular directions."""

    update: torch.Tensor  # (..., rows, columns)
    kept_rank: torch.Tensor  # (...) int64
    kept_energy: torch.Tensor  # (...) float64, share of the squared norm; 1 for a zero update


class Refined(NamedTuple):
    """An update weighed against the span of history."""

    update: torch.Tensor  # (..., rows, columns)
    history_share: torch.Tensor  # (...) float64, share of the squared norm that lay in the span; 0 for a zero update


def truncate(update: torch.Tensor, energy: float) -> Denoised:
    """Keep the fewest singular directions that hold ``energy`` of the squared norm (the paper's denoising, theta = 0.9).

    The singular vectors of the short side come from the float64 Gram matrix M Mᵀ = U diag(s²) Uᵀ, and the truncation is
    the projection U_k U_kᵀ M, so the long side is never decomposed. ``energy=1`` returns the update as it is.

    Args:
        update: (..., rows, columns).
        energy: in [0, 1]; 0 keeps nothing.

    Raises:
        ValueError: for an energy outside [0, 1] or an update that is not finite.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy={energy}: must lie in [0, 1]")
    if not torch.isfinite(update).all():
        raise ValueError("the update is not finite")
    if update.shape[-2] > update.shape[-1]:
        flipped = truncate(update.transpose(-1, -2), energy)
        return flipped._replace(update=flipped.update.transpose(-1, -2))

    matrix = update.double()
    squares, vectors = torch.linalg.eigh(matrix @ matrix.transpose(-1, -2))  # ascending
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
    total = squares.sum(-1, keepdim=True)
    cumulative = squares.cumsum(-1)
    threshold = energy * total * (1 - ENERGY_TOLERANCE)
    # Directions before the threshold is reached, and the one that reaches it; none of a zero update.
    keep = ((cumulative - squares) < threshold) & (squares > 0)
    kept_energy = torch.where(total > 0, (squares * keep).sum(-1, keepdim=True) / total, 1.0).squeeze(-1)
    if energy == 1:
        return Denoised(update.clone(), keep.sum(-1), torch.ones_like(kept_energy))
    leading = vectors * keep.unsqueeze(-2)
    truncated = leading @ (leading.transpose(-1, -2) @ matrix)
    return Denoised(truncated.to(update.dtype), keep.sum(-1), kept_energy)


def denoise(update: torch.Tensor, energy: float) -> torch.Tensor:
    """The truncated update alone; see :func:`truncate`. (rows, columns) in, the same out."""
    return truncate(update, energy).update


class Basis:
    """Orthonormal basis of the span of a growing list of updates, for a batch of factors of one shape.

    Rows of ``vectors`` (batch, size, numel) are orthonormal or zero: a factor whose new update added no direction holds a
    zero row, so that the batch stays rectangular and projections are unaffected. Each update is orthogonalised twice
    ("twice is enough", Giraud et al. 2005), which keeps the basis orthonormal to rounding.
    """

    def __init__(self, batch: int, numel: int) -> None:
        self.vectors = torch.zeros(batch, 0, numel, dtype=torch.float64)

    def project(self, flat: torch.Tensor) -> torch.Tensor:
        """Component in the span; (batch, numel) float64 in and out."""
        coefficients = self.vectors @ flat.unsqueeze(-1)
        return (self.vectors.transpose(-1, -2) @ coefficients).squeeze(-1)

    def extend(self, flat: torch.Tensor) -> None:
        """Add the direction of each update that the span does not hold yet; (batch, numel).

        Raises:
            ValueError: for an update that is not finite; leaving it out would shorten the history unseen.
        """
        flat = flat.double()
        if not torch.isfinite(flat).all():
            raise ValueError("history holds an update that is not finite")
        residual = flat - self.project(flat)
        residual = residual - self.project(residual)
        length, whole = residual.norm(dim=-1, keepdim=True), flat.norm(dim=-1, keepdim=True)
        is_new = length > RANK_TOLERANCE * whole
        direction = torch.where(is_new, residual / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)
        if is_new.any():
            self.vectors = torch.cat([self.vectors, direction.unsqueeze(1)], dim=1)


def rescale_history(update: torch.Tensor, basis: Basis, scale: float) -> Refined:
    """Scale the component in the span of history: SM_o + scale * SM_p (the paper's refinement, lambda = 0.5).

    Args:
        update: (batch, rows, columns).
        basis: of the same batch, with numel = rows * columns.
        scale: in [0, 1]; 1 changes nothing, 0 removes every component in the span.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"scale={scale}: must lie in [0, 1]")
    flat = update.double().flatten(1)
    past = basis.project(flat)
    total = flat.square().sum(-1)
    share = torch.where(total > 0, past.square().sum(-1) / total, 0.0)
    if scale == 1:
        return Refined(update.clone(), share)
    refined = flat - (1 - scale) * past
    return Refined(refined.view(update.shape).to(update.dtype), share)


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
    basis = Basis(1, update.numel())
    for past in history:
        basis.extend(past.reshape(1, -1))
    return rescale_history(denoise(update, energy).unsqueeze(0), basis, scale).update.squeeze(0)
