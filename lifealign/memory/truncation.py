"""Denoising: an update cut to the fewest singular directions that hold a share of its energy.

Everything here is pure. Updates may carry leading batch dimensions, so that factors of one shape go through one call;
results have the dtype of the input, and all decompositions are float64.

Three ways to the same truncation:

- ``gram``: eigenvectors of the Gram matrix of the short side. Exact, and the long side is never decomposed; the way for
  LoRA factors, whose short side is the rank.
- ``randomized``: a range finder whose rank grows until the energy is held; the way where no side is short.
- ``exact``: a full SVD; the oracle.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch.nn.functional import pad

ENERGY_TOLERANCE = 1e-12
"""Slack, relative to the total, in comparing energies: a spectrum that meets the threshold exactly must be seen to."""

GRAM_LIMIT = 512
"""Longest short side that ``auto`` takes to the Gram matrix; the eigenvectors of a larger one cost more than a sketch."""

POWER_ITERATIONS = 2
OVERSAMPLING = 8
FIRST_BLOCK = 24  # directions of the first sketch, oversampling included; each further one doubles the rank


class SVDMethod(StrEnum):
    """How singular directions are found; see the module."""

    auto = "auto"
    gram = "gram"
    randomized = "randomized"
    exact = "exact"


class Denoised(NamedTuple):
    """An update cut to its leading singular directions."""

    update: torch.Tensor  # (..., rows, columns)
    kept_rank: torch.Tensor  # (...) int64
    kept_energy: torch.Tensor  # (...) float64, share of the squared norm; 1 for a zero update
    singular_values: torch.Tensor  # (..., found) float64, descending, of the update before it was cut


class _Directions(NamedTuple):
    """Leading left singular directions of a matrix with no more rows than columns."""

    vectors: torch.Tensor  # (..., rows, found), orthonormal
    squares: torch.Tensor  # (..., found), descending, of the singular values
    total: torch.Tensor  # (..., 1): squared norm of the matrix


def truncate(update: torch.Tensor, energy: float, method: SVDMethod = SVDMethod.auto) -> Denoised:
    """Keep the fewest singular directions that hold ``energy`` of the squared norm (the paper's denoising, theta = 0.9).

    The truncation is a projection, U_k U_kᵀ M, on leading singular vectors of the short side. ``energy=1`` returns the
    update as it is. With ``randomized`` the share that is kept is still known exactly and at least ``energy``; only the
    rank may come out larger than the smallest possible, as :func:`_sketched` says.

    Args:
        update: (..., rows, columns).
        energy: in [0, 1]; 0 keeps nothing.

    Raises:
        ValueError: for an energy outside [0, 1] or an update that is not finite.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy={energy}: must lie in [0, 1]")
    if update.shape[-2] > update.shape[-1]:
        flipped = truncate(update.mT, energy, method)
        return flipped._replace(update=flipped.update.mT)
    found = _directions(update.double(), energy, method)
    cumulative = found.squares.cumsum(-1)
    threshold = energy * found.total * (1 - ENERGY_TOLERANCE)
    # Directions before the threshold is reached, and the one that reaches it; none of a zero update.
    keep = ((cumulative - found.squares) < threshold) & (found.squares > 0)
    kept = (found.squares * keep).sum(-1, keepdim=True)
    share = torch.where(found.total > 0, kept / found.total, 1.0).squeeze(-1)
    values = found.squares.sqrt()
    if energy == 1:
        return Denoised(update.clone(), keep.sum(-1), torch.ones_like(share), values)
    return Denoised(_projected(update, found.vectors * keep.unsqueeze(-2)), keep.sum(-1), share, values)


def denoise(update: torch.Tensor, energy: float) -> torch.Tensor:
    """The truncated update alone; see :func:`truncate`. (rows, columns) in, the same out."""
    return truncate(update, energy).update


def _projected(update: torch.Tensor, leading: torch.Tensor) -> torch.Tensor:
    """U_k U_kᵀ M; (..., rows, columns), and (..., rows, k) float64.

    A projection magnifies no rounding: products with the long side need no more digits than the update has.
    """
    working = torch.promote_types(update.dtype, torch.float32)
    matrix = update.to(working)
    if leading.shape[-1] == leading.shape[-2]:  # one product with the long side in place of two
        truncated = (leading @ leading.mT).to(working) @ matrix
    else:
        leading = leading.to(working)
        truncated = leading @ (leading.mT @ matrix)
    return truncated.to(update.dtype)


def _directions(matrix: torch.Tensor, energy: float, method: SVDMethod) -> _Directions:
    """At least as many directions as hold ``energy``; (..., rows, columns) float64 with rows <= columns."""
    if method is SVDMethod.auto:
        method = SVDMethod.gram if matrix.shape[-2] <= GRAM_LIMIT else SVDMethod.randomized
    if method is SVDMethod.exact:
        _require_finite(torch.linalg.matrix_norm(matrix))
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        return _Directions(u, s.square(), s.square().sum(-1, keepdim=True))
    if method is SVDMethod.gram or energy == 1:  # all energy is all directions: nothing is left to sketch
        return _of_gram(matrix)
    _require_finite(torch.linalg.matrix_norm(matrix))
    parts = [_sketched(m, energy) for m in matrix.reshape(-1, *matrix.shape[-2:])]
    found = max(len(part.squares) for part in parts)
    fields = zip(*(_padded(part, found) for part in parts), strict=True)
    return _Directions(*(torch.stack(field).view(*matrix.shape[:-2], *field[0].shape) for field in fields))


def _require_finite(energies: torch.Tensor) -> None:
    """Of energies or norms in float64, where no float32 update overflows them."""
    if not torch.isfinite(energies).all():
        raise ValueError("the update is not finite")


def _of_gram(matrix: torch.Tensor) -> _Directions:
    """All directions, from the eigenvectors of M Mᵀ."""
    gram = matrix @ matrix.mT
    _require_finite(gram.diagonal(dim1=-2, dim2=-1))
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    squares = squares.flip(-1).clamp(min=0)
    return _Directions(vectors.flip(-1), squares, squares.sum(-1, keepdim=True))


def _sketched(matrix: torch.Tensor, energy: float) -> _Directions:
    """Directions from a randomized range finder with power iterations; (rows, columns) float64, rows <= columns.

    An orthonormal Q is grown a block at a time (Martinsson and Voronin, 2016, randQB with power iterations), until its
    leading directions, ``OVERSAMPLING`` of them set aside, hold ``energy``. What Q misses is known exactly, because
    ‖M - Q Qᵀ M‖² = ‖M‖² - ‖Qᵀ M‖² in the Frobenius norm, so the share of energy is measured and not estimated.

    The rank comes out as the smallest possible unless a singular value near the threshold is found too small. With q power
    iterations a sketch of k + p directions errs in the spectral norm by no more than, in expectation (Halko, Martinsson and
    Tropp, 2011, corollary 10.10, n the number of rows),

        E ‖M - Q Qᵀ M‖ <= [1 + √(k/(p-1)) + e √(k+p)/p · √(n-k)]^(1/(2q+1)) · s_{k+1}.

    The sketch is a function of the shape alone, so every rank and every run draws the same one.
    """
    rows, columns = matrix.shape
    generator = torch.Generator().manual_seed(columns)
    total = matrix.square().sum()
    basis, products = matrix.new_zeros(rows, 0), matrix.new_zeros(0, columns)
    block = FIRST_BLOCK
    while True:
        width = min(block, rows - basis.shape[1])
        sample = torch.randn(columns, width, dtype=matrix.dtype, generator=generator).to(matrix.device)
        for _ in range(POWER_ITERATIONS):
            image = torch.linalg.qr(matrix @ sample - basis @ (products @ sample)).Q
            sample = torch.linalg.qr(matrix.mT @ image - products.mT @ (basis.mT @ image)).Q
        image = torch.linalg.qr(matrix @ sample - basis @ (products @ sample)).Q
        image = torch.linalg.qr(image - basis @ (basis.mT @ image)).Q  # rounding has brought some of the basis back
        basis, products = torch.cat([basis, image], 1), torch.cat([products, image.mT @ matrix])
        found = _of_gram(products)
        if basis.shape[1] == rows or found.squares[:-OVERSAMPLING].sum() >= energy * total:
            return _Directions(basis @ found.vectors, found.squares, total.reshape(1))
        block = basis.shape[1]


def _padded(part: _Directions, found: int) -> _Directions:
    """The same directions and zeros up to ``found`` of them, so that a batch is rectangular."""
    more = found - len(part.squares)
    return _Directions(pad(part.vectors, (0, more)), pad(part.squares, (0, more)), part.total)
