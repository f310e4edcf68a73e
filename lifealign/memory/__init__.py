"""Short-to-Long Memory Consolidation: linear algebra, its sharding over ranks, and the ledger on disk."""

from collections.abc import Mapping

import torch

from lifealign.memory.bank import MemoryBank
from lifealign.memory.basis import refine
from lifealign.memory.consolidation import ConsolidationOptions, Consolidator, FactorConsolidator, Space
from lifealign.memory.product import ProductConsolidator
from lifealign.memory.truncation import SVDMethod, denoise

__all__ = [
    "ConsolidationOptions",
    "Consolidator",
    "FactorConsolidator",
    "MemoryBank",
    "ProductConsolidator",
    "SVDMethod",
    "Space",
    "denoise",
    "make_consolidator",
    "refine",
]


def make_consolidator(space: Space, shapes: Mapping[str, torch.Size], options: ConsolidationOptions) -> Consolidator:
    """The consolidator of a space, for an adapter whose factors have these whole shapes."""
    return {Space.factors: FactorConsolidator, Space.product: ProductConsolidator}[space](shapes, options)
