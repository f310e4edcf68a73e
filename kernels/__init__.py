"""Operations with more than one implementation, one folder each.

``reference`` is plain and meant to be read against the paper; the others are faster and tested against it. The package
imports torch (and Triton where it is installed) alone, and is installed as ``lifealign.kernels``.
Imports inside it are relative: from the repository root it can also be found under the bare name ``kernels``, which
transformers probes for, and must then load without harm.
"""

from .logratio import sequence_logps
from .products import product

__all__ = ["product", "sequence_logps"]
