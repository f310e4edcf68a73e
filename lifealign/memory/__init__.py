"""Short-to-Long Memory Consolidation: linear algebra, its sharding over ranks, and the ledger on disk."""

from lifealign.memory.bank import MemoryBank
from lifealign.memory.consolidation import Consolidator
from lifealign.memory.subspace import denoise, refine

__all__ = ["Consolidator", "MemoryBank", "denoise", "refine"]
