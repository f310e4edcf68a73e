"""What the memory's linear algebra is compared with: definitions to the letter, in float64, on dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix of these singular values, in random directions."""
    left = torch.linalg.qr(normal(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(normal(columns, len(values), seed=seed + 1)).Q
    return (left * values) @ right.T


def svd_denoise(update: torch.Tensor, energy: float) -> tuple[torch.Tensor, int]:
    """The smallest k with Σ_{i≤k} σ_i² ≥ θ · Σ σ_i², with the documented slack, and the update cut to it."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    k, kept, total = 0, 0.0, s.square().sum().item()
    while kept < energy * total * (1 - 1e-12) and k < len(s):
        kept, k = kept + s[k].item() ** 2, k + 1
    return u[:, :k] @ torch.diag(s[:k]) @ vh[:k], k


def pinv_project(update: torch.Tensor, history: Sequence[torch.Tensor]) -> torch.Tensor:
    """The projector onto the row space of H is H⁺H; small singular values are cut at 1e-6 of the largest."""
    rows = [past.flatten() / past.norm() for past in history if past.norm() > 0]
    if not rows:
        return torch.zeros_like(update)
    matrix = torch.stack(rows)
    return (torch.linalg.pinv(matrix, rtol=1e-6) @ (matrix @ update.flatten())).view(update.shape)


def pinv_refine(update: torch.Tensor, history: Sequence[torch.Tensor], energy: float, scale: float) -> torch.Tensor:
    short_term = svd_denoise(update, energy)[0]
    return short_term - (1 - scale) * pinv_project(short_term, history)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, as a share of that of ``expected`` where it is not zero."""
    whole = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (whole or 1.0)
