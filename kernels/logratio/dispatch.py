"""Where the Triton kernels are chosen; read at every call, and importable without Triton."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def triton_installed() -> bool:
    """Found, not imported: importing it costs time and creates state."""
    return importlib.util.find_spec("triton") is not None


@cache
def _compiles_for(device: torch.device) -> bool:
    """NVIDIA from Ampere on: bfloat16 and asynchronous copies came with it. The tiles do not fit an AMD card's memory."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_triton(tensor: torch.Tensor, impl: str | None) -> bool:
    """Whether a call with this tensor takes the Triton kernels: where ``impl`` says so, or is None and they suit.

    Raises:
        ValueError: if ``impl`` asks for them and Triton is not installed.
    """
    if impl is None:
        return tensor.is_cuda and tensor.dtype != torch.float64 and triton_installed() and _compiles_for(tensor.device)
    if impl == "triton" and not triton_installed():
        raise ValueError(
            "impl='triton' needs the package triton, which is not installed: pip install triton, or leave impl out"
        )
    return impl == "triton"
