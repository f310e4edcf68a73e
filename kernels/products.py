"""The matrix product with a frozen weight on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import linear

FEWEST_ROWS = 16
"""A first call for a number of rows costs some tenths of a millisecond, in which so few would long be done. The probe at
start-up, which compares log-probabilities (``lifealign.models.policy``), has more."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias, outside autograd.

    In float32 oneDNN takes it, in which a step was measured to be 6 % shorter than with the library that torch takes (on
    Zen 4). In bfloat16 torch takes oneDNN by itself.

    Args:
        x: (rows, inputs).
        weight: (outputs, inputs); the transpose of a contiguous matrix does as well.
    """
    suits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and len(x) >= FEWEST_ROWS and x.shape[1] > 0
    if suits and _has_onednn():
        return _onednn(x, weight, None if bias is None else bias.contiguous())  # a strided one is misread
    return linear(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """Whether torch was built with this way to oneDNN, which is no public one, and it does what is expected of it."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 7), (3, 7), (3,)))
    try:
        got = torch.cat((_onednn(x, weight, bias), _onednn(x, weight.T.contiguous().T, None)))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(got, torch.cat((x @ weight.T + bias, x @ weight.T)), atol=1e-5)
